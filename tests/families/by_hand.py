"""What families must give, worked out the long way: eager attention maps, and the pixels that a token depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.encoder import EncoderReducer
from foveate.core.probes import Attention
from foveate.families import family_of


@torch.no_grad()
def received(tower: Any, layer: int = -1, **inputs: Any) -> Tensor:
    """Return the attention that each patch gets in an eager tower, ``[R, P]``."""
    maps = tower(**inputs, output_attentions=True, return_dict=True).attentions[layer]
    return maps.float().mean(dim=(1, 2))


def merged(values: Tensor, grid: tuple[int, int], block: int) -> list[float]:
    """Average the values ``[P]`` of a raster of patches over its blocks, one by one."""
    table = values.reshape(grid)
    return [
        float(table[r : r + block, c : c + block].mean())
        for r in range(0, grid[0], block)
        for c in range(0, grid[1], block)
    ]


@torch.no_grad()
def saliency(net: Any, inputs: dict[str, Tensor], probe: Any = Attention()) -> list[Tensor]:  # noqa: B008
    """Return what a family reads, per crop."""
    family = family_of(net)
    return family.encode(net, inputs, family.spans(net, inputs), (probe,)).probe(probe)


def check_boxes(net: Any, inputs: dict[str, Tensor], sizes: list[tuple[int, int]]) -> int:
    """Check that each token depends on the pixels of its box and no others, once patches do not attend to each other.

    `sizes` are height and width of each picture. Returns how many tokens were checked.
    """
    for name, module in net.model.vision_tower.named_modules():
        if name.endswith(("out_proj", "o_proj")):
            for parameter in module.parameters():
                parameter.data.zero_()
    family, pixels = family_of(net), inputs["pixel_values"].clone().requires_grad_()
    inputs = {**inputs, "pixel_values": pixels}
    spans = family.spans(net, inputs)
    tokens, checked = family.encode(net, inputs, spans, ()), 0
    for span, rows in zip(spans, tokens.hidden, strict=True):
        weights = torch.linspace(-1, 1, rows.shape[-1]) ** 3  # a plain sum would be blind behind a layer norm
        for crop in span.crops:
            (h, w), (height, width) = crop.grid, sizes[crop.encoder_row]
            for k, position in enumerate(crop.index.tolist()):
                (slope,) = torch.autograd.grad((rows[position] * weights).sum(), pixels, retain_graph=True)
                touched = slope.abs().sum(dim=1).nonzero()
                assert set(touched[:, 0].tolist()) == {crop.encoder_row}
                (top, left), (bottom, right) = touched[:, 1:].amin(0).tolist(), (touched[:, 1:].amax(0) + 1).tolist()
                r, c = divmod(k, w)
                assert (top, bottom) == (r * height // h, (r + 1) * height // h)
                assert (left, right) == (c * width // w, (c + 1) * width // w)
                checked += 1
    return checked


@dataclass(frozen=True)
class AtLast(EncoderReducer):
    """Acts inside the encoder, but only behind its last layer, where it keeps the first tokens."""

    name = "at_last"

    def schedule(self, size, count, layers):
        return [size] * (layers - 1) + [count]

    def step(self, inside, count):
        token = torch.arange(inside.sizes.shape[1]).expand_as(inside.sizes)
        return torch.where(token < count, token, -1), None


@torch.no_grad()
def check_inside(net: Any, inputs: dict[str, Tensor], features: Tensor, keep: int) -> None:
    """Check that a family runs its tower ``[R, N, C]`` with a method inside as it does without one."""
    family = family_of(net)
    tokens = family.encode_inside(net, inputs, family.spans(net, inputs), AtLast(keep=keep))
    for rows, expected in zip(tokens.hidden, features, strict=True):
        torch.testing.assert_close(rows[:keep], expected[:keep], atol=1e-5, rtol=1e-5)
