"""Families whose tokens leave the model's own encoder in the space of the LLM, each made of one or several patches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.probes import Embeddings, Features, LayerProbe, Probe
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens
from foveate.families.base import Family
from foveate.families.batches import placeholder_columns
from foveate.families.layout import Grid, Layout
from foveate.families.taps import tap
from foveate.families.tower import attention_of


class MergedFamily(Family):
    """Runs the model's own encoder and projector whole, selects among what comes out, and reads probes on the way.

    A subclass says how the images are laid out (`layouts`), which module is the vision encoder (`encoder`), and how
    values of patches become values of tokens (`to_tokens`).
    """

    @abstractmethod
    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        """List the images (or videos) of the inputs in the order of their placeholders."""

    @abstractmethod
    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        """Turn patch values into token values, the mean over each token's patches.

        Parameters
        ----------
        values
            ``[R, P, ...]``: what a probe read of all pictures, in the order in which the encoder saw them.

        Returns
        -------
        Tensor
            ``[M, ...]``: the tokens of all crops of all images of the kind, one after the other.
        """

    def patch_counts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[int] | None:
        """Return the patches of each picture, if the encoder packs pictures under a mask or pads them; else `None`."""
        return None

    def token_id(self, model: Any, kind: str) -> int:
        """Return the id of the placeholder of a kind of span."""
        return int(getattr(model.config, f"{kind}_token_id"))

    def placeholders(self, model: Any, ids: Tensor, kind: str) -> Tensor:
        """Mark the placeholders of a kind of span among the ids ``[B, L]``."""
        return ids == self.token_id(model, kind)

    def rows(self, model: Any, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Return what the LLM gets of each image, from the output of `image_features`.

        ``[N, D]``, or ``[N, 1 + planes, D]`` in a family with further planes (see `embeddings`), which are gathered and
        merged along.
        """
        pooled = output.pooler_output
        flat = torch.cat(list(pooled)) if not isinstance(pooled, Tensor) else pooled.flatten(0, -2)
        lengths = [layout.length for layout in layouts]
        if sum(lengths) != len(flat):
            raise InputError(
                f"the prompts hold {sum(lengths)} placeholder tokens, but the pictures passed make {len(flat)}: pass "
                "the pictures of these prompts, and let the model's processor expand the placeholders"
            )
        return list(torch.split(flat, lengths))

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        found: list[tuple[int, int, str, Tensor, Layout]] = []
        ids = inputs["input_ids"].cpu()
        # `read_layer` and `layouts` look into the configuration; an option of one call would not reach them.
        for option in ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"):
            if inputs.get(option) is not None:
                raise InputError(f"{self.name} takes {option} from the model's configuration, not from the inputs")
        for key, kind in self.inputs.items():
            if inputs.get(key) is None:
                continue
            layouts = self.layouts(model, inputs, kind)
            lengths = [layout.length for layout in layouts]
            placed = placeholder_columns(self.placeholders(model, ids, kind), True, lengths, kind)
            for layout, (row, columns) in zip(layouts, placed, strict=True):
                found.append((row, int(columns[0]), kind, columns, layout))
        spans: list[Span] = []
        for row, _, kind, columns, layout in sorted(found, key=lambda f: f[:2]):
            ordinal = sum(s.sample == row for s in spans)
            spans.append(Span(kind, row, ordinal, columns, layout.grid, layout.crops, layout.extents))
        return tuple(spans)

    def encode(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], probes: Sequence[Probe]
    ) -> VisualTokens:
        read = [p for p in probes if isinstance(p, LayerProbe)]
        hidden: dict[str, list[Tensor]] = {}
        values: dict[str, dict[Probe, list[Tensor]]] = {}
        kinds = list(dict.fromkeys(span.kind for span in spans))
        for kind in kinds:
            layouts = self.layouts(model, inputs, kind)
            output, planes = self._look(model, inputs, kind, read)
            hidden[kind] = self.rows(model, output, layouts)
            sizes = [len(crop) for layout in layouts for crop in layout.crops]
            values[kind] = {
                probe: list(torch.split(self.to_tokens(model, inputs, kind, x), sizes)) for probe, x in planes.items()
            }
        return self._tokens(spans, hidden, values, probes)

    def _tokens(
        self,
        spans: Sequence[Span],
        hidden: dict[str, list[Tensor]],
        values: dict[str, dict[Probe, list[Tensor]]],
        probes: Sequence[Probe],
    ) -> VisualTokens:
        # Spans come prompt by prompt, images and videos mixed; the encoder's output comes kind by kind.
        rows = {kind: iter(x) for kind, x in hidden.items()}
        parts = {kind: {probe: iter(x) for probe, x in found.items()} for kind, found in values.items()}
        own = [next(rows[span.kind]) for span in spans]
        planes: dict[Probe, list[Tensor]] = {Features(): []}
        for span, tokens in zip(spans, own, strict=True):
            embeddings = self.embeddings(tokens).detach()
            for crop in span.crops:
                planes[Features()].append(embeddings.index_select(0, crop.index.to(tokens.device)))
                for probe, x in parts[span.kind].items():
                    planes.setdefault(probe, []).append(next(x))
        if Embeddings() in probes:  # what comes out of the projector is both
            planes[Embeddings()] = planes[Features()]
        return VisualTokens(tuple(spans), planes, own[0].device, own)

    def embeddings(self, rows: Tensor) -> Tensor:
        """Return the input embeddings ``[N, D]`` in what `rows` returns of an image, leaving further planes aside."""
        return rows

    def _look(
        self, model: Any, inputs: Mapping[str, Any], kind: str, probes: Sequence[LayerProbe]
    ) -> tuple[Any, dict[Probe, Tensor]]:
        if not probes:
            return self.image_features(model, inputs, kind), {}
        layers, encoder = self.layers(model), self.encoder(model)
        assert encoder is not None
        read_layer, whole = self.read_layer(model), self.whole_layers(model)
        numbers = {p: p.numbers(len(layers), read_layer, whole) for p in probes}
        watched: dict[nn.Module, list[LayerProbe]] = {}
        for probe, read in numbers.items():
            for i in read:
                watched.setdefault(attention_of(layers[i]), []).append(probe)
        with tap(encoder, watched, self.lead(model), self.patch_counts(model, inputs, kind)) as taps:
            output = self.image_features(model, inputs, kind)
        planes: dict[Probe, Tensor] = {}
        for probe, read in numbers.items():
            found = [_joined(taps.values(attention_of(layers[i]), probe)) for i in read]
            if len({x.shape[0] for x in found}) > 1:  # layers that attend within windows beside others
                found = [x.flatten(0, 1)[None] for x in found]
            planes[probe] = torch.stack(found, dim=-1) if probe.stacked else found[0]
        return output, planes

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        raise UnsupportedModelError(
            f"{self.name} cannot encode smaller pictures from the inputs at hand: give its processor a smaller picture"
        )

    def project(self, model: Any, features: Tensor) -> Tensor:
        return features


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put what was read call by call, ``[R, P, ...]`` each, one behind the other."""
    if len({x.shape[1] for x in parts}) == 1:
        return torch.cat(list(parts))
    return torch.cat([x.flatten(0, 1) for x in parts])[None]  # packed sequences of different lengths


def mean_of_blocks(values: Tensor, grid: Grid, block: int) -> Tensor:
    """Average patch values over the blocks of a raster grid.

    Parameters
    ----------
    values
        ``[R, h * w, ...]`` in raster order.
    grid
        Rows and columns of patches ``(h, w)``, multiples of `block`.

    Returns
    -------
    Tensor
        ``[R, h * w / block ** 2, ...]`` in raster order.
    """
    h, w = grid
    if h % block or w % block:
        raise UnsupportedModelError(f"a grid of {h} x {w} patches cannot be merged in blocks of {block} x {block}")
    cut = values.reshape(len(values), h // block, block, w // block, block, *values.shape[2:])
    return cut.mean(dim=(2, 4)).flatten(1, 2)
