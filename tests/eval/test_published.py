from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from foveate.core.errors import InputError, UnknownNameError
from foveate.eval import published
from foveate.eval.published import KNOWN, beside, numbers, of_method, read
from foveate.registry import list_methods

FILES = sorted(published.FOLDER.glob("*.json"))


def test_all_files_are_read():
    assert len(FILES) > 20
    assert len({number.source for number in numbers()}) == len(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_follow_the_schema(file: Path):
    found = list(read(file))
    assert found
    for number in found:
        assert number.known in KNOWN
        assert math.isfinite(number.value)
        assert number.value >= 0
        assert (number.budget is None) or (number.budget <= (number.visual_tokens or math.inf)), number
        assert number.budget is not None or number.setting or number.method == "unpruned", number
        if number.unit == "%":
            assert number.value <= 100 or number.benchmark == "mean", number
        if number.known == "paper":
            assert re.fullmatch(r"arXiv:\d{4}\.\d{5}(v\d)?", number.source), number
        assert number.to_dict()["verified"] == (number.known in ("paper", "repository"))


def test_no_number_is_on_file_twice():
    keys = [(n.source, n.method, n.model, n.budget, n.setting, n.benchmark) for n in numbers()]
    doubled = {key for key in keys if keys.count(key) > 1}
    assert not doubled


def test_relative_averages_follow_from_the_benchmarks():
    """A slip of a digit would show: recompute the mean of ratios of VisPruner's table."""
    table = [n for n in numbers() if n.source == "arXiv:2412.01818v2" and n.model == "LLaVA-1.5-7B"]
    full = {n.benchmark: n.value for n in table if n.method == "unpruned"}
    rows = {(n.method, n.budget) for n in table} - {("unpruned", 576)}
    checked = 0
    for method, budget in rows:
        own = {n.benchmark: n.value for n in table if (n.method, n.budget) == (method, budget)}
        if len(own) > 1:
            stated = own.pop("relative")
            mean = sum(100 * value / full[name] for name, value in own.items()) / len(own)
            assert mean == pytest.approx(stated, abs=0.35), (method, budget)
            checked += 1
    assert checked == 14


def test_known_numbers():
    gqa = [n for n in of_method("vispruner") if (n.benchmark, n.budget, n.model) == ("GQA", 64, "LLaVA-1.5-7B")]
    assert {(n.value, n.known) for n in gqa} == {(55.4, "paper"), (55.8, "secondary"), (55.59, "secondary")}
    assert any(not n.verified for n in of_method("fastv"))


def test_methods_of_foveate_are_called_by_their_names():
    known = set(list_methods())
    stated = {number.method for number in numbers()}
    lacking = known - stated
    # Baselines, and methods of which the sources give no table.
    assert {"random", "uniform", "pool", "downsample", "chain", "mmtok", "codebook", "mmr"} <= lacking
    assert {"vispruner", "fastervlm", "cdpruner", "divprune", "prumerge+", "vtc_cls", "tome"} <= stated


def test_unknown_methods_are_answered_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="vispruner"):
        of_method("nothing")


def _table(**changes: Any) -> dict[str, Any]:
    row = {"method": "vispruner", "budget": 64, "values": [1.0]}
    table = {"model": "M", "visual_tokens": 576, "known": "paper", "benchmarks": ["GQA"], "rows": [row]}
    return {"source": "s", "title": "t", "tables": [{**table, **changes}]}


@pytest.mark.parametrize(("data", "fault"), [
    ({"source": "s"}, "title"),
    ([], "entry"),
    (_table(known="rumour"), "rumour"),
    (_table(benchmarks=["GQA", "POPE"]), "1 values for 2"),
    (_table(visual_tokens="many"), "many"),
    (_table(rows=[{"method": "vispruner", "values": [1.0]}]), "budget"),
    (_table(rows=[{"method": "vispruner", "budget": 64, "values": [1.0], "note": "x"}]), "note"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, data: Any, fault: str):
    file = tmp_path / "numbers.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=fault):
        list(read(file))


def _benchmark_run(
    model: str, method: dict[str, Any] | None, kept: float, equivalent: float | None = None
) -> dict[str, Any]:
    counts = {"kept_tokens": kept, "equivalent_tokens": kept if equivalent is None else equivalent}
    return {
        "results": {"gqa": {"alias": "gqa", "exact_match,none": 0.561, "exact_match_stderr,none": 0.01},
                    "own_task": {"exact_match,none": 0.5}},
        "foveate": {"model": model, "method": method, "tasks": {"gqa": counts}},
    }  # fmt: skip


def test_benchmarks_are_held_against_the_same_model_method_and_budget(tmp_path: Path):
    file = tmp_path / "run.json"
    method = {"method": "vispruner", "keep": 64}
    file.write_text(json.dumps(_benchmark_run("llava-hf/llava-1.5-7b-hf", method, 64.0)))
    pairs = beside(file)
    assert {pair["published"] for pair in pairs} == {55.4, 55.8, 55.59}
    assert {pair["ours"] for pair in pairs} == {56.1}
    assert {pair["published_model"] for pair in pairs} == {"LLaVA-1.5-7B"}
    file.write_text(json.dumps(_benchmark_run("llava-hf/llava-1.5-7b-hf", None, 576.0)))
    assert {pair["method"] for pair in beside(file)} == {"unpruned"}


def test_methods_inside_the_llm_are_compared_by_their_mean_over_layers(tmp_path: Path):
    file = tmp_path / "run.json"
    stated = {n.value for n in of_method("fastv") if (n.model, n.benchmark, n.budget) == ("LLaVA-1.5-7B", "GQA", 64)}
    run = _benchmark_run("llava-hf/llava-1.5-7b-hf", {"method": "fastv", "equivalent": 64}, 29.9, 64.03)
    file.write_text(json.dumps(run))
    pairs = beside(file)
    assert stated
    assert {pair["published"] for pair in pairs} == stated
    assert {pair["published_budget"] for pair in pairs} == {64}
    assert {pair["budget"] for pair in pairs} == {64.03}


def test_results_without_a_mean_over_layers_are_compared_by_what_is_kept(tmp_path: Path):
    file = tmp_path / "run.json"
    run = _benchmark_run("llava-hf/llava-1.5-7b-hf", {"method": "vispruner", "keep": 64}, 64.0)
    del run["foveate"]["tasks"]["gqa"]["equivalent_tokens"]
    file.write_text(json.dumps(run))
    assert {pair["published_budget"] for pair in beside(file)} == {64}


@pytest.mark.parametrize("run", [
    _benchmark_run("llava-hf/llava-1.5-7b-hf", {"method": "vispruner", "keep": 65}, 65.0),
    _benchmark_run("llava-hf/llava-1.5-7b-hf", {"method": "fastv", "keep": 64}, 64.0, 96.0),
    _benchmark_run("llava-hf/llava-1.5-70b-hf", {"method": "vispruner", "keep": 64}, 64.0),
])  # fmt: skip
def test_what_nobody_published_is_said(tmp_path: Path, run: dict[str, Any]):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run))
    with pytest.raises(InputError, match="nothing published"):
        beside(file)


def test_a_leaderboard_is_held_against_similar_shares(tmp_path: Path):
    row = {"method": "vispruner", "tokens": 64.0, "relative": {"average": 97.5}}
    file = tmp_path / "board.json"
    file.write_text(json.dumps({"config": {"visual_tokens": 256, "model": "nano"}, "rows": [row]}))
    pairs = beside(file)
    assert pairs
    budgets = {(pair["published_model"], pair["published_budget"]) for pair in pairs}
    assert ("LLaVA-1.5-7B", 128) in budgets  # 22 % of 576, against 25 %
    assert ("LLaVA-1.5-7B", 64) not in budgets
    assert {pair["ours"] for pair in pairs} == {97.5}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"results": {}}', '{"config": {}, "rows": 3}'])
def test_other_results_are_refused(tmp_path: Path, text: str):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(InputError, match="neither a leaderboard"):
        beside(file)
