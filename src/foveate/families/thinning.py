"""Running a CLIP-like vision tower layer by layer, while a method thins its tokens out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.encoder import EncoderReducer, Inside
from foveate.core.errors import UnsupportedModelError
from foveate.core.grids import crop_budgets
from foveate.core.probes import LayerProbe, Members, Probe
from foveate.core.spans import Crop, Span
from foveate.families.layer_runs import layer_input
from foveate.families.layout import Grid
from foveate.families.taps import implementation_of, tap
from foveate.families.tower import attention_of, crop_rows, encoder_layers, feature_indices

_PARTS = {"layer_norm1", "self_attn", "layer_norm2", "mlp"}


def run_tower_inside(
    tower: nn.Module,
    pixels: Tensor,
    feature_layers: Sequence[int],
    lead: int,
    grid: Grid,
    spans: Sequence[Span],
    reducer: EncoderReducer,
) -> tuple[Tensor, dict[Probe, Tensor]]:
    """Run a CLIP-like vision tower up to the layer that the projector reads, with a method inside.

    Crops of equal size and budget run together, but each alone if a method asks for it. Patches of a row that are not
    in its crop, because they show padding, are attended to as ever, and no candidates.

    Parameters
    ----------
    pixels
        ``[R, 3, height, width]``.
    feature_layers
        Indices into the tower's hidden states: a single one, as layers hold different tokens.
    lead
        Tokens before the patches, such as ``[CLS]``.
    grid
        Rows and columns of patches.
    spans
        Whose crops these are.

    Returns
    -------
    tuple
        Features ``[R, S, C]``, in which each token that is left takes the place of its first patch and the other places
        are zero, and `Members` ``[R, N]``.
    """
    layers = encoder_layers(tower)
    indices = feature_indices(layers, feature_layers)
    _check(tower, layers, len(indices), reducer)
    hidden = layer_input(tower, layers[0], pixels)
    patches = torch.arange(grid[0] * grid[1]).expand(len(hidden), -1)
    work: dict[tuple[int, int, int], list[tuple[Crop, Tensor]]] = defaultdict(list)
    for span in spans:
        for crop, _, count in crop_budgets(span, reducer.keep, reducer.name):
            if count:
                alone = len(work) if reducer.alone else 0
                work[len(crop), min(count, len(crop)), alone].append((crop, crop_rows(patches, crop, grid)))
    features = torch.zeros_like(hidden)
    members = torch.full(patches.shape, -1, device=hidden.device)
    for (size, count, _), crops in work.items():
        row = torch.tensor([[crop.encoder_row] for crop, _ in crops], device=hidden.device)
        inner = torch.stack([index for _, index in crops]).to(hidden.device)
        is_inner = torch.zeros(len(inner), patches.shape[1], device=hidden.device).scatter(1, inner, 1.0)
        padding_first = lead + is_inner.argsort(dim=1, stable=True)
        order = torch.cat([torch.arange(lead, device=hidden.device).expand(len(inner), -1), padding_first], dim=1)
        in_front = hidden.shape[1] - size
        x, inside = _run(tower, layers[: indices[0] + 1], hidden[row, order], in_front, count, reducer)
        features[row, order[:, :lead]] = x[:, :lead]
        features[row, lead + inner.gather(1, inside.places)] = x[:, in_front:]
        members[row, inner] = inside.homes
    return features, {Members(): members}


def _run(
    tower: nn.Module, layers: nn.ModuleList, x: Tensor, lead: int, count: int, reducer: EncoderReducer
) -> tuple[Tensor, Inside]:
    """Run layers on ``[B, lead + N, C]``; returns ``[B, lead + count, C]``."""
    size = x.shape[1] - lead
    inside = Inside.start(len(x), size, lead, x.device)
    probes = [probe for probe in reducer.needs if isinstance(probe, LayerProbe)] if count < size else []
    with tap(tower, {attention_of(layer): probes for layer in layers if probes}, lead) as taps:
        layer: Any  # made of _PARTS
        for place, layer in enumerate(layers):
            attention = attention_of(layer)
            out, *_ = attention(hidden_states=layer.layer_norm1(x), attention_mask=_key_bias(inside, x, reducer))
            x = x + out
            inside.planes.update({probe: taps.values(attention, probe)[-1] for probe in probes})
            if probes and reducer.after == "attention":
                inside, x = inside.step(reducer, x, reducer.left(inside, count, place, len(layers)))
            x = x + layer.mlp(layer.layer_norm2(x))
            if probes and reducer.after == "mlp":
                inside, x = inside.step(reducer, x, reducer.left(inside, count, place, len(layers)))
    return x, inside


def _key_bias(inside: Inside, x: Tensor, reducer: EncoderReducer) -> Tensor | None:
    """Return what the attention logits of each key get on top, ``[B, 1, 1, S]``, once tokens have merged."""
    if not reducer.weighs_sizes or inside.sizes.shape[1] == inside.member.shape[1]:
        return None
    return nn.functional.pad(inside.sizes.log(), (inside.lead, 0))[:, None, None].to(x.dtype)


def _check(tower: nn.Module, layers: nn.ModuleList, features: int, reducer: EncoderReducer) -> None:
    parts = {name for name, _ in layers[0].named_children()}
    if parts != _PARTS:
        raise UnsupportedModelError(
            f"{reducer.name} runs the layers of a vision encoder part by part and knows those made of "
            f"{', '.join(sorted(_PARTS))}; {type(layers[0]).__name__} has {', '.join(sorted(parts))}: use a method of "
            "the stage 'before_llm', such as 'visionzip'"
        )
    if features > 1:
        raise UnsupportedModelError(
            f"{reducer.name} leaves other tokens in every layer, but this projector reads {features} layers at once: "
            "use a method of the stage 'before_llm', such as 'visionzip'"
        )
    attention = implementation_of(tower.config)
    if reducer.weighs_sizes and attention not in (None, "eager", "sdpa"):
        raise UnsupportedModelError(
            f"{reducer!r} adds to attention logits, which {attention!r} cannot do: set the vision tower to 'sdpa', or "
            f"the method's parameter for it to False (proportional=False)"
        )
