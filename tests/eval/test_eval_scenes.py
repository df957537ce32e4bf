from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate import nano
from foveate.errors import FoveateError, InputError
from foveate.eval import leaderboard, scenes
from foveate.eval.plot import plot
from foveate.methods import Random, VisPruner
from foveate.reducer import list_methods

pytestmark = pytest.mark.skipif(not (nano.WEIGHTS / "config.json").is_file(), reason="nano is not trained yet")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return nano.load()[0]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "BLOCK", 2)


def _entries() -> list[scenes.Entry]:
    return [
        scenes.Entry(scenes.UNPRUNED), scenes.Entry(scenes.BLIND), scenes.Entry("vispruner", 32, (VisPruner(keep=32),)),
        scenes.Entry("random", 32, scenes.draws(Random(keep=32))),
    ]  # fmt: skip


def test_every_method_is_compared_or_left_out_for_a_reason(model: Any):
    found, left_out = scenes.entries(model, [], [32], 256)
    compared, reasons = {entry.method for entry in found}, {one["method"]: one["reason"] for one in left_out}
    assert compared - {scenes.UNPRUNED, scenes.BLIND} | set(reasons) == set(list_methods())
    assert not compared & set(reasons)
    assert {"random", "uniform", "pool", "downsample", "vispruner", "cdpruner", "tome"} <= compared
    assert "images alone" in reasons["evs"]
    assert "codebook" in reasons["codebook"]


def test_baselines_stand_beside_the_methods_asked_for(model: Any):
    found, _ = scenes.entries(model, ["divprune"], [64, 16], 256)
    assert [(e.method, e.budget) for e in found[2:]] == [
        (name, budget) for name in ("random", "uniform", "pool", "downsample", "divprune") for budget in (64, 16)
    ]
    assert [len(entry.reducers) for entry in found[2:4]] == [scenes.DRAWS] * 2


def test_methods_in_files_are_compared_too(model: Any, tmp_path: Path):
    VisPruner(keep=64, important_ratio=0.75).save(tmp_path / "own.json")
    found, _ = scenes.entries(model, [str(tmp_path / "own.json")], [16], 256)
    assert found[-1].reducers == (VisPruner(keep=16, important_ratio=0.75),)


@pytest.mark.parametrize("method", ["evs", "nothing", "codebook", "nowhere.json"])
def test_methods_asked_for_must_run(model: Any, method: str):
    with pytest.raises(FoveateError):
        scenes.entries(model, [method], [32], 256)


def test_methods_inside_the_llm_get_as_many_equivalent_tokens():
    reducer = scenes.equal_tokens("fastv", 160, 256, 4)
    assert reducer.schedule(4, 256) == (256, 256, 64, 64)
    with pytest.raises(FoveateError, match="cannot come down to 64"):
        scenes.equal_tokens("fastv", 64, 256, 4)


def test_answers_on_disk_are_not_asked_for_again(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    ask = scenes.ask_all

    def counted(model: Any, processor: Any, shown: Any, conditions: Any) -> Any:
        for scene, answered in zip(seen := list(shown), ask(model, processor, seen, conditions), strict=True):
            asked.append(scene.index)
            yield answered

    monkeypatch.setattr(scenes, "ask_all", counted)
    rows, steps = tmp_path / "board.rows.jsonl", []
    first = scenes.collect(_entries()[:3], 2, 0, rows, progress=lambda done, total: steps.append((done, total)))
    assert asked == [0, 1]
    assert steps == [(0, 6), (3, 6), (6, 6)]
    text = rows.read_text()
    rows.write_text(text + text[:40])  # as an interrupted run leaves it
    again = scenes.collect(_entries()[:3], 2, 0, rows)
    assert asked == [0, 1]
    assert rows.read_text() == text
    for name, answers in first.items():
        assert (answers.right == again[name].right).all()
    more = scenes.collect(_entries(), 4, 0, rows)  # another method, further images
    assert asked == [0, 1, 0, 1, 2, 3]
    assert len(rows.read_text().splitlines()) == 2 * (3 + scenes.DRAWS)
    assert (more["vispruner 32 0"].right[:2] == first["vispruner 32 0"].right).all()
    scenes.collect(_entries()[:3], 2, 1, rows)  # another seed
    assert asked[-2:] == [0, 1]
    assert len(asked) == 8


def test_answers_count_what_they_should(small: None, tmp_path: Path):
    found = scenes.collect(_entries()[:3], 2, 0, tmp_path / "rows.jsonl")
    unpruned, pruned = found[scenes.UNPRUNED], found["vispruner 32 0"]
    asked = [len(nano.scene("test", 0, index).questions) for index in range(2)]
    assert unpruned.asked.sum(axis=1).tolist() == asked
    assert (unpruned.right <= unpruned.asked).all()
    assert found[scenes.BLIND].asked.sum(axis=1).tolist() == [0, asked[0]]
    assert pruned.kept == 32
    assert (pruned.agreed <= asked).all()
    assert pruned.agreed.sum() > sum(asked) / 2


def test_other_files_are_no_rows(small: None, tmp_path: Path):
    rows = tmp_path / "x.jsonl"
    rows.write_text("{}\n")
    with pytest.raises(InputError, match="no rows"):
        scenes.collect(_entries(), 2, 0, rows)
    with pytest.raises(InputError, match="multiple"):
        scenes.collect(_entries(), 3, 0, tmp_path / "y.jsonl")


@pytest.mark.slow
def test_leaderboard(small: None, tmp_path: Path):
    result = leaderboard.leaderboard(["vispruner"], [32, 16], 2, 0, tmp_path / "board.rows.jsonl")
    assert json.loads(json.dumps(result)) == result
    for budget in (32, 16):
        rows = [row for row in result["rows"] if row["budget"] == budget]
        assert {row["method"] for row in rows} == {"random", "uniform", "pool", "downsample", "vispruner"}
        averages = [row["relative"]["average"] for row in rows]
        assert averages == sorted(averages, reverse=True)
        best = rows[0]["method"]
        for row in rows:
            others = {"random", "uniform", "pool", "downsample", "best"} - {row["method"]}
            assert set(row["against"]) == others - ({"best"} if row["method"] == best else set())
            assert row["worst"]["relative"] == min(kind["relative"] for kind in row["kinds"].values())
            assert 0 < row["cost"]["of_unpruned"] < 1
    costs = {(row["method"], row["budget"]): row["cost"]["flops"]["total"] for row in result["rows"]}
    assert costs["downsample", 32] < costs["uniform", 16] < costs["uniform", 32]  # only it makes the tower cheaper
    shown = leaderboard.tables(result)
    assert list(shown) == ["leaderboard-about", "leaderboard-32", "leaderboard-16"]
    assert "`vispruner`" in shown["leaderboard-16"]
    plot(result, tmp_path / "board.svg")
    picture = (tmp_path / "board.svg").read_text()
    plot(result, tmp_path / "board.svg")
    assert (tmp_path / "board.svg").read_text() == picture
    with pytest.raises(InputError, match="cannot write"):
        plot(result, tmp_path / "board.nothing")


def test_methods_for_two_models_are_left_out():
    model, _ = nano.load()
    _, left_out = scenes.entries(model, (), (128,), 256)
    reasons = {row["method"]: row["reason"] for row in left_out}
    assert "foveate.guide" in reasons["sgl"]
    assert "gates" in reasons["dyvte"]
