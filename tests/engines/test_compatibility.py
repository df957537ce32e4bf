"""What docs/compatibility.md says of callers is what is found, on every family."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from callers import COLUMNS, PLACES, cell, method_of
from tiny import CORE, FAMILIES, IN_LLM_FAMILIES

FILE = Path(__file__).parents[2] / "results" / "compatibility-callers.json"
MEASURED = json.loads(FILE.read_text(encoding="utf-8"))
NEWEST = max(MEASURED, key=lambda version: [int(part) for part in version.split(".")])


def cases():
    """Yield columns and families, the slower ones as slow tests."""
    for column in COLUMNS:
        for family in FAMILIES:
            shown = (*CORE, "qwen2_5_vl") if column in ("packed", "autocast") else ("llava", "qwen2_5_vl")
            yield pytest.param(column, family, marks=[] if family in shown else pytest.mark.slow)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("column", "family"), cases())
def test_what_the_page_says(column, family, place):
    own = MEASURED.get(transformers.__version__)
    parts = MEASURED.values() if own is None else [own]  # a version in between does as one of them
    assert cell(column, family, place) in {part["families"][family][place][column] for part in parts}


@pytest.mark.parametrize("version", MEASURED)
def test_the_file_is_whole(version):
    part = MEASURED[version]
    assert list(part["families"]) == FAMILIES
    for family, places in part["families"].items():
        assert list(places) == list(PLACES)
        for place, row in places.items():
            assert row.keys() == {"method", *COLUMNS}
            assert row["method"] == method_of(family, place).name
            assert all(row[column] == "yes" or row[column].startswith("refused: ") for column in COLUMNS)
    assert part["seconds"] < 600


def test_no_more_is_refused_than_need_be():
    rows = MEASURED[NEWEST]["families"]
    refused = {(f, p, c) for f in FAMILIES for p in PLACES for c in COLUMNS if rows[f][p][c] != "yes"}
    before, inside = PLACES
    due = {(family, before, "packed") for family in ("gemma3", "lfm2_vl", "qwen3_5")}
    due |= {(family, inside, "packed") for family in FAMILIES}
    due |= {(family, inside, column) for family in {*FAMILIES} - {*IN_LLM_FAMILIES} for column in COLUMNS}
    assert refused == due


@pytest.mark.parametrize("column", COLUMNS)
def test_each_check_would_notice(column, monkeypatch):
    """A method that chooses at random, whoever asks, passes none of them."""
    reducer = method_of("llava", PLACES[0])

    def pick(crops, count):
        return torch.rand(len(crops.ordinals), crops.size).argsort()[:, :count]

    monkeypatch.setattr(type(reducer), "select", lambda self, tokens: tokens.per_crop(self.keep, pick))
    with pytest.raises(AssertionError):
        COLUMNS[column]("llava", reducer)
