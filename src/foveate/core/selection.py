"""Selections: which visual tokens stay, as plain data that applies to any parallel plane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from foveate.core.errors import InputError

Merging: TypeAlias = Literal["encoder", "features", "embeddings"] | None
"""Where a method merges tokens: inside the encoder, before the projector, behind it, or not at all."""


@dataclass(frozen=True, eq=False)
class Merge:
    """How tokens flow into kept ones: ``out[target] = sum(weight * x[source])`` over the entries.

    Attributes
    ----------
    target
        ``[M]`` int64, the kept token (its rank among the kept) that each entry flows into.
    source
        ``[M]`` int64, the position in the span that each entry comes from. Positions behind the last token of the
        span stand for further rows, see `SpanSelection.extra`.
    weight
        ``[M]`` float32.
    """

    target: Tensor
    source: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class SpanSelection:
    """The decision for one span.

    Attributes
    ----------
    length
        Number of visual tokens of the span before the decision, N.
    kept
        ``[K]`` int64, ascending and distinct positions in the span. A merged token sits at its anchor.
    merge
        Set if kept tokens are combinations of several; `None` means a plain gather.
    sample
        Row of the batch that the span belongs to.
    kind
        ``"image"`` or ``"video"``.
    extra
        Rows behind the N tokens that a plane may have, and merges may use: the ``[CLS]`` tokens of the span's crops;
        or, inside the LLM, the tokens of all other images of the prompt, one image after the other.
    """

    length: int
    kept: Tensor
    merge: Merge | None = None
    sample: int = 0
    kind: str = "image"
    extra: int = 0

    def __len__(self) -> int:
        return int(self.kept.shape[0])

    @property
    def is_identity(self) -> bool:
        """Whether every token stays as it is."""
        return self.merge is None and len(self) == self.length

    def apply(self, x: Tensor) -> Tensor:
        """Gather, and merge if the selection merges, the rows of a plane ``[N, ...]`` into ``[K, ...]``.

        Merging needs a floating-point plane; ids, masks and positions go through ``anchors``.

        Raises
        ------
        InputError
            If the plane has another number of rows, or not the `extra` ones that are merged.
        """
        if x.shape[0] not in (self.length, self.length + self.extra):
            raise InputError(f"this selection is for {self.length} tokens; the plane has {x.shape[0]} rows")
        if self.merge is None:
            return x[: self.length] if self.is_identity else x.index_select(0, self.kept.to(x.device))
        merge = self.merge
        if x.shape[0] < self.length + self.extra and bool((merge.source >= self.length).any()):
            raise InputError(
                f"this selection merges rows of the {self.extra} behind the {self.length} tokens: pass a plane of both"
            )
        rows = x.index_select(0, merge.source.to(x.device)).float()
        weight = merge.weight.to(x.device).reshape(-1, *[1] * (x.dim() - 1))
        out = rows.new_zeros(len(self), *x.shape[1:])
        return out.index_add(0, merge.target.to(x.device), rows * weight).to(x.dtype)

    def anchors(self, x: Tensor) -> Tensor:
        """Gather the rows of a plane ``[N, ...]`` at the kept positions, without merging."""
        return x.index_select(0, self.kept.to(x.device))

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as JSON-compatible data."""
        data: dict[str, Any] = {
            "length": self.length, "kept": self.kept.tolist(), "sample": self.sample, "kind": self.kind,
            "extra": self.extra,
        }  # fmt: skip
        if self.merge is not None:
            m = self.merge
            data["merge"] = {"target": m.target.tolist(), "source": m.source.tolist(), "weight": m.weight.tolist()}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpanSelection:
        """Rebuild a selection from `to_dict`, checking it."""
        merge = None
        if data.get("merge") is not None:
            m = data["merge"]
            merge = Merge(
                torch.tensor(m["target"], dtype=torch.long),
                torch.tensor(m["source"], dtype=torch.long),
                torch.tensor(m["weight"], dtype=torch.float32),
            )
        kept = torch.tensor(data["kept"], dtype=torch.long)
        span = cls(int(data["length"]), kept, merge, int(data["sample"]), str(data["kind"]), int(data.get("extra", 0)))
        span.check()
        return span

    def check(self) -> None:
        """Raise `InputError` unless the kept positions are ascending, distinct and inside the span.

        Reads values, and so waits for the device: meant for data from outside and for tests.
        """
        kept = self.kept
        if kept.dim() != 1 or kept.dtype != torch.long:
            raise InputError(f"kept positions form one int64 vector, not {kept.dtype} of shape {tuple(kept.shape)}")
        if len(self) and (bool((kept[1:] <= kept[:-1]).any()) or int(kept[0]) < 0 or int(kept[-1]) >= self.length):
            raise InputError(f"kept positions must ascend without repeats within 0..{self.length - 1}")
        if self.merge is not None:
            m = self.merge
            if not (m.target.shape == m.source.shape == m.weight.shape):
                raise InputError("the targets, sources and weights of a merge have different lengths")
            if len(m.target) and not (
                int(m.target.min()) >= 0 and int(m.target.max()) < len(self)
                and int(m.source.min()) >= 0 and int(m.source.max()) < self.length + self.extra
            ):  # fmt: skip
                raise InputError("a merge names tokens outside the span")


@dataclass(frozen=True, eq=False)
class Selection(Sequence[SpanSelection]):
    """What a method returns: one `SpanSelection` per span, in the order of the spans of a batch."""

    spans: tuple[SpanSelection, ...]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: Any) -> Any:
        return self.spans[i]

    def __iter__(self) -> Iterator[SpanSelection]:
        return iter(self.spans)

    def apply(self, planes: Sequence[Tensor]) -> list[Tensor]:
        """Apply each span's decision to its plane: ``[N_i, ...]`` to ``[K_i, ...]``."""
        return [span.apply(x) for span, x in zip(self.spans, planes, strict=True)]

    @property
    def is_identity(self) -> bool:
        """Whether every token of every span stays as it is."""
        return all(span.is_identity for span in self.spans)

    def by_prompt(self, batch_size: int) -> list[list[SpanSelection]]:
        """Group the spans by the prompt (row of the batch) that they belong to."""
        rows: list[list[SpanSelection]] = [[] for _ in range(batch_size)]
        for span in self.spans:
            rows[span.sample].append(span)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as JSON-compatible data."""
        return {"spans": [span.to_dict() for span in self.spans]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Selection:
        """Rebuild a selection from `to_dict`, checking it."""
        return cls(tuple(SpanSelection.from_dict(span) for span in data["spans"]))
