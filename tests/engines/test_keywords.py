"""Keywords of `forward` that run along the prompt or name its columns follow what is dropped."""

import inspect

import pytest
import torch

import foveate
from foveate.core.errors import InputError
from foveate.engines.transformers.keywords import ROLES
from foveate.families import family_of
from tiny import FAMILIES, collate, in_depth, model, sample, samples

families = [pytest.param(name, marks=in_depth(name)) for name in FAMILIES]
FREE = {
    "self", "kwargs", "inputs_embeds", "use_cache", "cache", "past_key_values", "mm_encoder_outputs",
    "vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy", "vision_aspect_ratio",
    "output_attentions", "output_hidden_states", "return_dict", "cache_position", "rope_deltas",
    "interpolate_pos_encoding",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_keyword_has_a_role_or_is_free(family):
    net = model(family)
    known = family_of(net)
    pictures = {*known.inputs, *known.side_inputs, "image_sizes", "pixel_values_videos", "pixel_values_images"}
    names = set(inspect.signature(type(net).forward).parameters)
    prefixes = ("pixel", "image_", "video_", "spatial", "second_per", "batch_num")
    pixels = {name for name in names if name.startswith(prefixes)}
    assert names - pictures - pixels - FREE - {*ROLES} == set()


def prompts(family, count=1):
    inputs = collate(samples(family)[:count])
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] < 110)
    labels = torch.where(text, inputs["input_ids"], -100)
    labels[:, 0] = -100
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_shifted_labels_have_the_loss_of_labels(family, count):
    net = model(family)
    inputs = prompts(family, count)
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    plain = net(**inputs).loss
    if not torch.allclose(net(**inputs, shift_labels=shifted).loss, plain):
        pytest.skip("the stock model does not read shift_labels")
    with foveate.attach(net, "uniform" if family != "generic" else "divprune", keep=0.3):
        torch.testing.assert_close(net(**inputs, shift_labels=shifted).loss, net(**inputs).loss)


@pytest.mark.parametrize("family", families)
@torch.no_grad()
def test_columns_by_number(family):
    net, inputs = model(family), collate(samples(family)[:1])
    length = inputs["input_ids"].shape[1]
    text = (inputs["input_ids"][0] < 110).nonzero().flatten()
    wanted = torch.cat([text[:2], text[-2:], torch.tensor([-1])])
    with foveate.attach(net, "uniform" if family != "generic" else "divprune", keep=0.3):
        every = net(**inputs).logits[0]
        found = net(**inputs, logits_to_keep=wanted).logits[0]
    ours = foveate.reduce(model(family), inputs, "uniform" if family != "generic" else "divprune", keep=0.3)
    place = {int(c): i for i, c in enumerate(ours.compaction.columns[0])}
    torch.testing.assert_close(found, every[[place[int(c) % length] for c in wanted]])


@torch.no_grad()
def test_columns_that_are_dropped_or_lie_elsewhere():
    net = model("llava")
    one, several = collate(samples("llava")[:1]), collate(samples("llava"))
    with foveate.attach(net, "uniform", keep=9):
        image = (one["input_ids"][0] > 110).nonzero().flatten()
        columns = foveate.reduce(model("llava"), one, "uniform", keep=9).compaction.columns[0].tolist()
        dropped = next(int(c) for c in image if int(c) not in columns)
        before = max(i for i, c in enumerate(columns) if c <= dropped)
        found = net(**one, logits_to_keep=torch.tensor([dropped])).logits[0, 0]
        torch.testing.assert_close(found, net(**one).logits[0, before])
        apart = collate([sample(60, "image", "image", 5, seed=1), sample(80, "image", 5, seed=2)])
        with pytest.raises(InputError, match="elsewhere in each compact prompt"):
            net(**apart, logits_to_keep=torch.tensor([50]))  # text of both, with more images behind it in one
        for strange in (torch.ones(4, dtype=torch.bool), torch.ones(1, 2).long(), torch.tensor([0.5]), "all"):
            with pytest.raises(InputError, match="logits_to_keep is a number of columns or a vector"):
                net(**one, logits_to_keep=strange)
        last = net(**several).logits[:, -2:]
        torch.testing.assert_close(net(**several, logits_to_keep=torch.tensor([-2, -1])).logits, last)
        torch.testing.assert_close(net(**several, logits_to_keep=2).logits, last)


@torch.no_grad()
def test_a_number_counts_the_columns_that_are_left():
    net, inputs = model("llava"), collate(samples("llava"))
    with foveate.attach(net, "uniform", keep=9):
        every = net(**inputs).logits
        for count in (1, 5, 30):
            torch.testing.assert_close(net(**inputs, logits_to_keep=count).logits, every[:, -count:])
        for count in (0, inputs["input_ids"].shape[1]):
            torch.testing.assert_close(net(**inputs, logits_to_keep=count).logits, every)


@torch.no_grad()
def test_unknown_tensors_along_the_prompt_are_compacted():
    net, inputs = model("llava"), collate(samples("llava"))
    batch, length = inputs["input_ids"].shape
    index = torch.arange(length)
    extra = {
        "weights": index.expand(batch, -1).clone(), "several": index.expand(2, batch, -1).clone(),
        "wide": index[None, :, None].expand(batch, -1, 3).clone(), "shared": index[None].clone(),
        "other": torch.ones(7), "scalar": torch.tensor(3.0), "text": "x",
    }  # fmt: skip
    out = foveate.reduce(net, {**inputs, **extra}, "uniform", keep=9)
    columns = out.compaction.columns.clamp(min=0)
    assert torch.equal(out["weights"], columns)
    assert torch.equal(out["shared"], columns)
    assert torch.equal(out["several"], columns.expand(2, -1, -1))
    assert torch.equal(out["wide"], columns[:, :, None].expand(-1, -1, 3))
    assert (out["text"], float(out["scalar"]), out["other"].tolist()) == ("x", 3.0, [1.0] * 7)


def test_shifted_labels_of_another_shape_are_refused():
    net, inputs = model("llava"), collate(samples("llava")[:1])
    with pytest.raises(InputError, match="shift_labels has the shape of input_ids"):
        foveate.reduce(net, {**inputs, "shift_labels": torch.zeros(1, 3, dtype=torch.long)}, "uniform", keep=9)
