"""The checks of speed: what is measured, what is left out in time, and what is wrong."""

from __future__ import annotations

import pytest
import torch

from foveate.bench import model as bench
from foveate.check import speed
from foveate.check.speed import Cost, selection, whole_model
from foveate.check.verdicts import Minutes
from foveate.methods import FasterVLM, FastV, Uniform

CPU = torch.device("cpu")
GRIDS = ((4, 6), (6, 8))


def test_selection_is_timed_at_every_size():
    verdict = selection([FasterVLM(keep=9), Uniform(keep=9), FastV(keep=9)], CPU, GRIDS, Minutes(5))
    assert verdict.word == "measured"
    rows = {(row["method"], row["tokens"]): row for row in verdict.figures["rows"]}
    assert rows.keys() == {(name, n) for name in ("fastervlm", "uniform") for n in (24, 48)}
    assert [rows["uniform", n]["kept"] for n in (24, 48)] == [2, 5]
    assert all(row["median_ms"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert "cost" not in rows["uniform", 24]
    assert verdict.said == "2 of 2 methods at 24 tokens; 2 of 2 methods at 48 tokens"


def test_what_does_not_fit_is_not_run_and_said(monkeypatch):
    monkeypatch.setattr(speed, "_expected", lambda found, n: Cost(n, 1e6 if found else 0.0, 0.0, 0.0))
    verdict = selection([Uniform(keep=9)], CPU, GRIDS, Minutes(5))
    first, second = verdict.figures["rows"]
    assert (first["verdict"], second["verdict"]) == ("measured", "not run")
    assert second["said"].startswith("expected to take 1000000.00 s")
    assert "0 of 1 methods at 48 tokens (not run: uniform)" in verdict.said
    monkeypatch.setattr(speed, "_expected", lambda found, n: Cost(n, 0.0, 0.0, 1e18 if found else 0.0))
    assert "of memory" in selection([Uniform(keep=9)], CPU, GRIDS, Minutes(5)).figures["rows"][1]["said"]
    verdict = selection([Uniform(keep=9)], CPU, GRIDS, Minutes(0))
    assert verdict.word == "not run"


def test_growth_is_predicted_from_smaller_sizes():
    small, large = Cost(100, 1.0, 0.0, 10.0), Cost(200, 4.0, 0.0, 20.0)
    assert small.at(200, None) == Cost(200, 4.0, 0.0, 40.0)
    assert vars(large.at(400, small)) == pytest.approx(vars(Cost(400, 4 * 2**2.5, 0.0, 20 * 2**1.5)))


def test_a_method_that_fails_is_wrong(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Uniform, "pick", fails)
    verdict = selection([Uniform(keep=9)], CPU, GRIDS, Minutes(5))
    assert verdict.word == "wrong"
    assert "uniform at 24: RuntimeError: no such kernel" in verdict.said


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_a_model_is_measured_in_batches(subject, inside):
    pace = {}
    verdict = whole_model(subject, inside, 2, pace, Minutes(5))
    assert verdict.word in ("right", "slower than unpruned")
    assert pace.keys() == {2}
    arms = {row["arm"]: row for row in verdict.figures["arms"]}
    assert arms.keys() == {"unpruned", "method", "oracle"}
    length, text = 64 + 64 + 7, 64 + 7
    per_column = 2 * 2 * 64 * 4
    layers = [length, length, text + 16, text + 16] if inside else [text + 16] * 4
    assert arms["unpruned"]["kv_bytes"] == 4 * length * per_column
    assert arms["method"]["kv_bytes"] == arms["oracle"]["kv_bytes"] == sum(layers) * per_column
    assert arms["method"]["tokens"] == (2 * (64 + 16) / 2 if inside else 2 * 16)
    assert verdict.figures["config"]["prompts"] == 2
    assert (verdict.figures["comparisons"]["first_token"] > 1) == (verdict.word == "slower than unpruned")


def test_a_cache_that_keeps_too_much_is_wrong(subject, monkeypatch):
    grown = iter(range(100))
    monkeypatch.setattr(bench, "cache_bytes", lambda cache: next(grown))
    verdict = whole_model(subject, False, 1, {}, Minutes(5))
    assert verdict.word == "wrong"
    assert "KV cache" in verdict.said


def test_slower_than_unpruned_is_said(subject, monkeypatch):
    own = speed.run_arms

    def slow(arms, turns, say):
        result = own(arms, 1, say=say)
        result["comparisons"]["first_token"] = 1.25
        return result

    monkeypatch.setattr(speed, "run_arms", slow)
    verdict = whole_model(subject, False, 1, {}, Minutes(5))
    assert verdict.word == "slower than unpruned"
    assert verdict.said.startswith("first token +25.0%")


def test_what_would_take_too_long_is_not_run(subject):
    verdict = whole_model(subject, False, 8, {1: 1000.0}, Minutes(5))
    assert verdict.word == "not run"
    assert "s are left" in verdict.said
