"""How selections grow: what is measured, and what becomes of a method that takes too long."""

import json

import pytest
from typer.testing import CliRunner

from foveate.bench.growth import growth, growth_table, measure
from foveate.cli import app
from foveate.methods import EVS, FasterVLM, Random
from foveate.registry import load_reducer


@pytest.fixture(autouse=True)
def _without_loops(monkeypatch):
    """Leave out the plain loops, which take minutes; they have tests of their own."""
    monkeypatch.setattr("foveate.bench.growth.against_loops", lambda: {"rows": []})
    monkeypatch.setattr("foveate.bench.growth.larger_rounds", dict)


def test_what_is_measured_of_a_method():
    row = measure(load_reducer("mmr", keep=1 / 9), 24)
    assert row["kept"] == 64
    assert min(row["units"], row["seconds"]) > 0
    cosines = 576 * 576 * 4
    assert cosines < row["peak_bytes"] < 20 * cosines
    assert measure(EVS(keep=0.25), 16)["kept"] == 64


@pytest.mark.slow
def test_every_method_runs_in_a_process_of_its_own():
    result = growth([FasterVLM(keep=1 / 9), Random(keep=1 / 9)], sides=(6, 12))
    assert [(row["method"], row["tokens"], row["kept"]) for row in result["rows"]] == [
        ("fastervlm", 36, 4), ("fastervlm", 144, 16), ("random", 36, 4), ("random", 144, 16)
    ]  # fmt: skip
    assert result["machine"]["threads"] == 1


def test_a_method_that_takes_too_long_is_stopped():
    (row,) = growth([FasterVLM(keep=1 / 9)], sides=(6, 12), limit=0.01)["rows"]
    assert (row["tokens"], row["stopped"]) == (36, "after 0.01 s")
    assert "seconds" not in row


class Fails(FasterVLM):
    def select(self, tokens):
        raise SystemExit(3)


@pytest.mark.slow
def test_a_method_that_fails_stops_no_other():
    result = growth([Fails(keep=1 / 9), FasterVLM(keep=1 / 9)], sides=(6,))
    assert [row.get("stopped") for row in result["rows"]] == ["exit code 3", None]


def test_table():
    def row(method, tokens, **more):
        return {"method": method, "tokens": tokens, **more}

    rows = [
        row("a", 576, seconds=0.5, units=1.25, peak_bytes=1),
        row("a", 9216, seconds=128.0, units=2.0, peak_bytes=2**20),
        row("b", 576, seconds=0.5, units=9.5, peak_bytes=1),
        row("b", 9216, stopped="after 9 s"),
        row("c", 576, stopped="exit code 1"),
    ]
    assert growth_table({"rows": rows}).splitlines()[2:] == [
        "| `a` | 1.25 | 2.00 | N^2.0 | 1 MiB |",
        "| `b` | 9.50 | after 9 s | - | - |",
        "| `c` | exit code 1 | - | - | - |",
    ]


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.bench.growth.SIDES", (6,))
    out, page = tmp_path / "growth.json", tmp_path / "page.md"
    result = CliRunner().invoke(app, ["bench", "selection", "uniform", "--growth", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(out.read_text())
    page.write_text("<!-- growth -->\n<!-- /growth -->\n")
    assert CliRunner().invoke(app, ["bench", "report", str(out), "--page", str(page)]).exit_code == 0
    assert "| `uniform` | 0." in page.read_text()


@pytest.mark.parametrize("options", [["--growth", "--keep", "9"], ["--limit", "3"]])
def test_options_that_mean_nothing_are_refused(options):
    result = CliRunner().invoke(app, ["bench", "selection", "uniform", *options])
    assert result.exit_code == 2
    assert "leave out" in result.stderr
