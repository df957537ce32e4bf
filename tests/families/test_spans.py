"""Where families say their visual tokens are, against what the models themselves do."""

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from foveate import list_families
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.spans import Span
from foveate.families import all_families, family_of
from foveate.families.batches import joined_outputs, placeholder_columns
from foveate.families.tower import crop_rows
from foveate.methods import VisPruner
from tiny import IMAGE, VIDEO, Visual, collate, model, sample, samples
from tiny_families.llava_next import PINPOINTS

SIDE, PIXELS = 8, 32

SIZES = [(24, 64), (64, 20), (64, 64), (20, 64), (60, 52), (31, 33), (100, 10), (10, 100), (7, 5), (33, 64), (500, 333)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_llava_next_packs_as_the_model_does(size):
    net = model("llava_next")
    family, inputs = (
        family_of(net),
        collate([sample(3, Visual("llava_next", (40, 64)), 1, Visual("llava_next", size), 2)]),
    )
    _, span = family.spans(net, inputs)
    crops = image_size_to_num_patches(list(size), PINPOINTS, PIXELS)
    first = image_size_to_num_patches([40, 64], PINPOINTS, PIXELS)
    # Every patch has a number of its own; newline vectors are -1.
    numbers = torch.arange(crops * SIDE**2).reshape(crops, SIDE**2, 1).float()
    (packed,), _ = net.model.pack_image_features([numbers], torch.tensor([size]), "default", torch.tensor([-1.0]))
    packed = packed.flatten().long()
    assert len(span) == len(packed)
    assert span.separators().tolist() == (packed == -1).nonzero().flatten().tolist()
    rows = torch.cat([torch.full((first, SIDE**2), -9), numbers[..., 0].long()])  # the other image's crops come first
    seen = []
    for crop in span.crops:
        assert packed[crop.index].tolist() == crop_rows(rows, crop, (SIDE, SIDE)).tolist()
        assert crop.grid[0] * crop.grid[1] == len(crop)
        assert crop.index.tolist() == sorted(crop.index.tolist())
        seen += crop.index.tolist()
    # Crops share no token, and hold all but the newlines: patches of the padded band are in none.
    assert len(seen) == len(set(seen)) == len(span) - len(span.separators())
    for separator, (start, stop) in zip(span.separators().tolist(), span.extents, strict=True):
        assert stop == separator
        assert (packed[start:stop] >= 0).all()
        assert start == SIDE**2 or packed[start - 1] == -1
    # The boxes of the tiles cover the picture once.
    assert span.crops[0].box == (0.0, 0.0, 1.0, 1.0)
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in (c.box for c in span.crops[1:]))
    assert area == pytest.approx(1.0)


def test_llava_spans():
    net, inputs = model("llava"), collate(samples("llava"))
    spans = family_of(net).spans(net, inputs)
    assert [(s.kind, s.sample, s.ordinal) for s in spans] == [
        ("image", 0, 0), ("image", 1, 0), ("image", 1, 1), ("image", 2, 0),
    ]  # fmt: skip
    for i, span in enumerate(spans):
        assert span.grid == (1, SIDE, SIDE)
        assert (inputs["input_ids"][span.sample, span.columns] == IMAGE).all()
        assert [c.encoder_row for c in span.crops] == [i]
        assert len(span.separators()) == 0
    every = {(s.sample, int(c)) for s in spans for c in s.columns}
    assert len(every) == int((inputs["input_ids"] == IMAGE).sum())


def test_video_llava_spans_in_reading_order():
    net = model("video_llava")
    picture, film = Visual("video_llava", "image"), Visual("video_llava", "video")
    inputs = collate([sample(2, picture, 1, film, 3, picture, 1), sample(1, film, 2, picture, 2)])
    spans = family_of(net).spans(net, inputs)
    assert [(s.kind, s.sample, s.ordinal) for s in spans] == [
        ("image", 0, 0), ("video", 0, 1), ("image", 0, 2), ("video", 1, 0), ("image", 1, 1),
    ]  # fmt: skip
    assert [[c.encoder_row for c in s.crops] for s in spans] == [[0], [0, 1], [1], [2, 3], [2]]
    for span in spans:
        token = IMAGE if span.kind == "image" else VIDEO
        assert (inputs["input_ids"][span.sample, span.columns] == token).all()
        assert span.columns.tolist() == sorted(span.columns.tolist())
        frames = [0, SIDE**2 + 1] if span.kind == "video" else []
        assert span.separators().tolist() == frames
        assert list(span.extents) == [(f + 1, f + 1 + SIDE**2) for f in frames]


@pytest.mark.parametrize("name", ["llava", "llava_next", "video_llava"])
def test_probes_are_those_of_the_span_in_the_encoder(name):
    """Cutting crops out of the encoder's output gives each token the feature that the projector reads for it."""
    net, inputs = model(name), collate(samples(name))
    family = family_of(net)
    spans = family.spans(net, inputs)
    with torch.no_grad():
        tokens = family.encode(net, inputs, spans, VisPruner(keep=1).needs)
    features, attention = (tokens.probe(p) for p in VisPruner(keep=1).needs)
    crop = 0
    for span, hidden in zip(tokens.spans, tokens.hidden, strict=True):
        assert hidden.shape == (len(span), 32)
        for part in span.crops:
            assert torch.equal(hidden[part.index], features[crop])
            assert attention[crop].shape == (len(part),)
            assert (attention[crop] > 0).all()
            crop += 1
    assert crop == len(features)


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([[5, 9, 9, 5]], [3], r"hold 2 image placeholder tokens, but the 1 image\(s\) passed make 3"),
        ([[9, 9, 9, 5]], [2], "hold 3 image placeholder"),
        ([[9, 9, 5]], [2, 2], r"but the 2 image\(s\) passed make 4"),
        ([[9, 5], [9, 5]], [2], "hold 2 image"),  # no image spans two prompts
    ],
)
def test_placeholders_that_do_not_fit(ids, lengths, message):
    with pytest.raises(InputError, match=message):
        list(placeholder_columns(torch.tensor(ids), 9, lengths, "image"))


def test_images_that_touch():
    found = list(placeholder_columns(torch.tensor([[9, 9, 9], [9, 5, 9]]), 9, [1, 2, 2], "image"))
    assert [(row, columns.tolist()) for row, columns in found] == [(0, [0]), (0, [1, 2]), (1, [0, 2])]


def test_llava_next_with_cls_is_refused():
    net = model("llava_next")
    net.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModelError, match="'default'"):
        family_of(net).spans(net, collate(samples("llava_next")))


def test_joined_outputs_have_one_row_per_token():
    """`generate` repeats those of each prompt for several answers."""
    spans = [Span(kind, 0, 0, torch.arange(0), (1, 1, 1), ()) for kind in ("image", "video", "image")]
    embeds = [torch.randn(n, 3) for n in (6, 5, 9)]
    outputs = joined_outputs(spans, embeds)
    assert torch.equal(outputs["image"].pooler_output, torch.cat([embeds[0], embeds[2]])[:, None])
    assert torch.equal(outputs["video"].pooler_output, embeds[1][:, None])


def test_names():
    assert list_families() == list(all_families())
    assert {"llava", "llava_next", "video_llava"} <= set(list_families())
    for family in all_families().values():
        assert set(family.inputs.values()) <= {"image", "video"}
