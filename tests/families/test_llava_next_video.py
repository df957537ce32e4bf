"""LLaVA-NeXT-Video: pooled frames, beside pictures as in LLaVA-NeXT."""

import pytest
import torch

import foveate
from foveate.core.probes import Attention
from foveate.families import family_of
from foveate.families.llava_next_video import _mean
from tiny import VIDEO, VISUALS, collate, model, sample, samples
from tiny_families.llava_next_video import FRAMES


def test_spans_in_reading_order():
    net, (film, picture, _) = model("llava_next_video"), VISUALS["llava_next_video"]
    inputs = collate([sample(2, picture, 1, film, 3), sample(1, film, 2, picture, 2, film, 1)])
    spans = family_of(net).spans(net, inputs)
    assert [(s.kind, s.sample, s.ordinal) for s in spans] == [
        ("image", 0, 0), ("video", 0, 1), ("video", 1, 0), ("image", 1, 1), ("video", 1, 2),
    ]  # fmt: skip
    videos = [s for s in spans if s.kind == "video"]
    assert [c.encoder_row for s in videos for c in s.crops] == list(range(3 * FRAMES))
    for span in videos:
        assert (inputs["input_ids"][span.sample, span.columns] == VIDEO).all()
        assert [c.grid for c in span.crops] == [(4, 4)] * FRAMES
        assert len(span.separators()) == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_of_frames_is_averaged_over_the_windows_of_the_pooling(attention):
    net, eager = model("llava_next_video", attention), model("llava_next_video", "eager")
    inputs = collate(samples("llava_next_video"))
    family = family_of(net)
    spans = family.spans(net, inputs)
    got = iter(family.encode(net, inputs, spans, (Attention(),)).probe(Attention()))
    frames = inputs["pixel_values_videos"].flatten(0, 1)
    maps = eager.model.vision_tower(frames, output_attentions=True).attentions[-2].mean(1)[:, 0, 1:].reshape(-1, 8, 8)
    for span in spans:
        for crop in span.crops:
            values = next(got)
            if span.kind == "video":
                m = maps[crop.encoder_row]
                expected = [float(m[r : r + 2, c : c + 2].mean()) for r in range(0, 8, 2) for c in range(0, 8, 2)]
                torch.testing.assert_close(values, torch.tensor(expected), atol=1e-7, rtol=1e-4)


def test_windows_leave_an_odd_border_out():
    values = torch.arange(2 * 25).float().reshape(2, 25)
    pooled = torch.nn.functional.avg_pool2d(values.reshape(2, 1, 5, 5), 2).flatten(1)
    assert torch.equal(_mean(values, 5, 2), pooled)
    assert torch.equal(_mean(values[..., None].expand(-1, -1, 3), 5, 2), pooled[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize("mode", ["average", "max"])
def test_frames_of_smaller_pictures(mode):
    net, (film, *_) = model("llava_next_video"), VISUALS["llava_next_video"]
    if mode == "max":
        net.model.vision_resampler.pool = torch.nn.MaxPool2d(2, 2)
    inputs = collate([sample(2, film, 3)])
    with torch.no_grad():
        reduced = foveate.reduce(net, inputs, "downsample", keep=4 * FRAMES)
        small = torch.nn.functional.interpolate(
            inputs["pixel_values_videos"].flatten(0, 1), size=(16, 16), mode="bicubic", antialias=True
        )
        features = net.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
        pooled = net.model.vision_resampler(features.hidden_states[-2][:, 1:])
        expected = net.model.multi_modal_projector(pooled).flatten(0, 1)
    (embeds,) = reduced["mm_encoder_outputs"]["video"].pooler_output
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)
