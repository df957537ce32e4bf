"""What a family of models must tell the engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.errors import InputError, UnsupportedModelError
from foveate.probes import Attention, Features, Probe, Reader, cls_row, layer_outputs, received, tap
from foveate.selection import Selection
from foveate.tokens import Crop, Span, VisualTokens

Grid = tuple[int, int]


class Family(ABC):
    """One VLM architecture: where its spans, grids and probes are, and how kept tokens reach the LLM."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of ``config.model_type`` that belong to the family."""
    inputs: ClassVar[Mapping[str, str]]
    """Model inputs that hold pixels, and the kind of span (``"image"``, ``"video"``) that each gives."""
    side_inputs: ClassVar[tuple[str, ...]] = ()
    """Further inputs that only the encoder reads."""
    notes: ClassVar[str] = ""

    @abstractmethod
    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        """Locate the spans of a batch from ids and sizes alone, sample by sample, left to right."""

    @abstractmethod
    def encode(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], probes: Sequence[Probe]
    ) -> VisualTokens:
        """Run the vision encoder and collect the probes."""

    @abstractmethod
    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        """Encode each crop of each span at a smaller grid ``(h, w)``; one ``[h * w, C]`` per crop."""

    @abstractmethod
    def project(self, model: Any, features: Tensor) -> Tensor:
        """Map encoder features ``[M, C]`` to LLM embeddings ``[M, D]``."""

    def embed(self, model: Any, tokens: VisualTokens, selection: Selection, merges: bool) -> list[Tensor]:
        """Return the embeddings that the LLM receives, ``[K, D]`` per span.

        Without merging only the kept tokens are projected, all spans at once.
        """
        chosen = tokens.hidden if merges else selection.apply(tokens.hidden)
        projected = list(torch.split(self.project(model, torch.cat(chosen)), [len(x) for x in chosen]))
        for i, span in enumerate(tokens.spans):
            kept = None if merges else selection[i].kept
            projected[i] = self.fill_separators(model, span, projected[i], kept)
        return selection.apply(projected) if merges else projected

    def fill_separators(self, model: Any, span: Span, embeds: Tensor, kept: Tensor | None) -> Tensor:
        """Replace the rows of tokens that belong to no crop, where the projector does not make them."""
        return embeds

    @abstractmethod
    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        """Wrap embeddings per span as the ``mm_encoder_outputs`` of the model."""


def placeholder_columns(ids: Tensor, token_id: int, lengths: Sequence[int], kind: str) -> Iterator[tuple[int, Tensor]]:
    """Hand out the placeholders of a batch to images of known lengths.

    Parameters
    ----------
    ids
        ``[B, L]`` on the CPU.
    token_id
        The placeholder's id.
    lengths
        Visual tokens per image, in the order in which the images appear.

    Yields
    ------
    tuple
        The row, and the columns ``[N]``, of each image.

    Raises
    ------
    InputError
        If the placeholders of a row are not those of a whole number of images.
    """
    i = 0
    for row, found in enumerate(ids == token_id):
        columns, start = found.nonzero().flatten(), 0
        while start < len(columns):
            if i == len(lengths) or start + lengths[i] > len(columns):
                raise _mismatch(int((ids == token_id).sum()), lengths, kind)
            yield row, columns[start : start + lengths[i]]
            start, i = start + lengths[i], i + 1
    if i < len(lengths):
        raise _mismatch(int((ids == token_id).sum()), lengths, kind)


def _mismatch(placeholders: int, lengths: Sequence[int], kind: str) -> InputError:
    return InputError(
        f"the prompts hold {placeholders} {kind} placeholder tokens, but the {len(lengths)} {kind}(s) passed make "
        f"{sum(lengths)}: put one {kind} token per {kind} in the text and let the model's processor expand it"
    )


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

    Returns
    -------
    tuple
        Features ``[R, S, C]`` with the ``[CLS]`` row, and the attention probes, each ``[R, N]`` or ``[R, N, layers]``.
    """
    layers = encoder_layers(tower)
    indices = [(i if i >= 0 else len(layers) + 1 + i) - 1 for i in feature_layers]
    if min(indices) < 0:
        raise UnsupportedModelError("features straight from the patch embedding (hidden state 0) have no layer to read")
    wanted = [probe for probe in probes if isinstance(probe, Attention)]
    readers: dict[nn.Module, dict[tuple[Probe, int], Reader]] = {}
    for probe in wanted:
        for back in probe.layers:
            at = indices[-1] + 1 + back
            if not 0 <= at <= indices[-1]:
                raise UnsupportedModelError(f"{probe} reads layer {at} of the {indices[-1] + 1} layers in use")
            readers.setdefault(_attention_of(layers[at]), {})[probe, back] = _reader(probe, has_cls)
    with tap(tower, readers) as taps:
        outputs = layer_outputs(tower, [layers[i] for i in indices], pixels, **kwargs)
    features = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    values: dict[Probe, Tensor] = {}
    for probe in wanted:
        rows = [taps.values[probe, back] for back in probe.layers]
        values[probe] = rows[0] if len(rows) == 1 else torch.stack(rows, dim=-1)
    return features, values


def _attention_of(layer: nn.Module) -> nn.Module:
    for name, module in layer.named_children():
        if name in ("self_attn", "attn", "attention"):
            return module
    raise UnsupportedModelError(f"no attention module found in {type(layer).__name__}")


def _reader(probe: Attention, has_cls: bool) -> Reader:
    if probe.of == "cls" and not has_cls:
        raise UnsupportedModelError("this vision encoder has no [CLS] token: read Attention(of='received') instead")
    if probe.of == "received" or not has_cls:
        return lambda query, key, scaling: received(query, key, scaling, skip=int(has_cls))
    return cls_row


def crop_rows(x: Tensor, crop: Crop, grid: Grid) -> Tensor:
    """Cut a crop's tokens out of encoder rows ``[R, H * W, ...]`` with the encoder's grid ``(H, W)``."""
    row = x[crop.encoder_row]
    if crop.grid == grid:
        return row
    assert crop.grid is not None
    (top, left), (h, w) = crop.offset, crop.grid
    return row.reshape(*grid, *row.shape[1:])[top : top + h, left : left + w].flatten(0, 1)


def resized_crops(
    tower: nn.Module,
    pixels: Tensor,
    crops: Sequence[Crop],
    grids: Sequence[Grid],
    patch: int,
    feature_layers: Sequence[int],
) -> list[Tensor]:
    """Encode crops from smaller pictures, so that each makes the given grid of tokens, ``[h * w, C]`` each."""
    results: list[Tensor] = []
    for crop, (h, w) in zip(crops, grids, strict=True):
        assert crop.grid is not None
        (top, left), (rows, columns) = crop.offset, crop.grid
        picture = pixels[
            crop.encoder_row, :, top * patch : (top + rows) * patch, left * patch : (left + columns) * patch
        ]
        small = nn.functional.interpolate(
            picture[None].float(), size=(h * patch, w * patch), mode="bicubic", antialias=True, align_corners=False
        )
        features, _ = run_tower(tower, small.to(pixels.dtype), feature_layers, True, (), interpolate_pos_encoding=True)
        results.append(features[0, 1:])
    return results


def token_planes(
    crops: Sequence[Crop], grid: Grid, features: Tensor, values: Mapping[Probe, Tensor]
) -> dict[Probe, list[Tensor]]:
    """Cut encoder features ``[R, H * W, C]`` and probe values into one tensor per crop."""
    planes: dict[Probe, list[Tensor]] = {Features(): [crop_rows(features.detach(), c, grid) for c in crops]}
    for probe, value in values.items():
        planes[probe] = [crop_rows(value, c, grid) for c in crops]
    return planes
