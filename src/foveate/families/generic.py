"""Any other model that takes encoded images: tokens as its encoder returns them, and what can be read on the way."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Embeddings, Features, LayerProbe, Probe
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.families.base import Family
from foveate.families.batches import one_row_per_token, placeholder_columns
from foveate.families.classes import REFUSED, owner_of
from foveate.families.generic_tower import look
from foveate.families.layout import Grid
from foveate.families.survey import Tower, towers

_PLAIN = ("pooler_output", "last_hidden_state", "hidden_states", "attentions", "image_tokens", "embedding_loss")
"""How the names of what encoders return end, beside planes that reach the LLM; the last two are of codebooks."""


@dataclass(frozen=True, eq=False)
class EncodedSpan(Span):
    """A span that was found by encoding its image.

    Attributes
    ----------
    rows
        ``[N, D]``: what the LLM gets.
    dims
        Dimensions of the encoder's output: 2 or 3 of one tensor, 0 for a list with one tensor per image.
    values
        What was read of the encoder on the way, ``[N, ...]`` each.
    """

    rows: Tensor | None = None
    dims: int = 0
    values: Mapping[Probe, Tensor] = field(default_factory=dict)


class Generic(Family):
    """Models of no family of their own.

    The number of tokens of an image is known once it is encoded, so `spans` encodes, and `encode` hands out what it
    found. Each entry of the encoder's output counts as an image; in a single ``[M, D]`` tensor, each run of
    placeholders does.
    """

    name = "generic"
    model_types = ()
    inputs: ClassVar = {"pixel_values": "image", "pixel_values_videos": "video"}
    has_grid = False
    opaque = True
    notes = "any other model that takes mm_encoder_outputs; attention where each patch makes one token; square grids"
    refuses = REFUSED
    towers: Sequence[Tower] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("image",)

    @classmethod
    def of(cls, model: Any) -> Generic:
        """Return the family for one model: it knows what the model's encoder reads beside the pixels."""
        family = cls()
        family.side_inputs = _side_inputs(model)  # type: ignore[misc]
        family.towers = towers(model)
        family.has_attention = bool(family.towers)  # type: ignore[misc]
        if hasattr(getattr(model, "model", model), "get_rope_index"):
            rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
            family.keeps_positions = True  # type: ignore[misc]
            family.axes = len(rope.get("mrope_section", ())) or cls.axes  # type: ignore[misc]
        return family

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        return self.spans_for(model, inputs, ())

    def spans_for(self, model: Any, inputs: Mapping[str, Any], probes: Sequence[Probe]) -> tuple[Span, ...]:
        if inputs.get("pixel_values_videos") is not None:
            raise UnsupportedModelError(f"{type(model).__name__} has no family of its own, and so no videos here")
        output, values = self._look(model, inputs, probes)
        if further := [key for key in output if not key.endswith(_PLAIN)]:
            raise UnsupportedModelError(
                f"{type(model).__name__} needs a family of its own: its images have {', '.join(further)} beside tokens"
            )
        # Classes return one tensor of all images, stacked or joined, or a list with one tensor per image.
        rows, ids, token = output.pooler_output, inputs["input_ids"].cpu(), model.config.image_token_id
        dims = rows.dim() if isinstance(rows, Tensor) else 0
        if dims == 3 and rows.shape[1] == 1:  # Inkling: each patch as if it were an image
            rows = rows[:, 0]
        parts = list(torch.split(rows, _runs(ids == token))) if dims and rows.dim() == 2 and len(rows) else list(rows)
        if (one := _tokens_per_image(model)) is not None:
            parts = [image for part in parts for image in torch.split(part, one)]
        spans: list[Span] = []
        lengths = [len(x) for x in parts]
        read = {probe: torch.split(x, lengths) for probe, x in values.items()}
        places = placeholder_columns(ids, token, lengths, "image")
        for i, (x, (row, columns)) in enumerate(zip(parts, places, strict=True)):
            side_length = isqrt(len(x))
            grid = (side_length, side_length) if side_length**2 == len(x) else None
            crop = Crop(torch.arange(len(x)), grid)
            ordinal = sum(s.sample == row for s in spans)
            shape, own = (1, *(grid or (1, len(x)))), {probe: x[i] for probe, x in read.items()}
            spans.append(EncodedSpan("image", row, ordinal, columns, shape, (crop,), rows=x, dims=dims, values=own))
        return tuple(spans)

    def _look(self, model: Any, inputs: Mapping[str, Any], probes: Sequence[Probe]) -> tuple[Any, dict[Probe, Tensor]]:
        read = [probe for probe in probes if isinstance(probe, LayerProbe)]
        own = {key: inputs[key] for key in ("pixel_values", *self.side_inputs) if inputs.get(key) is not None}

        def run(given: Mapping[str, Any]) -> Any:
            side = {key: x for key, x in given.items() if key != "pixel_values"}
            return self.run_encoder(model, given["pixel_values"], **side, return_dict=True)

        # Pixels that are not finite are refused behind this, by the name of their image.
        if not read or not bool(inputs["pixel_values"].isfinite().all()):
            return run(own), {}
        return look(model, self.towers, own, read, run, _joined)

    def encode(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], probes: Sequence[Probe]
    ) -> VisualTokens:
        read = [probe for probe in probes if isinstance(probe, LayerProbe)]
        if any(probe not in span.values for probe in read for span in spans if isinstance(span, EncodedSpan)):
            spans = self.spans_for(model, inputs, read)
        own = [span for span in spans if isinstance(span, EncodedSpan)]
        rows = [span.rows for span in own if span.rows is not None]
        planes: dict[Probe, list[Tensor]] = {Features(): [x.detach() for x in rows]}
        planes |= {probe: [span.values[probe] for span in own] for probe in read}
        if Embeddings() in probes:
            planes[Embeddings()] = planes[Features()]
        return VisualTokens(tuple(spans), planes, rows[0].device, rows)

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        raise UnsupportedModelError(f"{type(model).__name__} has no family that can encode smaller pictures")

    def run_encoder(self, model: Any, pixels: Tensor, **side: Any) -> Any:
        return owner_of(model, "get_image_features").get_image_features(pixels, **side)

    def project(self, model: Any, features: Tensor) -> Tensor:
        return features

    def positions(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        if not self.keeps_positions:
            return None
        types = (inputs["input_ids"] == model.config.image_token_id).long()
        given, index = {**inputs, "mm_token_type_ids": types}, model.model.get_rope_index
        positions, _ = index(**{k: given[k] for k in inspect.signature(index).parameters if given.get(k) is not None})
        return positions  # type: ignore[no-any-return]

    def position_deltas(self, model: Any) -> Tensor | None:
        return model.model.rope_deltas if self.keeps_positions else None

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        (dims,) = {span.dims for span in spans if isinstance(span, EncodedSpan)}
        if dims == 0:
            return {"image": BaseModelOutputWithPooling(pooler_output=list(embeds))}
        rows = torch.cat(list(embeds)) if dims == 2 else one_row_per_token(embeds)
        return {"image": BaseModelOutputWithPooling(pooler_output=rows)}


def _joined(output: Any) -> Tensor:
    """Return the tokens of all images ``[M, D]`` in what ``get_image_features`` returned."""
    rows = output.pooler_output
    return rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat(list(rows))


def _side_inputs(model: Any) -> tuple[str, ...]:
    """Return the names of what ``get_image_features`` takes beside the pixels, there and in the model inside."""
    names: dict[str, None] = {}
    for part in (model, getattr(model, "model", model)):
        if (encode := getattr(type(part), "get_image_features", None)) is not None:
            kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            names.update((p.name, None) for p in inspect.signature(encode).parameters.values() if p.kind not in kinds)
    return tuple(name for name in names if name not in ("self", "pixel_values"))


def _tokens_per_image(model: Any) -> int | None:
    """Return how many tokens each image has, of a model whose encoder joins the images of a prompt; else `None`."""
    perceiver = getattr(model.config, "perceiver_config", None)  # Idefics2
    return None if perceiver is None else int(perceiver.resampler_n_latents)


def _runs(places: Tensor) -> list[int]:
    """Return the lengths of the runs of `True` in the rows of a mask."""
    lengths = []
    for row in places:
        edges = torch.diff(row.int(), prepend=row.new_zeros(1).int(), append=row.new_zeros(1).int()).nonzero().flatten()
        lengths += (edges[1::2] - edges[::2]).tolist()
    return lengths
