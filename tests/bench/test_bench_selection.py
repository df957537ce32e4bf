"""The bench of selections, and the plain loop that it holds VisPruner against."""

import json

import pytest
import torch
from typer.testing import CliRunner

from foveate.bench.inputs import random_tokens
from foveate.bench.naive import plain_selection
from foveate.bench.selection import against_plain, selection
from foveate.cli import app
from foveate.core.probes import Attention, ClsToken, Features, Keys, Query
from foveate.methods import VisPruner
from foveate.registry import load_reducer


def test_plain_loop_follows_its_steps():
    """Two pairs of copies, of which each round drops one; by hand, with one token chosen by attention."""
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]]])
    saliency = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
    # Kept: 4. The rest by attention: 3, 2, 1, 0; even ranks 3 and 1, odd ranks 2 and 0. Both have a near copy.
    assert plain_selection(features, saliency, 2, step=1).tolist() == [[2, 4]]
    assert plain_selection(features, saliency, 5).tolist() == [[0, 1, 2, 3, 4]]


def test_vispruner_equals_the_plain_loop_and_is_faster():
    found = against_plain(inputs=60, repeats=4)
    assert found["identical"] == found["inputs"] == 60
    assert found["ratio_of_fastest"] > 2  # about 7 on a machine that does nothing else; see results/selection.json


@pytest.mark.slow
def test_every_method_has_a_time_at_every_size():
    reducers = [load_reducer(name, keep=9) for name in ("vispruner", "fastervlm", "downsample")]
    result = selection(reducers, grids=((8, 8), (8, 16)), batches=(1, 2), repeats=2)
    assert [(r["method"], r["tokens"], r["batch"]) for r in result["rows"]] == [
        (name, tokens, batch) for tokens in (64, 128) for batch in (1, 2) for name in ("vispruner", "fastervlm")
    ]
    assert all(row["median_ms"] > 0 and row["p90_ms"] >= row["median_ms"] for row in result["rows"])
    assert [row["of_vispruner"] for row in result["rows"] if row["method"] == "vispruner"] == [1.0] * 4
    assert result["left_out"] == {"downsample": "stage pixels"}
    assert result["machine"]["threads"] == 1


def test_random_tokens_have_the_shapes_of_their_probes():
    probes = (Features(), Attention(layers=(-2, -1)), Keys(), ClsToken(), Query())
    tokens = random_tokens(probes, (4, 6), batch=2, frames=3)
    assert [(s.kind, s.grid, len(s)) for s in tokens.spans] == [("video", (3, 4, 6), 72)] * 2
    shapes = {type(probe): [tuple(x.shape) for x in plane] for probe, plane in tokens.planes.items()}
    assert shapes == {Features: [(24, 1024)] * 6, Attention: [(24, 2)] * 6, Keys: [(24, 64)] * 6}
    assert tokens.cls
    assert len(tokens.queries) == 2
    (one, _) = VisPruner(keep=9).select(random_tokens(VisPruner(keep=9).needs, (4, 6), batch=2))
    assert len(one) == 9


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.bench.selection.GRIDS", ((8, 8),))
    monkeypatch.setattr("foveate.bench.selection.against_plain", lambda **_: {})
    out = tmp_path / "selection.json"
    arguments = ["bench", "selection", "uniform", "--keep", "5", "--repeats", "1", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(out.read_text())
    assert {row["method"] for row in json.loads(result.stdout)["rows"]} == {"vispruner", "uniform"}


def test_methods_get_what_they_need_or_are_left_out(monkeypatch):
    monkeypatch.setattr("foveate.bench.selection.GRIDS", ((8, 8),))
    monkeypatch.setattr("foveate.bench.selection.against_plain", lambda **_: {})
    monkeypatch.setattr(
        "foveate.registry.list_methods", lambda: ["chain", "codebook", "dyvte", "evs", "fastv", "uniform"]
    )
    result = CliRunner().invoke(app, ["bench", "selection", "--keep", "9", "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [row["method"] for row in data["rows"]] == ["vispruner", "codebook", "evs", "uniform"] * 2
    assert data["rows"][1]["reducer"] == "CodebookPruner(keep=9, codebook='random.safetensors', score='cosine')"
    assert data["left_out"] == {"chain": "needs reducers", "dyvte": "needs gates", "fastv": "stage in_llm"}


@pytest.mark.parametrize("name", ["nothing"])
def test_unknown_method(name):
    result = CliRunner().invoke(app, ["bench", "selection", name])
    assert result.exit_code == 2
    assert "no method is called" in result.stderr
