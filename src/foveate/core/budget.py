"""Budgets: how many visual tokens to keep, as a pure function of the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from foveate.core.errors import BudgetError

Scope: TypeAlias = Literal["image", "crop", "joint"]


def is_number(value: object) -> bool:
    """Return whether a value is an ``int`` or ``float``; booleans and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


@dataclass(frozen=True)
class Budget:
    """How many visual tokens a reducer keeps.

    A budget depends on the token grid alone, never on the content of an image, so that a serving engine can
    reserve places before anything is encoded. The exception is `coverage`.

    Parameters
    ----------
    value
        An ``int`` counts tokens; a ``float`` in (0, 1] is a share of the tokens, rounded half to even, at least one.
    per
        ``"image"``: the value holds for a whole span (image, tile set or video) and is divided among its crops in
        proportion to their sizes. ``"crop"``: it holds for every crop (tile or frame) by itself, as the papers on
        LLaVA-NeXT count. ``"joint"``: as ``"image"``, but all crops of a span compete for the same places.

    Raises
    ------
    BudgetError
        If the value is zero, negative, above 1.0 for a ratio, or not a number.

    Examples
    --------
    >>> Budget(64).split([576])
    [64]
    >>> Budget(640).split([576] * 5)
    [128, 128, 128, 128, 128]
    >>> Budget(0.25, per="crop").split([576, 288])
    [144, 72]
    """

    value: int | float
    per: Scope = "image"

    def __post_init__(self) -> None:
        if not is_number(self.value):
            raise BudgetError(f"a budget is a count such as 64 or a ratio such as 0.25, not {self.value!r}")
        if self.per not in ("image", "crop", "joint"):
            raise BudgetError(f"a budget counts per 'image', 'crop' or 'joint', not {self.per!r}")
        if isinstance(self.value, int) and self.value < 1:
            raise BudgetError(f"cannot keep {self.value} visual tokens: keep at least 1, or pass a ratio such as 0.25")
        if isinstance(self.value, float) and not 0.0 < self.value <= 1.0:
            raise BudgetError(
                f"a ratio of {self.value} is not in (0, 1]: pass a ratio such as 0.25, or a whole number of tokens"
            )

    @staticmethod
    def coverage(share: float, *, per: Scope = "image", least: int = 1, most: int | None = None) -> Coverage:
        """Return a budget that follows the image: see `Coverage`.

        Examples
        --------
        >>> Budget.coverage(0.9, most=144)
        Coverage(value=0.9, per='image', least=1, most=144)
        """
        return Coverage(share, per, least, most)

    def count(self, n: int) -> int:
        """Return the number of tokens kept of `n`: at least one, at most `n`."""
        wanted = self.value if isinstance(self.value, int) else max(1, round(self.value * n))
        return min(int(wanted), n)

    def split(self, sizes: Sequence[int]) -> list[int]:
        """Divide the budget of one span among its crops of the given sizes (tokens per crop).

        The parts add up to ``count(sum(sizes))`` except with ``per="crop"``, where each is ``count(size)``. Places are
        given in proportion to the sizes by largest remainder, ties to the earlier crop.
        """
        if self.per == "crop":
            return [self.count(n) for n in sizes]
        total = sum(sizes)
        if total == 0:
            return [0] * len(sizes)
        kept = self.count(total)
        parts = [kept * n // total for n in sizes]
        by_remainder = sorted(range(len(sizes)), key=lambda i: -(kept * sizes[i] % total))
        for i in by_remainder[: kept - sum(parts)]:
            parts[i] += 1
        return parts


@dataclass(frozen=True)
class Coverage(Budget):
    """The fewest tokens that hold a share of the saliency, within bounds: an adaptive budget.

    Saliency is the attention that patches get in the vision encoder (``Attention()``). Only engines that see an image
    before they reserve places can use it; the `transformers` engine does.

    Parameters
    ----------
    value
        Share of the sum of saliency over the tokens that compete, in (0, 1].
    per
        Where the share holds: over a whole span (``"image"``, ``"joint"``) or over each crop (``"crop"``). With
        ``"image"`` each crop keeps as many tokens as it has among those that make up the share.
    least, most
        Bounds on the number of tokens, per span or, with ``per="crop"``, per crop.

    Raises
    ------
    BudgetError
        If the share is not in (0, 1], or the bounds are not whole numbers with ``1 <= least <= most``.
    """

    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.value, float):
            raise BudgetError(f"coverage is a share of the saliency such as 0.9, not {self.value!r}")
        if any(x is not None and type(x) is not int for x in (self.least, self.most)):
            raise BudgetError(
                f"bounds count tokens, so least={self.least!r} and most={self.most!r} must be whole numbers"
            )
        if self.least < 1 or (self.most is not None and self.most < self.least):
            raise BudgetError(f"bounds are 1 <= least <= most, not least={self.least}, most={self.most}")

    def count(self, n: int) -> int:
        raise BudgetError(
            f"{self!r} depends on what an image shows, and is not known from its {n} tokens alone: "
            "use a count or a ratio here"
        )


Keep: TypeAlias = int | float | Budget | Sequence[int | float | Budget] | Mapping[str, int | float | Budget]
"""What users may pass as ``keep``: one budget, one per image of a prompt, or one per kind of span."""


def resolve(keep: Keep, kind: str, ordinal: int) -> Budget:
    """Return the budget that `keep` names for one span.

    Parameters
    ----------
    keep
        One budget for all spans, a sequence with one per span of a prompt, or ``{"image": ..., "video": ...}``.
    kind
        ``"image"`` or ``"video"``.
    ordinal
        Which span of its prompt this is, from 0.
    """
    value = keep
    if isinstance(keep, Mapping):
        if kind not in keep:
            raise BudgetError(f"keep={dict(keep)!r} names no budget for {kind!r}: add one, 1.0 keeps every token")
        value = keep[kind]
    elif isinstance(keep, Sequence):
        if ordinal >= len(keep):
            raise BudgetError(
                f"keep={list(keep)!r} names {len(keep)} budgets, but a prompt holds more images: "
                "give one budget per image, or a single one for all"
            )
        value = keep[ordinal]
    return value if isinstance(value, Budget) else Budget(value)  # type: ignore[arg-type]


class ByKind(dict[str, "int | float | Budget"]):
    """Budgets by kind of span, which can be part of a key as the rest of a reducer can."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def check(keep: Keep) -> None:
    """Raise `BudgetError` unless every budget in `keep` is valid."""
    if isinstance(keep, str):
        raise BudgetError(f"a budget is a count such as 64 or a ratio such as 0.25, not {keep!r}")
    if isinstance(keep, Mapping):
        if not keep or not set(keep) <= {"image", "video"}:
            raise BudgetError(f"budgets by kind have the keys 'image' and 'video', not {sorted(map(str, keep))}")
        for kind in keep:
            resolve(keep, kind, 0)
    elif isinstance(keep, Sequence):
        if not keep:
            raise BudgetError("an empty list of budgets: give one budget per image")
        for i in range(len(keep)):
            resolve(keep, "image", i)
    else:
        resolve(keep, "image", 0)


def parse_keep(text: str) -> Keep:
    """Read a budget.

    ``"32"`` counts tokens, ``"0.1"`` and ``"1.0"`` are ratios, ``"coverage:0.9"`` is a share of the saliency and
    ``"coverage:0.9:16:144"`` bounds it, ``"64,16"`` is one budget per image.
    """
    try:
        values = [_parse_budget(part) for part in text.split(",")]
    except BudgetError:
        raise
    except ValueError as error:
        raise BudgetError(
            f"a budget is a count such as 64, a ratio such as 0.25, a share of the saliency such as coverage:0.9 or "
            f"coverage:0.9:16:144 (at least, at most), or 64,16: not {text!r}"
        ) from error
    return values if "," in text else values[0]


def _parse_budget(text: str) -> int | float | Budget:
    kind, *parts = text.strip().split(":")
    if kind == "coverage" and 1 <= len(parts) <= 3:
        least = int(parts[1]) if len(parts) > 1 else 1
        most = int(parts[2]) if len(parts) > 2 else None
        return Budget.coverage(float(parts[0]), least=least, most=most)
    try:
        return int(text)
    except ValueError:
        return float(text)
