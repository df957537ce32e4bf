import pytest
import torch
from by_hand import check_boxes, merged, received, saliency

import foveate
from foveate.core.errors import InputError
from foveate.families import family_of
from foveate.methods import Random
from tiny import IMAGE, Visual, collate, model, sample, samples
from tiny_families.ovis2 import SIDE


def test_attention_is_averaged_over_the_merged_patches():
    net, inputs = model("ovis2", "eager"), collate(samples("ovis2"))
    patches = received(net.model.vision_tower, pixel_values=inputs["pixel_values"])
    for values, row in zip(saliency(net, inputs), patches, strict=True):
        torch.testing.assert_close(values, torch.tensor(merged(row, (8, 8), 2)))


def test_tokens_are_where_their_boxes_are():
    net, inputs = model("ovis2"), collate([sample(1, Visual("ovis2", (1, 2)), 2, Visual("ovis2", (1, 1)), 1)])
    assert check_boxes(net, inputs, [(32, 32)] * 4) == 4 * SIDE**2


@pytest.mark.parametrize("tiles", [(1, 1), (1, 2), (3, 1), (2, 3)])
def test_markers_tell_which_tiles_belong_together(tiles):
    net = model("ovis2")
    inputs = collate([sample(4, Visual("ovis2", (2, 2)), 2, Visual("ovis2", tiles), 3)])
    first, span = family_of(net).spans(net, inputs)
    rows, columns = tiles
    count = rows * columns if rows * columns > 1 else 0
    assert span.grid == (1 + count, SIDE, SIDE)
    assert [c.encoder_row for c in first.crops + span.crops] == list(range(5 + 1 + count))
    boxes = [(j / columns, i / rows, (j + 1) / columns, (i + 1) / rows) for i in range(rows) for j in range(columns)]
    assert [c.box for c in span.crops] == [(0.0, 0.0, 1.0, 1.0), *(boxes if count else [])]
    assert (inputs["input_ids"][0, span.columns] == IMAGE).all()
    assert len(span) == (1 + count) * SIDE**2


def test_pictures_without_markers_are_images():
    net, inputs = model("ovis2"), collate([sample(1, Visual("ovis2", (1, 2)), 2)])
    unmarked = (inputs["input_ids"] < 111) | (inputs["input_ids"] > 115)
    inputs |= {k: inputs[k][unmarked][None] for k in ("input_ids", "attention_mask")}
    assert [len(s) for s in family_of(net).spans(net, inputs)] == [SIDE**2] * 3


def test_markers_get_their_own_embeddings():
    net, inputs = model("ovis2"), collate(samples("ovis2"))
    seen = []
    hook = net.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    reduced = foveate.reduce(net, inputs, Random(keep=9))
    with torch.no_grad():
        net(**reduced)
    hook.remove()
    for marker in range(5):
        places = reduced["input_ids"] == 111 + marker
        assert (seen[0][places] == net.model.visual_embeddings_table.weight[35 + marker]).all()


def test_too_few_pictures():
    net, inputs = model("ovis2"), collate(samples("ovis2"))
    with pytest.raises(InputError, match=r"placeholders for 10 overviews and tiles, but 9"):
        foveate.reduce(net, {**inputs, "pixel_values": inputs["pixel_values"][:-1]}, Random(keep=9))
