"""What a family of models must tell the engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.core.encoder import EncoderReducer
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.probes import Attention, Embeddings, LayerProbe, Probe
from foveate.core.reducer import Method, declared
from foveate.core.selection import Merging, Selection
from foveate.core.tokens import Span, VisualTokens

Grid = tuple[int, int]


_PROJECTORS = (
    "multi_modal_projector", "merger", "connector", "aligner", "projector", "vision_projection",
    "visual_embeddings_table",
)  # fmt: skip


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
    keeps_positions: ClassVar[bool] = False
    """Whether positions have several axes (M-RoPE), so that kept tokens can only keep those of the full prompt."""
    has_cls: ClassVar[bool] = False
    """Whether the vision encoder has a ``[CLS]`` token."""
    has_attention: ClassVar[bool] = True
    """Whether the attention layers of the vision encoder can be read."""
    has_grid: ClassVar[bool] = True
    """Whether the rows and columns of tokens are known."""
    resizes: ClassVar[bool] = False
    """Whether smaller pictures can be encoded, as methods of the stage ``"pixels"`` ask for."""
    reduces_inside: ClassVar[bool] = False
    """Whether methods can act inside the vision encoder, see `encode_inside`."""

    answer_type: ClassVar[int] = 0
    """What the ``token_type_ids`` of an answer's tokens are, where the model has these."""

    recurrent: ClassVar[bool] = False
    """Whether some layers of the LLM are convolutions or recurrent ones."""

    two_way: ClassVar[bool] = False
    """Whether the tokens of an image see each other in the LLM in both directions."""

    def matches(self, config: Any) -> bool:
        """Return whether a model with this configuration belongs to the family."""
        return getattr(config, "model_type", None) in self.model_types

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

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of spans that the family reduces."""
        return tuple(dict.fromkeys(self.inputs.values()))

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

    def image_features(self, model: Any, inputs: Mapping[str, Any], kind: str) -> Any:
        """Run the model's own encoder and projector on all images (or videos)."""
        key = next(k for k, v in self.inputs.items() if v == kind and inputs.get(k) is not None)
        side = {k: inputs[k] for k in self.side_inputs_of(kind) if inputs.get(k) is not None}
        name = f"get_{kind}_features"
        encode = getattr(model, name, None) or getattr(model.model, name)
        return encode(inputs[key], **side, return_dict=True)

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


def one_row_per_token(embeds: Sequence[Tensor]) -> Tensor:
    """Join embeddings ``[K, D]`` of images that keep different numbers of tokens to the one tensor that a model takes.

    Returns
    -------
    Tensor
        ``[sum of K, 1, D]``: as if each token were an image, so that beam search can repeat those of each prompt.
    """
    return torch.cat(list(embeds))[:, None]


def joined_outputs(spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
    """Wrap embeddings ``[K, D]`` per span as ``mm_encoder_outputs`` of a model that takes one tensor per kind."""
    outputs = {}
    for kind in dict.fromkeys(span.kind for span in spans):
        rows = [x for x, span in zip(embeds, spans, strict=True) if span.kind == kind]
        outputs[kind] = BaseModelOutputWithPooling(pooler_output=one_row_per_token(rows))
    return outputs


def in_reading_order(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Sort spans of several kinds, prompt by prompt and left to right, and number those of each prompt."""
    ordered: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.sample, int(s.columns[0]))):
        ordered.append(replace(span, ordinal=sum(s.sample == span.sample for s in ordered)))
    return tuple(ordered)


def interleaved(spans: Sequence[Span], kinds: Mapping[str, VisualTokens]) -> VisualTokens:
    """Put the tokens of several kinds of spans together, each kind in the order in which its spans appear."""
    parts = list(kinds.values())
    if len(parts) == 1:
        return parts[0]
    hidden = {kind: iter(tokens.hidden) for kind, tokens in kinds.items()}
    embedded = {kind: iter(tokens.embedded or ()) for kind, tokens in kinds.items()}
    planes: dict[Probe, list[Tensor]] = {}
    for probe in parts[0].planes:
        values = {kind: iter(tokens.planes[probe]) for kind, tokens in kinds.items()}
        planes[probe] = [next(values[span.kind]) for span in spans for _ in span.crops]
    return replace(
        parts[0],
        spans=tuple(spans),
        planes=planes,
        hidden=[next(hidden[span.kind]) for span in spans],
        embedded=None if parts[0].embedded is None else [next(embedded[span.kind]) for span in spans],
    )
