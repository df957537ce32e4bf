"""Vision towers like CLIP's: running them up to the last layer that is read, and cutting their output into crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import UnsupportedModelError
from foveate.core.offload import tables, weights_at_hand
from foveate.core.probes import ClsToken, Features, LayerProbe, Probe
from foveate.core.spans import Crop
from foveate.core.tokens import VisualTokens
from foveate.families.layer_runs import layer_outputs
from foveate.families.layout import Grid
from foveate.families.taps import tap

EMBEDDINGS = ("patch_embed", "embeddings", "patch_conv")
"""What the classes of transformers and timm call the part of a vision tower that makes tokens of patches."""
MERGERS = ("merger", "deepstack_merger_list", "downsample", "head_linear")
"""What they call the parts of a vision tower behind its layers that lead to the LLM."""


def encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """Return the transformer layers of a vision encoder, wherever this version of transformers keeps them."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer", "blocks"):
            return module
    raise UnsupportedModelError(f"no transformer layers found in {type(encoder).__name__}")


def run_tower(
    tower: nn.Module,
    pixels: Tensor,
    feature_layers: Sequence[int],
    has_cls: bool,
    probes: Sequence[Probe],
    *,
    final: nn.Module | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[Probe, Tensor]]:
    """Run a CLIP-like vision tower up to the last layer that is read.

    Parameters
    ----------
    pixels
        ``[R, 3, height, width]``.
    feature_layers
        Indices into the tower's hidden states, as in ``config.vision_feature_layer``.
    has_cls
        Whether the first token is ``[CLS]``.
    final
        The norm behind the last layer, if the projector reads its output.

    Returns
    -------
    tuple
        Features ``[R, S, C]`` with the ``[CLS]`` row, and the values of the layer probes, each ``[R, N, ...]``.
    """
    layers = encoder_layers(tower)
    indices = feature_indices(layers, feature_layers)
    numbers = {p: p.numbers(len(layers), max(indices)) for p in probes if isinstance(p, LayerProbe)}
    watched: dict[nn.Module, list[LayerProbe]] = {}
    for probe, read in numbers.items():
        for i in read:
            watched.setdefault(attention_of(layers[i]), []).append(probe)
    last = max([i for read in numbers.values() for i in read], default=-1)
    running = [layers[i] for i in indices] if final is None else [final]
    running += [layers[last]] if last > max(indices) else []
    with tap(tower, watched, int(has_cls)) as taps:
        outputs = layer_outputs(tower, running, pixels, **kwargs)[: len(indices)]
    features = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    values: dict[Probe, Tensor] = {}
    for probe, read in numbers.items():
        rows = [torch.cat(taps.values(attention_of(layers[i]), probe)) for i in read]
        values[probe] = torch.stack(rows, dim=-1) if probe.stacked else rows[0]
    return features, values


def feature_indices(layers: nn.ModuleList, feature_layers: Sequence[int]) -> list[int]:
    """Return which layers make the hidden states with the given indices."""
    # Hidden state 0 is what goes into the first layer, so there is one more of them than layers.
    indices = [(i if i >= 0 else len(layers) + 1 + i) - 1 for i in feature_layers]
    if min(indices) < 0:
        raise UnsupportedModelError("features straight from the patch embedding (hidden state 0) have no layer to read")
    return indices


def attention_of(layer: nn.Module) -> nn.Module:
    """Return the attention module of a transformer layer."""
    for name, module in layer.named_children():
        if name in ("self_attn", "attn", "attention"):
            return module
    raise UnsupportedModelError(f"no attention module found in {type(layer).__name__}")


def crop_rows(x: Tensor, crop: Crop, grid: Grid) -> Tensor:
    """Cut a crop's tokens out of encoder rows ``[R, H * W, ...]`` with the encoder's grid ``(H, W)``."""
    row = x[crop.encoder_row]
    if crop.grid == grid:
        return row
    assert crop.grid is not None
    (top, left), (h, w) = crop.offset, crop.grid
    return row.reshape(*grid, *row.shape[1:])[top : top + h, left : left + w].flatten(0, 1)


def resized(picture: Tensor, size: Grid) -> Tensor:
    """Resize a picture ``[3, height, width]`` to some height and width, ``[1, 3, ...]``."""
    small = nn.functional.interpolate(
        picture[None].float(), size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return small.to(picture.dtype)


def resized_crops(
    tower: nn.Module,
    pixels: Tensor,
    crops: Sequence[Crop],
    grids: Sequence[Grid],
    patch: int,
    feature_layers: Sequence[int],
    has_cls: bool = True,
    final: nn.Module | None = None,
) -> list[Tensor]:
    """Encode crops from smaller pictures, so that each makes the given grid of tokens, ``[h * w, C]`` each."""
    results: list[Tensor] = []
    for crop, (h, w) in zip(crops, grids, strict=True):
        assert crop.grid is not None
        (top, left), (rows, columns) = crop.offset, crop.grid
        picture = pixels[
            crop.encoder_row, :, top * patch : (top + rows) * patch, left * patch : (left + columns) * patch
        ]
        small = resized(picture, (h * patch, w * patch))
        with weights_at_hand(tables(tower)):
            features, _ = run_tower(
                tower, small, feature_layers, has_cls, (), final=final, interpolate_pos_encoding=True
            )
        results.append(features[0, int(has_cls) :])
    return results


def with_cls(tokens: VisualTokens, cls: Tensor, probes: Sequence[Probe]) -> VisualTokens:
    """Add the ``[CLS]`` tokens ``[R, C]`` of the encoder's rows behind the hidden rows, if a method asked for them."""
    if ClsToken() not in probes:
        return tokens
    hidden = [
        torch.cat([x, cls[[crop.encoder_row for crop in span.crops]]])
        for x, span in zip(tokens.hidden, tokens.spans, strict=True)
    ]
    return replace(tokens, hidden=hidden, cls=True)


def token_planes(
    crops: Sequence[Crop], grid: Grid, features: Tensor, values: Mapping[Probe, Tensor]
) -> dict[Probe, list[Tensor]]:
    """Cut encoder features ``[R, H * W, C]`` and probe values into one tensor per crop."""
    planes: dict[Probe, list[Tensor]] = {Features(): [crop_rows(features.detach(), c, grid) for c in crops]}
    for probe, value in values.items():
        planes[probe] = [crop_rows(value, c, grid) for c in crops]
    return planes
