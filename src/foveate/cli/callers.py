"""What was measured of callers, as a section of the page that `foveate table` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from foveate.measure.pages import markdown_table

Families: TypeAlias = Mapping[str, Mapping[str, Mapping[str, str]]]
"""By family, place and column."""

YES = "yes"

_SECTION = """\

## Callers

Measured on a tiny random model of each family with transformers {version} (`python tests/record_compatibility.py`),
with a method before the LLM and with one inside it. ✓: as below; a number: refused, for the reason that follows.

- packed: two prompts in one row, told apart by position ids that begin anew and by `cu_seq_lens_*`, get the logits that
  each gets alone.
- autocast: under bfloat16 and float16 a method reads and keeps the same of equal features, and logits are finite.
- offload: with weights that `accelerate` has put on the CPU or on disk, logits are the same to the last bit. The patch
  embeddings of `glm4v`, `idefics3` and `lfm2_vl` stay where they are, as their stock models fail otherwise.
- threads: two threads that generate with one attached model get the logits that each gets by itself.
- checkpointing: in training, gradients are those without gradient checkpointing, reentrant or not.

{tables}

{reasons}
"""


def section(measured: Mapping[str, Any]) -> str:
    """Return the section.

    Parameters
    ----------
    measured
        What tests/record_compatibility.py wrote: a part for each version of transformers.
    """
    version, *older = sorted(measured, key=lambda v: [int(part) for part in v.split(".")], reverse=True)
    newest: Families = measured[version]["families"]
    reasons: dict[str, int] = {}
    tables = []
    for place in next(iter(newest.values())):
        rows = []
        for family, places in newest.items():
            own = {column: cell for column, cell in places[place].items() if column != "method"}
            marks = ("✓" if cell == YES else str(_number(cell, reasons)) for cell in own.values())
            rows.append([f"`{family}`", f"`{places[place]['method']}`", *marks])
        tables.append(markdown_table([place, "method", *own], rows))
    text = _SECTION.format(
        version=version,
        tables="\n\n".join(tables),
        reasons="\n".join(f"{number}. {cell.removeprefix('refused: ')}" for cell, number in reasons.items()),
    )
    for name in older:
        changes: dict[str, list[str]] = {}
        for family, place, column, cell in _changes(newest, measured[name]["families"]):
            changes.setdefault(f"{column} {place} is {cell}", []).append(f"`{family}`")
        lines = [f"- {change} ({', '.join(families)})" for change, families in changes.items()]
        text += "\n".join([f"\nWhat differs with transformers {name}, also measured:\n", *lines, ""])
    return text


def _number(cell: str, reasons: dict[str, int]) -> int:
    return reasons.setdefault(cell, len(reasons) + 1)


def _changes(newest: Families, other: Families) -> Iterator[tuple[str, str, str, str]]:
    """Yield the family, place, column and content of each cell that is another one with another version."""
    for family, places in other.items():
        for place, columns in places.items():
            for column, cell in columns.items():
                if cell != newest[family][place][column]:
                    yield family, place, column, cell
