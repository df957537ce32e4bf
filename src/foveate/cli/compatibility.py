"""Which methods run on which families: one table, worked out from what both declare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.cli.callers import section
from foveate.core.probes import (
    Attention,
    ClsSimilarity,
    ClsToken,
    Embeddings,
    Features,
    Keys,
    LayerAttention,
    LayerKeys,
    LayerProbe,
    LayerStates,
    Prior,
    Query,
    TextStates,
)
from foveate.core.reducer import Method, all_needs, declared
from foveate.families import Family, all_families
from foveate.measure.pages import markdown_table
from foveate.registry import by_default, list_methods

YES, SOME, NO = "yes", "some", "no"
MARKS = {YES: "✓", SOME: "(✓)", NO: "-"}

_PAGE = """\
# Compatibility

`foveate table --callers results/compatibility-callers.json` writes this page. A method runs on a family if the family
gives everything that the method reads; where it does not, `foveate.reduce` and `foveate.attach` say what is missing and
which methods run.

✓: runs. (✓): for `generic`, runs on the images whose token grid is known, which are those with a square number of
tokens, or on the models whose [attention can be read](families/generic.md#attention). -: the family lacks what the
method needs, with its default parameters.

## What methods read

{facts}

A complexity is that of the selection, per crop of N tokens of width C (features) or D (embeddings), of which T stay,
with M tokens of text; probes are extra. `-` in the column of papers: a baseline, or a method whose paper is not known.

## Methods and families

{methods}

`chain` runs wherever all of its methods do. Adaptive budgets (`Budget.coverage`) need the attention of the vision
encoder.
{callers}
## What families give

{families}
"""


def runs(method: Method | type[Method], family: Family) -> str:
    """Return whether a method runs on a family: ``"yes"``, ``"no"``, or on ``"some"`` images or models."""
    if family.lacks(method) or (method.video_only and "video" not in family.kinds):
        return NO
    if family.opaque and any(isinstance(probe, LayerProbe) for probe in declared(method, "needs")):
        return SOME
    return SOME if declared(method, "reads_grid") and not family.has_grid else YES


def table() -> dict[str, Any]:
    """Return the table as JSON-compatible data."""
    names = [name for name in list_methods() if name != "chain"]
    return {
        "families": [
            {
                "name": family.name,
                "model_types": list(family.model_types),
                "inputs": list(family.kinds),
                "cls": family.has_cls,
                "attention": family.has_attention,
                "grid": family.has_grid,
                "resizes": family.resizes,
                "positions": ["original"] if family.keeps_positions else ["original", "compact"],
            }
            for family in all_families().values()
        ],
        "methods": [
            {"name": name, "families": {f.name: runs(by_default(name), f) for f in all_families().values()}}
            for name in names
        ],
    }


def reads(method: Method | type[Method]) -> list[str]:
    """Return what a method reads, in words."""
    probes = all_needs(method) if isinstance(method, Method) else declared(method, "needs")
    words = dict.fromkeys(_WORDS.get(type(probe), "attention layers") for probe in probes)
    return [*words, *["the grid"] * bool(declared(method, "reads_grid"))]


_WORDS: dict[type, str] = {
    Features: "features", Embeddings: "embeddings", ClsToken: "the `[CLS]` token", Query: "the question",
    ClsSimilarity: "similarity to `[CLS]`", TextStates: "states of the text",
    Attention: "attention", Keys: "keys", LayerAttention: "LLM attention", LayerKeys: "LLM keys",
    LayerStates: "hidden states", Prior: "scores of the tokens before the LLM",
}  # fmt: skip


def _facts(name: str) -> list[str]:
    method = by_default(name)
    paper = method.paper.removeprefix("arXiv:")
    link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "-"
    read = ", ".join(reads(method)) or "nothing"
    return [f"`{name}`", link, method.stage, read, declared(method, "merges") or "no", method.complexity]


def _attention(family: str) -> str:
    known = all_families()[family]
    if not known.has_attention:
        return NO
    return SOME if known.opaque else YES  # of other models, some give it


def page(measured: Mapping[str, Any] | None = None) -> str:
    """Return the table as a page of markdown, with a section on what was `measured` of callers."""
    data = table()
    facts = [_facts(row["name"]) for row in data["methods"]]
    families = [f["name"] for f in data["families"]]
    methods = [[f"`{row['name']}`", *(MARKS[row["families"][f]] for f in families)] for row in data["methods"]]
    columns = ("model types", "takes", "`[CLS]`", "attention", "grid", "smaller pictures", "positions")
    given = [
        [
            f"`{f['name']}`", ", ".join(f["model_types"]) or "any other", ", ".join(f["inputs"]),
            MARKS[YES if f["cls"] else NO], MARKS[_attention(f["name"])],
            MARKS[YES if f["grid"] else SOME], MARKS[YES if f["resizes"] else NO], ", ".join(f["positions"]),
        ]
        for f in data["families"]
    ]  # fmt: skip
    return _PAGE.format(
        facts=markdown_table(["method", "paper", "stage", "reads", "merges", "complexity"], facts),
        methods=markdown_table(["method", *(f"`{f}`" for f in families)], methods),
        callers="" if measured is None else section(measured),
        families=markdown_table(["family", *columns], given),
    )
