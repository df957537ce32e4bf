from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate import Budget, attach, nano
from foveate.core.errors import FoveateError, InputError
from foveate.core.in_llm import tokens_per_layer
from foveate.eval import leaderboard, scenes
from foveate.eval.plot import plot
from foveate.measure.job import prepare
from foveate.methods import CDPruner, FastV, FlowCut, Pool, Random, ToMe, VisPruner
from foveate.methods.chain import Chain
from foveate.nano.runner import Condition, Runner
from foveate.registry import list_methods

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


def _job(model: Any) -> Any:
    scene = nano.scene("test", 0, 0)
    return prepare(model, nano.load()[1], scene.image, scene.questions[0].text, max_new_tokens=1)


def test_files_run_as_they_are_beside_baselines_at_as_many_tokens(model: Any, tmp_path: Path):
    pruned, inside = VisPruner(keep=0.2), FastV(keep=64, layer=2)
    chain = Chain(VisPruner(keep=0.5), FastV(keep=0.5, layer=2))
    adaptive = VisPruner(keep=Budget.coverage(0.9))
    files = {str(tmp_path / f"{i}.json"): r for i, r in enumerate((pruned, inside, chain, adaptive))}
    for path, reducer in files.items():
        reducer.save(path)
    own = scenes.as_they_are(_job(model), ["divprune", *files])
    assert {name: entry.reducers for name, entry in own.items()} == {path: (r,) for path, r in files.items()}
    budgets = [entry.budget for entry in own.values()]
    assert budgets[:3] == [51, 160, 96]  # 96: two layers of 128 and two of 64
    assert 0 < budgets[3] < 256
    alone, _ = scenes.entries(model, list(files), [64], 256, own)
    assert scenes.budgets_of(alone) == budgets
    assert [e.budget for e in alone if e.method == "random"] == budgets
    found, _ = scenes.entries(model, ["divprune", *files], [64], 256, own)
    assert scenes.budgets_of(found) == [64, *budgets]
    assert [(e.method, e.budget) for e in found[-5:]] == [("divprune", 64), *zip(files, budgets, strict=True)]


def test_files_that_keep_everything_are_refused(model: Any, tmp_path: Path):
    VisPruner(keep=1.0).save(path := str(tmp_path / "all.json"))
    with pytest.raises(InputError, match="256 of 256 visual tokens leave nothing to reduce"):
        scenes.entries(model, [path], [64], 256, scenes.as_they_are(_job(model), [path]))


def test_the_budget_of_a_chain_cannot_be_replaced(model: Any, tmp_path: Path):
    Chain(VisPruner(keep=0.5), FastV(keep=0.5)).save(path := str(tmp_path / "chain.json"))
    with pytest.raises(InputError, match="leave out --keep"):
        scenes.entries(model, [path], [64], 256)


@pytest.mark.parametrize("chain", [
    Chain(VisPruner(keep=0.5), FastV(keep=32, layer=1)), Chain(VisPruner(keep=0.5), CDPruner(keep=0.5)),
    Chain(Pool(keep=64)), Chain(FlowCut(keep=64)), Chain(ToMe(keep=64), FastV(keep=32, layer=1)),
], ids=repr)  # fmt: skip
def test_chains_answer_scenes_as_when_attached(model: Any, chain: Chain):
    runner, scene = Runner(model, nano.load()[1]), nano.scene("test", 0, 0)
    condition = scenes.Entry("chain", 64, (chain,)).conditions()[0]
    with torch.inference_mode():
        inputs, tokens = runner.look(scene.image, [chain])
        expected = runner.ask_attached(runner.prompts(inputs, scene.questions), condition)
        assert runner.ask(inputs, tokens, condition, scene.questions) == expected


@pytest.mark.parametrize("method", ["evs", "nothing", "codebook", "nowhere.json"])
def test_methods_asked_for_must_run(model: Any, method: str):
    with pytest.raises(FoveateError):
        scenes.entries(model, [method], [32], 256)


def test_methods_inside_the_llm_get_as_many_equivalent_tokens():
    reducer = scenes.equal_tokens("fastv", 160, 256, 4)
    assert tokens_per_layer(reducer, 4, 256) == (256, 256, 64, 64)
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


def test_a_configuration_with_two_names_is_asked_once(small: None, tmp_path: Path):
    twice = [*_entries()[:3], scenes.Entry("own.json", 32, (VisPruner(keep=32),))]
    found = scenes.collect(twice, 2, 0, rows := tmp_path / "rows.jsonl")
    assert len(rows.read_text().splitlines()) == 3
    assert (found["own.json 32 0"].right == found["vispruner 32 0"].right).all()


def test_rows_name_the_commits_of_their_answers(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, found = tmp_path / "rows.jsonl", _entries()[:3]
    for commit, images in (("b" * 40, 2), ("a" * 40, 4)):
        monkeypatch.setattr(scenes, "versions", lambda commit=commit: {"commit": commit})
        answers = scenes.collect(found, images, 0, rows)
    answers |= scenes.collect(_entries()[3:], 4, 0, rows)
    assert answers["vispruner 32 0"].commits == ("a" * 12, "b" * 12)
    monkeypatch.setattr(leaderboard, "BASELINES", ("random",))
    commits = {row["method"]: row["commits"] for row in leaderboard.table_rows(_entries(), answers, {})}
    assert commits == {"vispruner": ["a" * 12, "b" * 12], "random": ["a" * 12]}


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


def test_a_file_has_a_table_at_its_own_tokens(small: None, tmp_path: Path):
    VisPruner(keep=0.2).save(path := str(tmp_path / "config.json"))
    result = leaderboard.leaderboard([path], None, 2, 0, tmp_path / "board.rows.jsonl")
    assert result["config"]["budgets"] == [51]
    assert {row["method"] for row in result["rows"]} == {path, "random", "uniform", "pool", "downsample"}
    assert next(row for row in result["rows"] if row["method"] == path)["reducers"] == [repr(VisPruner(keep=0.2))]
    assert list(leaderboard.tables(result)) == ["leaderboard-about", "leaderboard-51"]


def test_methods_for_two_models_are_left_out():
    model, _ = nano.load()
    _, left_out = scenes.entries(model, (), (128,), 256)
    reasons = {row["method"]: row["reason"] for row in left_out}
    assert "foveate.guide" in reasons["sgl"]
    assert "gates" in reasons["dyvte"]


def test_variants_are_columns_beside_the_plain_methods(small: None, tmp_path: Path):
    rows = tmp_path / "board.rows.jsonl"
    plain = leaderboard.leaderboard(["vispruner", "cdpruner"], [16], 2, 0, rows)
    before = rows.read_text()
    variants = [(0.5, False), (1.0, True)]
    result = leaderboard.leaderboard(["vispruner", "cdpruner"], [16], 2, 0, rows, variants=variants)
    assert rows.read_text().startswith(before)  # the plain ones are not run again
    names = ["rectify 0.5", "absorb, rectify 1"]
    assert result["config"]["variants"] == names
    assert json.loads(json.dumps(result)) == result
    assert [{k: x for k, x in row.items() if k != "variants"} for row in result["rows"]] == plain["rows"]
    by_name = {row["method"]: row["variants"] for row in result["rows"]}
    assert list(by_name["vispruner"]) == names
    assert list(by_name["cdpruner"]) == names[:1]
    assert set(by_name["vispruner"][names[0]]["gain"]) == {"points", "error", "p"}
    reasons = {(one["method"], one.get("variant")): one["reason"] for one in result["left_out"]}
    assert "by the question" in reasons["cdpruner", names[1]]
    table = leaderboard.tables(result)["leaderboard-16"]
    assert all(name in table for name in names)
    assert "rectify" not in leaderboard.tables(plain)["leaderboard-16"]
    whole = rows.read_text()
    leaderboard.leaderboard(["vispruner", "cdpruner"], [16], 2, 0, rows, variants=variants)
    assert rows.read_text() == whole


@pytest.mark.parametrize("reducer", [VisPruner(keep=16), CDPruner(keep=16)], ids=["prefix", "question"])
def test_shared_work_comes_to_what_an_attached_model_answers(reducer: Any):
    model, processor = nano.load()
    runner, shown = Runner(model, processor), nano.scene("validation", 0, 3)
    absorb = not reducer.query_aware
    condition = Condition("own", reducer, "compact", rectify=1.0, absorb=absorb)
    with torch.inference_mode():
        inputs, tokens = runner.look(shown.image, [reducer])
        words, _ = runner.ask(inputs, tokens, condition, shown.questions)
        batch = runner.prompts(inputs, shown.questions)
        with attach(model, reducer, positions="compact", rectify=1.0, absorb=absorb):
            logits = model(**batch, logits_to_keep=1).logits[:, -1]
        plain = runner.ask(inputs, tokens, Condition("plain", reducer, "compact"), shown.questions)[0]
    assert words == processor.tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist())
    assert len(plain) == len(words)
