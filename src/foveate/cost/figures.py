"""What `foveate cost` tells: a prefill before and after reduction, and each decoded token behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.in_llm import solved
from foveate.core.reducer import Method
from foveate.cost.anatomy import Anatomy
from foveate.cost.flops import decode_flops, kv_bytes
from foveate.cost.formulas import FORMULAS, PerLayer, equivalent_tokens, per_layer
from foveate.cost.prefill import arm_cost, decided
from foveate.cost.work import Work

FORMULA_NAMES = ("true", *FORMULAS)


@dataclass(frozen=True)
class Figures:
    """One arm of a report.

    Attributes
    ----------
    per_layer
        Visual tokens that each layer of the LLM receives.
    flops
        Of the prefill, by part, and of one decoded token.
    macs
        Multiply-accumulates by the formula of each paper.
    """

    per_layer: list[int]
    flops: dict[str, int]
    macs: dict[str, int]
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-compatible data."""
        counts = self.per_layer
        return {
            "visual_tokens": counts[0],
            "equivalent_tokens": {"input": equivalent_tokens(counts), "output": equivalent_tokens(counts, "output")},
            **({"visual_tokens_per_layer": counts} if len(set(counts)) > 1 else {}),
            "flops": self.flops,
            "macs": self.macs,
            "kv_bytes": self.kv_bytes,
        }


def figures(
    anatomy: Anatomy, work: Work, text_tokens: int, reducer: Method | None, bytes_per_value: int = 2
) -> Figures:
    """Count an arm: stock (`None`) or with a method."""
    text = anatomy.model.config.get_text_config()
    kept: PerLayer
    kept, decision = (work.tokens, 0) if reducer is None else decided(anatomy, work, reducer, text_tokens)
    stock = reducer is None or kept == work.tokens
    cost = arm_cost(anatomy, work, text_tokens, None if stock else reducer, kept, decision)
    counts = per_layer(kept, len(anatomy.decoder))
    cached = [text_tokens + n for n in counts]
    macs = {
        "fastv": FORMULAS["fastv"](text, counts, text_tokens),
        "pyramiddrop": FORMULAS["pyramiddrop"](text, counts),
    }  # fmt: skip
    flops = {**cost.to_dict(), "decode_per_token": decode_flops(anatomy, cached)}
    return Figures(counts, flops, macs, kv_bytes(text, cached, bytes_per_value))


def report(
    anatomy: Anatomy, work: Work, reducer: Method, text_tokens: int, dtype: str = "bfloat16", formula: str = "true"
) -> dict[str, Any]:
    """Compare the stock model with a method, as JSON-compatible data.

    Parameters
    ----------
    text_tokens
        Tokens of the prompt beside those of images.
    dtype
        Of the KV cache.
    formula
        ``"true"``, or the paper whose multiply-accumulates the change is stated in.

    Raises
    ------
    InputError
        If the formula or the dtype is unknown.
    BudgetError
        If there are budgets for more images than the prompt has.
    UnsupportedModelError
        If the method does not run on the family.
    """
    if formula not in FORMULA_NAMES:
        raise InputError(f"a formula is one of {', '.join(FORMULA_NAMES)}, not {formula!r}")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"dtype is float32, bfloat16, float16 or an 8-bit float, not {dtype!r}")
    reducer.check_images(len(work.spans))
    if text_tokens < 0:
        raise InputError(f"a prompt cannot have {text_tokens} text tokens")
    if lacking := anatomy.family.lacks(reducer):
        raise UnsupportedModelError(
            f"{reducer.name} needs {lacking}, which the family {anatomy.family.name!r} does not give"
        )
    before, after = (figures(anatomy, work, text_tokens, method, kind.itemsize) for method in (None, reducer))
    return {
        "family": anatomy.family.name,
        "method": repr(solved(reducer, len(anatomy.decoder), [len(span) for span in work.spans])),
        "stage": reducer.stage,
        "complexity": reducer.complexity,
        "text_tokens": text_tokens,
        "dtype": dtype,
        "formula": formula,
        "upper_bound": bool(deciding(reducer)),
        "guided": any(stage.guided for stage in reducer.stages()),
        "before": before.to_dict(),
        "after": after.to_dict(),
        "change": {
            "cost": _change(_counted(before, formula), _counted(after, formula)),
            "flops": {part: _change(before.flops[part], after.flops[part]) for part in before.flops},
            "macs": {name: _change(before.macs[name], after.macs[name]) for name in before.macs},
            "kv_bytes": _change(before.kv_bytes, after.kv_bytes),
        },
    }


def deciding(reducer: Method) -> list[str]:
    """Return the names of those stages of a method that decide how many tokens stay, whose costs are upper bounds."""
    return list(dict.fromkeys(stage.name for stage in reducer.stages() if stage.adaptive))


def _counted(arm: Figures, formula: str) -> int:
    return arm.flops["total"] if formula == "true" else arm.macs[formula]


def _change(before: int, after: int) -> float | None:
    return after / before - 1 if before else None


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return reports as a Markdown table: true FLOPs in units of 10^12."""
    lines = [
        "| model | visual tokens | vision and projector, T | selection, G | LLM, T | prefill in all, T "
        "| of it, LLM alone | KV cache, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        before, after, change = row["before"], row["after"], row["change"]
        parts, flops = (before["flops"], after["flops"]), change["flops"]
        encoded, llm, total = (
            " → ".join(f"{sum(arm[name] for name in names) / 1e12:.2f}" for arm in parts)
            for names in (("vision", "projector"), ("prefill",), ("total",))
        )
        cache = " → ".join(f"{arm['kv_bytes'] / 2**20:,.0f}" for arm in (before, after))
        lines.append(
            f"| {row['model']} | {before['visual_tokens']:,} → {after['visual_tokens']:,} | {encoded} "
            f"| {after['flops']['selection'] / 1e9:.1f} | {llm} | {total} ({flops['total']:+.1%}) "
            f"| {flops['prefill']:+.1%} | {cache} |"
        )
    return "\n".join(lines)
