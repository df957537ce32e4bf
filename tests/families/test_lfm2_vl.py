import pytest
import torch
from by_hand import merged, received, saliency

import foveate
from foveate.families import family_of
from foveate.methods import Downsample
from tiny import Visual, collate, model, sample, samples


def shapes(inputs):
    return [tuple(shape) for shape in inputs["spatial_shapes"].tolist()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_gets_no_attention_and_gives_none(attention):
    net, eager, inputs = model("lfm2_vl", attention), model("lfm2_vl", "eager"), collate(samples("lfm2_vl"))
    assert (inputs["pixel_attention_mask"] == 0).any()
    found = zip(saliency(net, inputs), inputs["pixel_values"], shapes(inputs), strict=True)
    for values, pixels, (h, w) in found:
        alone = received(
            eager.model.vision_tower, pixel_values=pixels[None, : h * w], spatial_shapes=torch.tensor([[h, w]]),
            pixel_attention_mask=torch.ones(1, h * w, dtype=torch.long),
        )  # fmt: skip
        torch.testing.assert_close(values, torch.tensor(merged(alone[0], (h, w), 2)))


def test_tokens_are_where_their_boxes_are():
    """A token depends on the 2 x 2 patches of its place and no others."""
    net, inputs = model("lfm2_vl"), collate(samples("lfm2_vl")[:2])
    for name, module in net.model.vision_tower.named_modules():
        if name.endswith("out_proj"):
            for parameter in module.parameters():
                parameter.data.zero_()
    family, pixels = family_of(net), inputs["pixel_values"].clone().requires_grad_()
    inputs = {**inputs, "pixel_values": pixels}
    spans = family.spans(net, inputs)
    assert [s.grid for s in spans] == [(1, h // 2, w // 2) for h, w in shapes(inputs)]
    for span, rows in zip(spans, family.encode(net, inputs, spans, ()).hidden, strict=True):
        (crop,), (_, width) = span.crops, span.grid[1:]
        for k, row in enumerate(rows):
            (slope,) = torch.autograd.grad((row * torch.linspace(-1, 1, 32)).sum(), pixels, retain_graph=True)
            touched = slope.abs().sum(-1).nonzero().tolist()
            r, c = divmod(k, width)
            patches = [(2 * r + i) * 2 * width + 2 * c + j for i in (0, 1) for j in (0, 1)]
            assert touched == [[crop.encoder_row, p] for p in patches]


def patches(picture, size):
    """Cut a picture ``[3, H, W]`` into rows of pixels as SigLIP 2's processor does, one patch after the other."""
    _, height, width = picture.shape
    return torch.stack(
        [
            picture[:, y : y + size, x : x + size].movedim(0, -1).flatten()
            for y in range(0, height, size)
            for x in range(0, width, size)
        ]
    )


def test_smaller_pictures():
    net, picture = model("lfm2_vl"), torch.randn(3, 32, 24, generator=torch.Generator().manual_seed(0))
    inputs = collate([sample(2, Visual("lfm2_vl", (16, 12)), 3)])
    inputs["pixel_values"] = patches(picture, 2)[None]
    (embeds,) = foveate.reduce(net, inputs, Downsample(keep=12))["mm_encoder_outputs"]["image"].pooler_output
    small = torch.nn.functional.interpolate(picture[None], size=(16, 12), mode="bicubic", antialias=True)[0]
    with torch.no_grad():
        (expected,) = net.get_image_features(
            patches(small, 2)[None], spatial_shapes=torch.tensor([[8, 6]]),
            pixel_attention_mask=torch.ones(1, 48, dtype=torch.long),
        ).pooler_output  # fmt: skip
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)
