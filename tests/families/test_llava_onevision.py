"""LLaVA-OneVision: the mosaic as the model packs and scales it, frames as it pools them."""

import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

import foveate
from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Attention, Keys
from foveate.families import family_of
from tiny import IMAGE, VISUALS, Visual, collate, model, sample, samples
from tiny_families.llava_next import PINPOINTS
from tiny_families.llava_next_video import FRAMES
from tiny_families.llava_onevision import SCALING

SIDE, PIXELS = 8, 32
SIZES = [(24, 64), (64, 20), (64, 64), (60, 52), (31, 33), (10, 100), (7, 5), (33, 64), (500, 333), (64, 45)]


def spans_of(net, *sizes):
    inputs = collate([sample(*[x for size in sizes for x in (2, Visual("llava_onevision", size))], 3)])
    return family_of(net).spans(net, inputs)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_lie_where_the_model_puts_them(size):
    net = model("llava_onevision")
    first, span = spans_of(net, (40, 64), size)
    count, before = (image_size_to_num_patches(list(s), PINPOINTS, PIXELS) for s in (size, (40, 64)))
    # Each patch tells its place in the mosaic (row, column); scaled, a token tells where its middle lies.
    best = {3: None, 5: (2, 2)}[count] or ((1, 2) if size[1] > size[0] else (2, 1))
    own = torch.arange(SIDE).float()
    place = torch.stack(torch.meshgrid(own, own, indexing="ij"), -1).flatten(0, 1)
    tiles = [place - 1000] + [place + SIDE * torch.tensor([r, c]) for r in range(best[0]) for c in range(best[1])]
    (packed,), _ = net.model.pack_image_features(
        [torch.stack(tiles)], torch.tensor([size]), torch.tensor([-1.0, -1.0]), SCALING
    )
    newlines = (packed == -1).all(1)
    assert len(span) == len(packed)
    assert span.separators().tolist() == newlines.nonzero().flatten().tolist()
    assert torch.equal(packed[span.crops[0].index], place - 1000)
    seen = span.crops[0].index.tolist()
    for crop in span.crops[1:]:
        row, column = divmod(crop.encoder_row - before - 1, best[1])
        (top, left), (bottom, right) = packed[crop.index].amin(0), packed[crop.index].amax(0)
        # Patch i reaches from i - 1/2 to i + 1/2.
        assert row * SIDE - 0.5 <= top <= bottom < (row + 1) * SIDE - 0.5
        assert column * SIDE - 0.5 <= left <= right < (column + 1) * SIDE - 0.5
        h, w = crop.grid
        assert len(crop) == h * w
        grid = packed[crop.index].reshape(h, w, 2)
        assert (grid[1:, :, 0] > grid[:-1, :, 0]).all()
        assert (grid[:, 1:, 1] > grid[:, :-1, 1]).all()
        seen += crop.index.tolist()
    assert sorted(seen) == (~newlines).nonzero().flatten().tolist()
    area = sum((c.box[2] - c.box[0]) * (c.box[3] - c.box[1]) for c in span.crops[1:])
    assert area == pytest.approx(1.0)
    for separator, (start, stop) in zip(span.separators().tolist(), span.extents, strict=True):
        assert stop == separator
        assert start == SIDE**2 or newlines[start - 1]
    assert first.crops[0].encoder_row == 0


def test_large_mosaics_are_scaled_and_small_ones_are_not():
    net = model("llava_onevision")
    small, large = spans_of(net, (24, 64), (64, 64))
    assert [c.grid for c in small.crops[1:]] == [(6, 8), (6, 8)]
    # sqrt(256 / (2 * 64)) = 1.41 > 1.1, so 16 rows become 11, of which the first six have their middle in row one.
    assert [c.grid for c in large.crops[1:]] == [(5, 5), (5, 6), (6, 5), (6, 6)]
    assert large.crops[1].box == (0, 0, 5 / 11, 5 / 11)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_is_scaled_as_features_are(attention):
    net, eager = model("llava_onevision", attention), model("llava_onevision", "eager")
    inputs = collate(samples("llava_onevision"))
    family = family_of(net)
    spans = family.spans(net, inputs)
    tokens = family.encode(net, inputs, spans, (Attention(), Keys()))
    counts = [image_size_to_num_patches(s.tolist(), PINPOINTS, PIXELS) for s in inputs["image_sizes"]]
    tiles = torch.cat([x[:n] for x, n in zip(inputs["pixel_values"], counts, strict=True)])
    received = [
        eager.model.vision_tower(x, output_attentions=True).attentions[-1].mean((1, 2))
        for x in (tiles, inputs["pixel_values_videos"].flatten(0, 1))
    ]
    # The model's own packing and pooling, on saliency in the place of features.
    packed, _ = net.model.pack_image_features(
        list(torch.split(received[0][..., None], counts)), inputs["image_sizes"], torch.tensor([-1.0]), SCALING
    )
    pooled = net.model.apply_pooling(received[1][..., None]).reshape(-1, FRAMES * 16, 1)
    images, videos, crop = iter(packed), iter(pooled), 0
    for span in spans:
        expected = next(images if span.kind == "image" else videos)
        for part in span.crops:
            torch.testing.assert_close(tokens.probe(Attention())[crop], expected[part.index, 0], atol=1e-6, rtol=1e-4)
            assert tokens.probe(Keys())[crop].shape == (len(part), 8)
            crop += 1


def test_videos():
    net, (film, *_) = model("llava_onevision"), VISUALS["llava_onevision"]
    inputs = collate([sample(2, film, 1, film, 2)])
    spans = family_of(net).spans(net, inputs)
    assert [(s.kind, s.grid, len(s)) for s in spans] == [("video", (FRAMES, 4, 4), 16 * FRAMES + 1)] * 2
    assert [c.encoder_row for s in spans for c in s.crops] == list(range(2 * FRAMES))
    for span in spans:
        assert span.separators().tolist() == [16 * FRAMES]
        assert span.extents == ((0, 16 * FRAMES),)
    for policy, kept in (("drop", 6), ("keep", 7), ("nonempty", 7)):
        reduced = foveate.reduce(net, inputs, "random", keep=6, separators=policy)
        assert [len(s) for s in reduced.selection] == [kept, kept]


def test_several_images_of_a_prompt_may_not_be_tiled():
    net = model("llava_onevision")
    ids = [5, *[IMAGE] * 65, 6, *[IMAGE] * 65, 7]
    alone = [8, *[IMAGE] * (64 + 6 * 17), 9]  # 24 x 64: two tiles, 6 of 8 rows of 16
    length = max(len(ids), len(alone))
    inputs = {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in (ids, alone)]),
        "pixel_values": torch.randn(3, 3, 3, PIXELS, PIXELS),
        "image_sizes": torch.tensor([[64, 64], [20, 40], [24, 64]]),
        "batch_num_images": torch.tensor([2, 1]),
    }
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    spans = family_of(net).spans(net, inputs)
    assert [len(s.crops) for s in spans] == [1, 1, 3]
    assert [c.encoder_row for s in spans for c in s.crops] == [0, 1, 2, 3, 4]
    assert [s.separators().tolist() for s in spans[:2]] == [[64], [64]]
    with foveate.attach(net, "vispruner", keep=9) as handle:
        out = net.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert [len(s) for row in handle.selections for s in row] == [9, 9, 9]
    assert torch.equal(out[:, :length], inputs["input_ids"])


def test_towers_with_cls_are_refused():
    net = model("llava_onevision")
    net.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match="'full'"):
        family_of(net).spans(net, collate(samples("llava_onevision")))
