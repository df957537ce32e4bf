"""Families of tiles: which token is made of which pixels, which attention it gets, and how tiles make up pictures."""

import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

import foveate
from foveate.core.errors import InputError
from foveate.core.probes import Attention, Keys
from foveate.families import family_of
from foveate.families.layout import WHOLE, nearest_arrangement
from foveate.families.smolvlm import BLOCKWISE
from tiny import VISUALS, collate, model, sample, samples
from tiny_families.base import Visual
from tiny_processors import IMAGE_TOKENS, PROCESSORS

TILED = ["internvl", "aya_vision", "cohere2_vision", "idefics3", "smolvlm", "perception_lm"]
TILE, BLOCK, PATCH = 4, 2, 4  # rows of tokens of a tile, of patches of a token, of pixels of a patch

every_family = pytest.mark.parametrize("name", TILED)


def pictures(inputs):
    """Return the pixels of all pictures that the encoder sees, images first, and masks of their pixels."""
    for key in ("pixel_values", "pixel_values_videos"):
        if key in inputs:
            pixels = inputs[key].flatten(0, -4)
            real = pixels.flatten(1).ne(0).any(1)
            mask = inputs.get("pixel_attention_mask", torch.ones(len(pixels), 32, 32)).reshape(-1, 32, 32)
            yield key, pixels[real], mask[real]


def by_hand(values):
    """Average the values ``[64]`` of 8 x 8 patches over the 2 x 2 of each token."""
    table = values.reshape(8, 8)
    return [float(table[r : r + 2, c : c + 2].mean()) for r in range(0, 8, 2) for c in range(0, 8, 2)]


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_is_that_of_each_token(name, attention):
    net, eager, inputs = model(name, attention), model(name, "eager"), collate(samples(name))
    family = family_of(net)
    expected = {}
    for key, pixels, mask in pictures(inputs):
        shown = torch.nn.functional.max_pool2d(mask[:, None].float(), PATCH)[:, 0] > 0
        extra = {"patch_attention_mask": shown} if name in ("idefics3", "smolvlm") else {}
        maps = family.encoder(eager)(pixels, output_attentions=True, **extra).attentions[-1].double()
        lead = maps.shape[-1] - 64
        assert lead == family.lead(net)
        kind = family.inputs[key]
        if lead:  # the row of [CLS]
            expected[kind] = [by_hand(m[:, 0, 1:].mean(0)) for m in maps]
        else:  # of those patches that the mask shows
            expected[kind] = [by_hand(m[:, s.flatten()].mean((0, 1))) for m, s in zip(maps, shown, strict=True)]
    spans = family.spans(net, inputs)
    tokens = family.encode(net, inputs, spans, (Attention(), Keys()))
    crops = [(span.kind, crop) for span in spans for crop in span.crops]
    assert len(crops) == sum(map(len, expected.values()))
    for (kind, crop), got, keys in zip(crops, tokens.probe(Attention()), tokens.probe(Keys()), strict=True):
        torch.testing.assert_close(got, torch.tensor(expected[kind][crop.encoder_row]), atol=1e-6, rtol=1e-4)
        assert keys.shape == (len(crop), 8)


@every_family
def test_a_token_depends_on_the_pixels_of_its_box_alone(name):
    """Once patches do not attend to each other."""
    net, inputs = model(name), collate(samples(name))
    family = family_of(net)
    for path, module in family.encoder(net).named_modules():
        if path.endswith(("out_proj", "projection_layer")):
            torch.nn.init.zeros_(module.weight)
    for key in ("pixel_values", "pixel_values_videos"):
        if key in inputs:
            inputs[key].requires_grad_()
    spans = family.spans(net, inputs)
    tokens = family.encode(net, inputs, spans, ())
    side = BLOCK * PATCH
    for span, rows in zip(spans, tokens.hidden, strict=True):
        pixels = inputs["pixel_values" if span.kind == "image" else "pixel_values_videos"]
        real = pixels.detach().flatten(0, -4).flatten(1).ne(0).any(1)
        weights = torch.linspace(-1, 1, rows.shape[-1]) ** 3  # a plain sum would be blind behind a norm
        for crop in span.crops:
            assert crop.grid == (TILE, TILE)
            for k in (0, 3, 6, 12, 15):
                (slope,) = torch.autograd.grad((rows[crop.index[k]] * weights).sum(), pixels, retain_graph=True)
                touched = slope.flatten(0, -4)[real].abs().sum(1).nonzero()
                assert set(touched[:, 0].tolist()) == {crop.encoder_row}
                (top, left), (bottom, right) = touched[:, 1:].amin(0).tolist(), touched[:, 1:].amax(0).tolist()
                r, c = divmod(k, TILE)
                assert (top, bottom + 1) == (r * side, (r + 1) * side)
                assert (left, right + 1) == (c * side, (c + 1) * side)


def spans_of(name, *parts):
    net, inputs = model(name), collate([sample(*parts, seed=4)])
    return family_of(net), family_of(net).spans(net, inputs)


@pytest.mark.parametrize("name", ["internvl", "aya_vision", "cohere2_vision"])
def test_tiles_make_up_pictures(name):
    one, three, five = VISUALS[name]
    # Pictures that touch, that stand apart, and one that ends the prompt.
    family, spans = spans_of(name, 2, five, three, one, 4, three, one, one, 1, three)
    assert [len(s.crops) for s in spans] == [5, 3, 1, 3, 1, 1, 3]
    assert [s.grid for s in spans] == [(len(s.crops), TILE, TILE) for s in spans]
    assert [c.encoder_row for s in spans for c in s.crops] == list(range(17))
    for span in spans:
        *tiles, overview = [crop.box for crop in span.crops]
        assert overview == WHOLE
        assert tiles == [None] * len(tiles)
    wide, high = family.located(spans[:2], (50, 60))[0], family.located(spans[:2], (60, 30))[1]
    assert [c.box for c in wide.crops[:4]] == [
        (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1),
    ]  # fmt: skip
    assert [c.box for c in high.crops] == [(0, 0, 1, 0.5), (0, 0.5, 1, 1), WHOLE]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_markers_tell_where_tiles_lie(name):
    wide, single, high = VISUALS[name]
    square = type(wide)(name, (2, 3))
    family, spans = spans_of(name, 1, square, wide, single, 3, high, single, single)
    assert [len(s.crops) for s in spans] == [7, 3, 1, 3, 1, 1]
    thirds = (0.0, 1 / 3, 2 / 3, 1.0)
    assert [c.box for c in spans[0].crops] == [
        *[(thirds[c], r / 2, thirds[c + 1], (r + 1) / 2) for r in range(2) for c in range(3)], WHOLE,
    ]  # fmt: skip
    assert [c.box for c in spans[1].crops] == [(0, 0, 0.5, 1), (0.5, 0, 1, 1), WHOLE]
    assert [c.box for c in spans[3].crops] == [(0, 0, 1, 0.5), (0, 0.5, 1, 1), WHOLE]
    # The boxes are known without the picture's size.
    assert family.located(spans, (10, 1000)) == spans


def test_perception_lm_has_the_overview_first():
    net, (film, picture, _) = model("perception_lm"), VISUALS["perception_lm"]
    family, inputs = family_of(net), collate([sample(1, film, 2, picture, 3, picture)])
    spans = family.spans(net, inputs)
    assert [(s.kind, s.ordinal, len(s.crops)) for s in spans] == [("video", 0, 2), ("image", 1, 3), ("image", 2, 3)]
    assert [c.encoder_row for s in spans for c in s.crops] == [0, 1, 0, 1, 2, 3, 4, 5]
    assert [c.box for c in spans[0].crops] == [WHOLE, WHOLE]
    assert [c.box for c in spans[1].crops] == [WHOLE, None, None]
    located = family.located(spans, (30, 60))
    assert [c.box for c in located[2].crops] == [WHOLE, (0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert located[0] is spans[0]


def test_the_arrangement_is_the_one_that_the_processor_took():
    for height in range(20, 300, 7):
        for width in range(20, 300, 9):
            columns, rows = get_optimal_tiled_canvas((height, width), (32, 32), 1, 12)
            assert nearest_arrangement(rows * columns, width / height) == (rows, columns)


@pytest.mark.parametrize("name", TILED)
def test_placeholders_that_are_no_tiles(name):
    net, inputs = model(name), collate(samples(name))
    place = (inputs["input_ids"][1] == net.config.image_token_id).nonzero()[0]
    inputs["input_ids"][1, place] = 5
    with pytest.raises(InputError, match="image placeholder tokens"):
        family_of(net).spans(net, inputs)


@pytest.mark.parametrize("name", ["internvl", "idefics3"])
def test_pictures_of_other_prompts(name):
    net, (_, two, _) = model(name), VISUALS[name]
    inputs, others = collate([sample(1, two, 2)]), collate([sample(1, two, 2, two, 2)])
    inputs |= {key: x for key, x in others.items() if key.startswith("pixel")}
    with pytest.raises(InputError, match="pass the pictures of these prompts"):
        foveate.reduce(net, inputs, "random", keep=5)


def test_options_of_one_call_are_refused():
    net, inputs = model("internvl"), collate(samples("internvl"))
    with pytest.raises(InputError, match="vision_feature_layer from the model's configuration"):
        foveate.reduce(net, {**inputs, "vision_feature_layer": -2}, "random", keep=5)


@pytest.mark.parametrize("layer", [-1, -2, 1])
@torch.no_grad()
def test_internvl_reads_the_layer_that_the_projector_reads(layer):
    net, inputs = model("internvl", "eager"), collate(samples("internvl")[:1])
    net.config.vision_feature_layer = layer
    family = family_of(net)
    maps = net.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    (got,) = family.encode(net, inputs, family.spans(net, inputs), (Attention(),)).probe(Attention())
    read = {-1: 2, -2: 1, 1: 0}[layer]
    torch.testing.assert_close(got, torch.tensor(by_hand(maps[read][0, :, 0, 1:].mean(0))))


@pytest.mark.parametrize("name", ["aya_vision", "idefics3"])
@pytest.mark.parametrize("sizes", [[(90, 30), (32, 32)], [(40, 80)], [(30, 60), (64, 60), (20, 90)]], ids=str)
def test_prompts_of_the_real_processor(name, sizes):
    net, family, processor = model(name), family_of(model(name)), PROCESSORS[name]()
    net.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[name])
    images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
    text = "what " + "<image> is ".join([""] * (len(sizes) + 1)) + "this ?"
    inputs = processor(images=images, text=text, return_tensors="pt")
    spans = family.spans(net, inputs)
    assert len(spans) == len(sizes)
    for span, (width, height) in zip(spans, sizes, strict=True):
        (span,) = family.located([span], (height, width))
        *tiles, overview = [crop.box for crop in span.crops]
        assert overview == WHOLE
        if tiles:
            assert sum((b[2] - b[0]) * (b[3] - b[1]) for b in tiles) == pytest.approx(1.0)
            # No tile is more than twice as wide as it is high, or the other way round.
            left, top, right, bottom = tiles[0]
            assert 0.5 <= (right - left) * width / ((bottom - top) * height) <= 2
    plain = net.generate(**inputs, max_new_tokens=3, do_sample=False)
    with foveate.attach(net, "vispruner", keep=6) as handle:
        out = net.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape == plain.shape
    assert [len(s) for s in handle.selections[0]] == [6] * len(sizes)


@pytest.mark.parametrize("version", BLOCKWISE)
def test_smolvlm_of_two_versions_takes_multiples_of_a_block(monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    net, inputs = model("smolvlm"), collate(samples("smolvlm"))
    counts = []
    for keep in (PATCH, 3 * PATCH):
        reduced = foveate.reduce(net, inputs, "uniform", keep=keep)
        counts.append((reduced["input_ids"] == net.config.image_token_id).sum(1).tolist())
        assert net(**reduced).logits.isfinite().all()
    assert counts == [[4, 8, 4], [12, 24, 12]]
    with pytest.raises(InputError, match=rf"\[6, 12, 6\] visual tokens, .* {version} only takes multiples of 4 "):
        foveate.reduce(net, inputs, "uniform", keep=6)


@pytest.mark.parametrize(("size", "tokens"), [((20, 1500), 64), ((1500, 20), 72)])
def test_llava_next_takes_pictures_of_whose_tiles_nothing_is_left(size, tokens):
    net, inputs = model("llava_next"), collate([sample(3, Visual("llava_next", size), 4)])
    assert int((inputs["input_ids"] == net.config.image_token_id).sum()) == tokens
    with foveate.attach(net, "vispruner", keep=2) as handle:
        net.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert handle.selections[0][0].kept.shape == (2,)
    whole = foveate.reduce(net, inputs, "random", keep=1.0)
    assert torch.equal(net(**whole).logits, net(**inputs).logits)
