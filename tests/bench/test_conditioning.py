"""Rounding changes nothing of what methods keep, and the bench that says so would tell."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from foveate.bench import exact
from foveate.bench.conditioning import conditioning
from foveate.bench.inputs import random_tokens
from foveate.cli import app
from foveate.core.probes import Attention
from foveate.methods import GPrune, VisPruner
from tiny import METHODS, make, method_id

CHANGES = ("channels", "noise", "threads", "batch")
ENTRIES = [e for e in METHODS if e[0] not in ("codebook", "downsample", "flowcut", "tome")]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("foveate.bench.exact.SIZES", (((8, 12), 24),))


@pytest.mark.parametrize("entry", ENTRIES, ids=method_id)
def test_decisions_do_not_hang_on_rounding(entry, monkeypatch):
    monkeypatch.setattr("foveate.bench.conditioning.GRID", (12, 16))
    (row,) = conditioning([make(entry, 24)], seeds=2)["rows"]
    assert {change: row[change] for change in CHANGES} == {key: {"same": 1.0, "pictures_same": 2} for key in CHANGES}


def test_float32_would_not_do():
    with exact.float32_cosines():
        (row,) = conditioning([VisPruner(keep=64)], seeds=2)["rows"]
    assert row["channels"]["same"] < 0.9


def test_the_command(tmp_path):
    out = tmp_path / "c.json"
    result = CliRunner().invoke(
        app, ["bench", "conditioning", "gprune", "--keep", "9", "--seeds", "1", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "gprune" in result.output
    assert json.loads(out.read_text())["rows"][0]["channels"] == {"same": 1.0, "pictures_same": 1}
    refused = CliRunner().invoke(app, ["bench", "conditioning", "fastv"])
    assert refused.exit_code != 0


@pytest.mark.parametrize("method", [VisPruner, GPrune], ids=lambda m: m.name)
def test_copies_tie_whatever_is_added_first(method):
    from foveate.core.crops import CropBatch
    from foveate.core.probes import Attention, Embeddings, Features

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 9, 128, generator=generator)[:, torch.randint(9, (90,), generator=generator)]
    saliency = torch.rand(1, 90, generator=generator)
    order = torch.randperm(128, generator=generator)
    kept = []
    for x in (features, features[..., order]):
        planes = {Features(): x, Embeddings(): x, Attention(): saliency}
        kept.append(method(keep=20).pick(CropBatch(None, (0,), 90, torch.device("cpu"), planes), 20))
    assert torch.equal(*kept)


@pytest.mark.parametrize("method", [VisPruner(keep=9), GPrune(keep=9)], ids=lambda m: m.name)
def test_the_cost_of_float64(method):
    (row,) = exact.cost(method, repeats=2)
    assert (row["method"], row["tokens"], row["keep"]) == (method.name, 96, 24)
    assert row["float64_ms"] > 0
    assert row["float32_ms"] > 0
    assert 0 < row["same"] <= 1
    # Where no rounding decides, float32 selects the same: its arm is the same method.
    tokens = random_tokens(method.needs, (4, 4))
    planes = {p: [x.sign() if p != Attention() else x for x in plane] for p, plane in tokens.planes.items()}
    tokens = replace(tokens, planes=planes)
    assert torch.equal(exact.IN_FLOAT32[method.name](method, tokens)[0].kept, method.select(tokens)[0].kept)


def test_the_page_shows_what_float64_costs():
    root = Path(__file__).parents[2]
    rows = json.loads((root / "results/conditioning.json").read_text(encoding="utf-8"))["exact_arithmetic_cost"]
    assert [(r["method"], r["tokens"]) for r in rows] == [(m, n) for m in ("gprune", "vispruner") for n in (576, 2880)]
    page = (root / "docs/methods.md").read_text(encoding="utf-8")
    for row in rows:
        shown = f"| `{row['method']}` | {row['tokens']} | {row['keep']} | {row['ratio']} | {100 * row['same']:.0f} % |"
        assert shown in page, shown
