"""What a family of models must tell the engines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.encoder import EncoderReducer
from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Attention, Embeddings, LayerProbe, Probe
from foveate.core.reducer import Method, declared
from foveate.core.selection import Merging, Selection
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens
from foveate.families.classes import owner_of
from foveate.families.facts import Facts
from foveate.families.layout import WHOLE, Grid, Layout, crop_layout, frames_layout, tile_boxes

Size = tuple[int, int]
"""Width and height in pixels."""
Process = Callable[[int], dict[str, Any]]
"""Runs a model's image processor on so many blank pictures of one size."""

_PROJECTORS = (
    "multi_modal_projector", "merger", "connector", "aligner", "projector", "vision_projection",
    "visual_embeddings_table",
)  # fmt: skip
"""What the classes of transformers call the module between the encoder and the LLM."""


class Family(Facts, ABC):
    """One VLM architecture: where its spans, grids and probes are, and how kept tokens reach the LLM."""

    def matches(self, config: Any) -> bool:
        """Return whether a model with this configuration belongs to the family."""
        return getattr(config, "model_type", None) in self.model_types

    def of(self, model: Any) -> Family:
        """Return the family as it is with one model, where that is not the same for all of its models."""
        return self

    def lacks(self, method: Method | type[Method]) -> str | None:
        """Say what a method needs that the family does not give, or return `None` if the method runs on it.

        Methods that read the grid count as running where it is known for some images only.
        """
        if isinstance(method, Method) and len(parts := method.stages()) > 1:
            return next((lacking for part in parts if (lacking := self.lacks(part))), None)
        if method.stage == "in_llm" and self.recurrent:
            return "attention in every layer of the LLM"
        if method.stage == "pixels":
            return None if self.resizes else "an encoder that takes smaller pictures"
        if method.stage == "encoder":
            return None if self.reduces_inside else "a CLIP-like vision encoder, to act inside it"
        probes = declared(method, "needs")
        if not self.has_attention and isinstance(method, Method) and method.coverages():
            return "the attention of the vision encoder, which its adaptive budget follows"
        for probe in probes:
            if isinstance(probe, LayerProbe) and not self.has_attention:
                return "the attention layers of the vision encoder"
            if isinstance(probe, Attention) and probe.of == "cls" and not self.has_cls:
                return "a vision encoder with a [CLS] token"
        return None

    @abstractmethod
    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        """Locate the spans of a batch from ids and sizes alone, sample by sample, left to right."""

    def spans_for(self, model: Any, inputs: Mapping[str, Any], probes: Sequence[Probe]) -> tuple[Span, ...]:
        """Locate the spans for methods that read these probes.

        Families that must encode to find the spans read the probes on the way, so that they need not do it again.
        """
        return self.spans(model, inputs)

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

    def image_features(self, model: Any, inputs: Mapping[str, Any], kind: str) -> Any:
        """Run the model's own encoder and projector on all images (or videos)."""
        key = next(k for k, v in self.inputs.items() if v == kind and inputs.get(k) is not None)
        side = {k: inputs[k] for k in self.side_inputs_of(kind) if inputs.get(k) is not None}
        name = f"get_{kind}_features"
        return getattr(owner_of(model, name), name)(inputs[key], **side, return_dict=True)

    def side_inputs_of(self, kind: str) -> tuple[str, ...]:
        """Return the further inputs that the encoder reads for one kind."""
        return self.side_inputs

    def encode_inside(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], reducer: EncoderReducer
    ) -> VisualTokens:
        """Run the vision encoder with a method inside that reduces the tokens on their way.

        Each token that is left has the place of its first patch.
        """
        raise UnsupportedModelError(f"methods cannot act inside the vision encoder of {self.name}")

    @abstractmethod
    def project(self, model: Any, features: Tensor) -> Tensor:
        """Map encoder features ``[M, C]`` to LLM embeddings ``[M, D]``."""

    def projector(self, model: Any) -> nn.Module:
        """Return the module between the vision encoder and the LLM."""
        module: nn.Module
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in _PROJECTORS:
                return module
        raise UnsupportedModelError(f"no projector found in {type(model).__name__}")

    def query(self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span]) -> tuple[Tensor, ...]:
        """Return, per prompt, the input embeddings ``[M, D]`` of its text behind its first span.

        Of a prompt without any token there, the text before it counts. No tokenizer tells a question before the image
        from a system prompt, or the end of a chat template from a question; see `Query`.
        """
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        text = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.cpu().bool()
        behind = torch.zeros_like(text)
        for span in reversed(spans):
            behind[span.sample, int(span.columns[0]) :] = True
        for span in spans:
            text[span.sample, span.columns] = False
        embeddings = model.get_input_embeddings()
        rows = [t & b if bool((t & b).any()) else t for t, b in zip(text, behind, strict=True)]
        return tuple(embeddings(row_ids[row.to(ids.device)]).detach() for row_ids, row in zip(ids, rows, strict=True))

    def with_embeddings(self, model: Any, tokens: VisualTokens, probes: Sequence[Probe]) -> VisualTokens:
        """Project all tokens where a method asked for `Embeddings`."""
        if Embeddings() not in probes:
            return tokens
        whole = [x[: len(span)] for x, span in zip(tokens.hidden, tokens.spans, strict=True)]
        embedded = self._project_all(model, whole)
        rows = [
            x.detach().index_select(0, crop.index.to(x.device))
            for x, span in zip(embedded, tokens.spans, strict=True)
            for crop in span.crops
        ]
        return replace(tokens, planes={**tokens.planes, Embeddings(): rows}, embedded=embedded)

    def embed(self, model: Any, tokens: VisualTokens, selection: Selection, merges: Merging) -> list[Tensor]:
        """Return the embeddings that the LLM receives, ``[K, D]`` per span.

        Only the kept tokens are projected, all spans at once, unless tokens are merged behind the projector or the
        method needed all of them.
        """
        # [CLS] rows may be there for another method.
        hidden = [x[: c.length + c.extra] for x, c in zip(tokens.hidden, selection, strict=True)]
        if merges == "encoder":
            chosen = self._project_all(model, [c.anchors(x) for x, c in zip(hidden, selection, strict=True)])
        elif merges == "embeddings":
            chosen = selection.apply(tokens.embedded or self._project_all(model, hidden))
        elif merges is None and tokens.embedded is not None:
            chosen = selection.apply(tokens.embedded)
        else:
            chosen = self._project_all(model, selection.apply(hidden))
        return [
            self.fill_separators(model, span, x, picked.kept)
            for span, x, picked in zip(tokens.spans, chosen, selection, strict=True)
        ]

    def _project_all(self, model: Any, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.split(self.project(model, torch.cat(list(parts))), [len(x) for x in parts]))

    def fill_separators(self, model: Any, span: Span, embeds: Tensor, kept: Tensor) -> Tensor:
        """Replace the rows ``[K, D]`` of tokens that belong to no crop, where the projector does not make them.

        Parameters
        ----------
        kept
            ``[K]``: the position in the span of each row.
        """
        return embeds

    def positions(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the position ids that the full prompts have, ``[B, L]`` or ``[axes, B, L]``.

        `None` if they are counted along the prompt; families that set `keeps_positions` return them.
        """
        return None

    def located(self, spans: Sequence[Span], size: tuple[int, int]) -> tuple[Span, ...]:
        """Return the spans of pictures of a size ``(height, width)`` with the boxes that the inputs do not tell."""
        return tuple(spans)

    def position_deltas(self, model: Any) -> Tensor | None:
        """Return by how much positions run ahead of the number of tokens in the model's own last run, ``[B, 1]``.

        `None` if the model counts positions along the prompt.
        """
        return None

    def layers_written(self, model: Any) -> int:
        """Return how many of the first LLM layers the model adds something to the output of, token by token."""
        return 0

    def check_kept(self, model: Any, selection: Selection) -> None:
        """Raise `InputError` if the installed transformers cannot hand so many tokens of each prompt to the LLM."""
        return

    @abstractmethod
    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        """Wrap embeddings per span as the ``mm_encoder_outputs`` of the model."""

    def imagined_images(
        self, model: Any, size: Size, images: int, process: Process
    ) -> tuple[list[Layout], dict[str, Any]]:
        """Lay out images that nobody has seen, for counting costs.

        Parameters
        ----------
        size
            Width and height in pixels.
        process
            Raises `InputError` if there is no processor, or one that refuses the size.

        Returns
        -------
        tuple
            The layouts, and inputs whose shapes and sizes are those of such images.
        """
        inputs = process(images)
        shape, (h, w) = inputs["pixel_values"].shape, self.patch_size(model)
        grid = self.tokens_of(model, (shape[-2] // h, shape[-1] // w))
        tiles = math.prod(shape[:-3]) // images
        boxes = tile_boxes(tiles, "last", None)
        return [crop_layout(grid, i * tiles, boxes) for i in range(images)], inputs

    def imagined_video(self, model: Any, frames: int, process: Process) -> tuple[list[Layout], dict[str, Any]]:
        """Lay out a video of so many frames, as `imagined_images` does images; the frames may be images."""
        grid = self.picture_grid(model)
        assert grid is not None
        tokens = self.tokens_of(model, grid)
        if self.frames_are_images:
            return [crop_layout(tokens, 0, [WHOLE])] * frames, {"pixel_values": self.blank_pictures(model, frames)}
        return [frames_layout(tokens, frames)], {"pixel_values_videos": self.blank_pictures(model, 1, frames)}
