"""Probes: the cues that methods need besides the tokens, and how each is computed from what a layer attends with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedModelError

# Rows of attention that are worked on at once: fewer where they are long, so that the entries stay so many.
_QUERY_CHUNK, _ENTRIES = 256, 2**25

Rows: TypeAlias = Literal["last", "text", "judges", "visual", "all"]


class Probe:
    """A cue that methods need besides the tokens; its values have the shape that its class says."""

    @property
    def query_aware(self) -> bool:
        """Whether the text of the prompt has a say in the values."""
        return False


@dataclass(frozen=True)
class Features(Probe):
    """What methods compare tokens by, ``[N, C]`` per crop.

    The encoder features that the projector reads; in families whose tokens are merged from several patches, the merged
    tokens in the space of the LLM.
    """


@dataclass(frozen=True)
class Embeddings(Probe):
    """Visual tokens after the projector, in the space of the LLM, ``[N, D]`` per crop."""


@dataclass(frozen=True)
class ClsToken(Probe):
    """The encoder's ``[CLS]`` token as one more row that merging may use; see `CropBatch.cls`."""


@dataclass(frozen=True)
class ClsSimilarity(Probe):
    """Cosine of each patch's feature with that of the crop's ``[CLS]`` token, ``[N]`` float32 per crop.

    Of the features that methods compare, see `Features`; where these have no such token, with their mean.
    """


@dataclass(frozen=True)
class Query(Probe):
    """The text of the prompt that follows its first image, as input embeddings ``[M, D]``; see `CropBatch.query`.

    Text before the image, where system prompts stand, counts only if none at all follows. What a chat template puts
    behind the last image is text, too: so a question counts only if it stands behind the first image.
    """

    @property
    def query_aware(self) -> bool:
        return True


@dataclass(frozen=True)
class Members(Probe):
    """What became of each patch inside the encoder, ``[N]`` int64 per crop.

    The first patch of the token that it is part of, or -1 if it was dropped. Only methods of the stage ``"encoder"``
    read it.
    """


@dataclass(frozen=True)
class LayerProbe(Probe, ABC):
    """A cue that is computed from the queries, keys and values of attention layers of the vision encoder.

    Parameters
    ----------
    layers
        Encoder layers, each either counted back from the one whose output the projector reads, which is ``-1`` (0 is
        the layer behind it, if there is one, else the same), or a share of the depth: ``1 / 3`` is layer 8 of the 24
        of CLIP-L. With several, the values have a last dimension for them. A single float stands for all layers from
        that share of the depth up to the one whose output the projector reads. In encoders with attention within
        windows, a share means the nearest layer that attends to whole pictures (of equally near ones the first), and a
        single float only such layers; counted layers are taken as they are.
    """

    layers: tuple[int | float, ...] | float = field(default=(-1,), kw_only=True)

    @abstractmethod
    def read(self, heads: Heads) -> Tensor:
        """Return the values of all patches ``[B, N, ...]`` float32 from what one layer attends with."""

    def rows(self, length: int, lead: int) -> int:
        """Return how many attention rows are computed to read a layer of `length` tokens, of which `lead` in front."""
        return 0

    def numbers(self, depth: int, read: int, whole: Sequence[int] | None = None) -> list[int]:
        """Return the layers as indices from 0.

        Parameters
        ----------
        depth
            Layers of the encoder.
        read
            Index of the layer whose output the projector reads.
        whole
            The layers that attend to whole pictures, where others attend within windows; `None` if all do.

        Raises
        ------
        UnsupportedModelError
            If the encoder has no such layer.
        """
        among = range(depth) if whole is None else whole
        if isinstance(self.layers, float):
            first = int(self.layers * depth)
            if found := [layer for layer in among if first <= layer <= read]:
                return found
            raise UnsupportedModelError(
                f"{self} starts at layer {first}, but of the {depth} layers of this vision encoder the projector reads "
                f"number {read}, and no later one counts: start at a share of the depth up to {read} / {depth}"
                + ("" if whole is None else f"; layers {[*whole]} attend to whole pictures")
            )
        found = [int(i * depth) if isinstance(i, float) else read + 1 + i for i in self.layers]
        found = [read if i == 0 and layer == depth else layer for i, layer in zip(self.layers, found, strict=True)]
        for given, layer in zip(self.layers, found, strict=True):
            if not 0 <= layer < depth or (isinstance(given, float) and not among):
                raise UnsupportedModelError(
                    f"{self} reads layer {given}, but this vision encoder has {depth} layers, of which the projector "
                    f"reads number {read}"
                )
        return [
            min(among, key=lambda n: (abs(n - layer), n)) if isinstance(given, float) else layer
            for given, layer in zip(self.layers, found, strict=True)
        ]

    @property
    def stacked(self) -> bool:
        """Whether the values have a last dimension for the layers."""
        return isinstance(self.layers, float) or len(self.layers) > 1


@dataclass(frozen=True)
class Attention(LayerProbe):
    """Attention that patches get inside the vision encoder, averaged over heads, ``[N]`` per crop.

    Parameters
    ----------
    layers
        See `LayerProbe`.
    of
        ``"cls"``: the row of the ``[CLS]`` query, softmax over all keys and the ``[CLS]`` column then dropped.
        ``"received"``: the mean over all query rows. ``"auto"``: ``"cls"`` where the encoder has such a token,
        ``"received"`` otherwise.
    joint
        Take all heads as a single one, as wide as all of them, with a scale to match.
    """

    of: Literal["auto", "cls", "received"] = "auto"
    joint: bool = False

    def rows(self, length: int, lead: int) -> int:
        return 1 if self.of == "cls" or (self.of == "auto" and lead) else length

    def read(self, heads: Heads) -> Tensor:
        if self.of == "cls" and not heads.lead:
            raise UnsupportedModelError("this vision encoder has no [CLS] token: read Attention(of='received') instead")
        query, key, scaling = heads.query, heads.key, heads.scaling
        if self.joint:
            scaling *= query.shape[1] ** -0.5
            query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
        if self.of == "received" or not heads.lead:
            return attention_received(query, key, scaling, heads.lead, heads.mask)
        return cls_row(query, key, scaling, heads.mask)[:, heads.lead - 1 :]


@dataclass(frozen=True)
class Keys(LayerProbe):
    """Attention keys of patches, ``[N, d]`` per crop: the mean over heads, or with `joint` all heads side by side."""

    joint: bool = False

    def read(self, heads: Heads) -> Tensor:
        key = heads.key[:, :, heads.lead :].float()
        return key.transpose(1, 2).flatten(2) if self.joint else key.mean(dim=1)


class LlmProbe(Probe):
    """A cue inside the LLM, which methods of the stage ``"in_llm"`` read at a boundary between two layers."""


@dataclass(frozen=True)
class LayerAttention(LlmProbe):
    """Attention that visual tokens get in a decoder layer, softmax over all keys, float32.

    Parameters
    ----------
    rows
        Whose attention: that of the ``"last"`` token of the prompt, of the ``"text"`` behind the last image (without
        any, of the last token), of those among this text that `InLlmReducer.judges` chooses, of the ``"visual"``
        tokens themselves, or of ``"all"`` tokens.
    ahead
        False: of the layer in front of the boundary, as it ran. True: what the layer behind the boundary would have,
        from its projections of the hidden states at the boundary.
    over
        What is averaged over: ``"rows and heads"`` gives ``[n]`` per prompt, ``"rows"`` ``[n, H]``, ``"nothing"``
        ``[n, H, R]`` with the rows in their order.
    """

    rows: Rows = "last"
    ahead: bool = False
    over: Literal["rows and heads", "rows", "nothing"] = "rows and heads"

    @property
    def query_aware(self) -> bool:
        return self.rows != "visual"


@dataclass(frozen=True)
class LayerKeys(LlmProbe):
    """Keys of visual tokens in the layer behind the boundary, rotated, mean over key heads, ``[n, d]`` float32."""


@dataclass(frozen=True)
class LayerStates(LlmProbe):
    """Hidden states of visual tokens ``[n, D]``.

    Parameters
    ----------
    at
        ``"output"``: at the boundary. ``"input"``: where they go into the layer in front of the boundary. ``"mlp"``:
        where they go into its feed-forward network.
    """

    at: Literal["output", "input", "mlp"] = "output"


@dataclass(frozen=True)
class TextStates(LlmProbe):
    """Hidden states of the text behind the last image: `LayerTokens.text` and `LayerTokens.text_before`."""

    @property
    def query_aware(self) -> bool:
        return True


@dataclass(frozen=True)
class Prior(LlmProbe):
    """What `InLlmReducer.prior` made of the tokens before the LLM, or another model of them, ``[n]`` float32."""


@dataclass(frozen=True, eq=False)
class Heads:
    """What an attention layer attends with.

    Attributes
    ----------
    query, key, value
        ``[B, H, S, d]``, rotated if the model rotates them, not yet scaled; key and value may have fewer heads.
    scaling
        Factor on the products of queries and keys.
    lead
        Tokens before the patches, of which the first is ``[CLS]``: usually 1 or 0.
    mask
        ``[B, 1, S, S]`` or ``[B, 1, 1, S]`` bool: which keys each query attends to; `None` if all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    lead: int = 0
    mask: Tensor | None = None


def cls_row(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Attention of the first query to all other tokens.

    Parameters
    ----------
    query, key
        ``[B, H, 1 + N, d]``, not yet scaled.
    scaling
        Factor on the products, usually ``d ** -0.5``.
    mask
        See `Heads`.

    Returns
    -------
    Tensor
        ``[B, N]`` float32, mean over heads; the mass that falls on the first token itself is missing.
    """
    logits = torch.matmul(query[:, :, :1].float(), key.float().transpose(-1, -2)) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, :1], -torch.inf)
    return logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def attention_received(query: Tensor, key: Tensor, scaling: float, skip: int = 0, mask: Tensor | None = None) -> Tensor:
    """Attention that each token gets, mean over all query rows and heads.

    Works through the rows in chunks of at most so many entries, so that no ``N x N`` map is stored: of 16,384 tokens
    this takes no more memory than a layer of CLIP-L's width does by itself.

    Parameters
    ----------
    query, key
        ``[B, H, S, d]``, not yet scaled.
    skip
        Leading tokens (such as ``[CLS]``) that are left out of the result, not out of the softmax.
    mask
        See `Heads`. Tokens that it hides from all queries get nothing, and do not count as queries.

    Returns
    -------
    Tensor
        ``[B, S - skip]`` float32; sums to one if `skip` is zero.
    """
    transposed = key.float().transpose(-1, -2)
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    shown = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
    if mask is not None:
        mask, shown = mask.expand(-1, -1, query.shape[2], -1), mask.any(dim=2)[:, 0]
    step = min(_QUERY_CHUNK, max(1, _ENTRIES // (query.shape[0] * query.shape[1] * key.shape[2])))
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        logits = torch.matmul(query[:, :, rows].float(), transposed).mul_(scaling)
        if mask is not None:
            logits.masked_fill_(~mask[:, :, rows], torch.finfo(logits.dtype).min)
        total += logits.softmax(dim=-1).mul_(shown[:, None, rows, None]).sum(dim=2).mean(dim=1)
    return total[:, skip:] / shown.sum(dim=1, keepdim=True)
