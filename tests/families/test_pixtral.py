import pytest
import torch
from by_hand import check_boxes, merged, received, saliency

import foveate
from foveate.core.errors import BudgetError, InputError, UnsupportedModelError
from foveate.families import all_families, family_of
from foveate.methods import Downsample, Random
from tiny import collate, model, samples

BLOCK = {"mistral3": 2, "pixtral": 1}
each = pytest.mark.parametrize("name", BLOCK)


def sizes(inputs):
    return [tuple(size) for size in inputs["image_sizes"].tolist()]


@each
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_that_within_each_picture(name, attention):
    """Pictures share one sequence, in which they do not see each other."""
    net, eager, inputs = model(name, attention), model(name, "eager"), collate(samples(name))
    for values, pixels, (h, w) in zip(saliency(net, inputs), inputs["pixel_values"], sizes(inputs), strict=True):
        alone = received(eager.model.vision_tower, pixel_values=pixels[None, :, :h, :w])
        assert float(alone.sum()) == pytest.approx(1.0)
        torch.testing.assert_close(values, torch.tensor(merged(alone[0], (h // 4, w // 4), BLOCK[name])))


@each
def test_tokens_are_where_their_boxes_are(name):
    net, inputs = model(name), collate(samples(name)[:2])
    assert [s.grid for s in family_of(net).spans(net, inputs)] == [
        (1, h // (4 * BLOCK[name]), w // (4 * BLOCK[name])) for h, w in sizes(inputs)
    ]
    assert check_boxes(net, inputs, sizes(inputs)) == 48 + 32 + 36


@each
def test_row_breaks_are_text(name):
    net, inputs = model(name), collate(samples(name)[:1])
    rows = family_of(net).spans(net, inputs)[0].grid[1]
    reduced = foveate.reduce(net, inputs, Random(keep=3))
    ids = reduced["input_ids"][0].tolist()
    assert (ids.count(111), ids.count(112), ids.count(120)) == (rows - 1, 1, 3)


@each
def test_layers_count_back_from_the_one_that_is_read(name):
    net = model(name)
    net.config.vision_feature_layer = -2
    assert family_of(net).read_layer(net) == 1
    net.config.vision_feature_layer = [1, 2]
    assert family_of(net).read_layer(net) == 1


@each
def test_smaller_pictures(name):
    net, inputs = model(name), collate(samples(name)[:1])
    (height, width), side = sizes(inputs)[0], 4 * BLOCK[name]
    reduced = foveate.reduce(net, inputs, Downsample(keep=12))
    pixels = inputs["pixel_values"][:, :, :height, :width]
    small = torch.nn.functional.interpolate(pixels, size=(4 * side, 3 * side), mode="bicubic", antialias=True)
    with torch.no_grad():
        (expected,) = net.get_image_features(small, image_sizes=torch.tensor([small.shape[-2:]])).pooler_output
    torch.testing.assert_close(reduced["mm_encoder_outputs"]["image"].pooler_output[0], expected, atol=1e-5, rtol=1e-5)


def test_llava_with_this_tower_is_no_llava():
    assert family_of(model("pixtral")) is all_families()["pixtral"]
    assert family_of(model("llava")) is all_families()["llava"]


def test_what_is_refused():
    net, inputs = model("pixtral"), collate(samples("pixtral"))
    with pytest.raises(InputError, match="image_sizes"):
        foveate.reduce(net, {k: x for k, x in inputs.items() if k != "image_sizes"}, Random(keep=3))
    net.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match="use 'full'"):
        foveate.reduce(net, inputs, Random(keep=3))


def test_a_lone_token():
    """Stock Mistral 3 squeezes it away, LLaVA with the same tower does not."""
    net, inputs = model("mistral3"), collate(samples("mistral3"))
    with pytest.raises(BudgetError, match="keep at least 2 tokens of each image"):
        foveate.reduce(net, inputs, "downsample", keep=1)
    assert all(len(chosen) == 2 for chosen in foveate.reduce(net, inputs, "downsample", keep=2).selection)
    net, inputs = model("pixtral"), collate(samples("pixtral"))
    assert all(len(chosen) == 1 for chosen in foveate.reduce(net, inputs, "downsample", keep=1).selection)
