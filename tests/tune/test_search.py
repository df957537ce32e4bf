"""The search on answers whose truth is known, and measuring on a small model."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate import nano
from foveate.core.errors import FoveateError, InputError, UnknownNameError, UnsupportedModelError
from foveate.families import all_families
from foveate.methods import Random
from foveate.tune.asking import Asker, divergence
from foveate.tune.candidates import BUDGETS, CONTROLS, METHODS, candidates
from foveate.tune.findings import HEADER, findings, markdown, table, verdict
from foveate.tune.journal import Journal
from foveate.tune.prompts import Prompt
from foveate.tune.search import Wish, pareto, rung_sizes, search, standing
from foveate.viz.front import save

TRUTH = {
    f"{method} {cost}": (min(0.9, scale * (1 - cost) ** 2), cost)
    for method, scale in {"good": 0.004, "fair": 0.2, "bad": 0.6, "random": 0.8}.items()
    for cost in (0.2, 0.4, 0.6, 0.8)
}
"""Loss and cost of each candidate."""


class Known(Asker):
    """An asker that draws answers instead of running a model."""

    def ask(self, prompt: Prompt, names: Any, *, count: bool = False) -> dict[str, Any]:
        counts[prompt.line] += len(names)
        arms: dict[str, Any] = {}
        for name in names:
            loss, cost = TRUTH[name]
            draw = random.Random(f"{name}/{prompt.line}")
            same = draw.random() >= loss
            arms[name] = {
                "answer": "a" if same else "b", "same": same, "right": None, "kl": loss * draw.uniform(0.5, 1.5),
                "time": cost * draw.uniform(0.9, 1.1), "seconds": 1.0, "tokens": cost, "flops": cost,
            }  # fmt: skip
            if name == "fair 0.2" and prompt.line == 3:
                arms[name] = {"error": "cannot do this one"}
        return {"line": prompt.line, "answer": "a", "right": None, "seconds": 1.0, "arms": arms}


counts: Counter[int] = Counter()
PROMPTS = [Prompt(i, (Path(f"{i}.png"),), "?", None) for i in range(1, 801)]


@pytest.fixture(autouse=True)
def _empty() -> None:
    counts.clear()


def run(path: Path, wish: Wish, prompts: list[Prompt] = PROMPTS) -> Any:
    reducers = {name: Random(keep=cost) for name, (_, cost) in TRUTH.items()}
    return search(Known(None, None), prompts, reducers, wish, Journal(path, {"wish": wish.text}))


@pytest.mark.parametrize("by", ["time", "flops"])
def test_finds_the_cheapest_that_loses_little(tmp_path: Path, by: Any) -> None:
    found = run(tmp_path / "rows", Wish(max_loss=0.02, by=by))
    assert found.winner == "good 0.2"
    assert found.closest is None
    assert found.standings[found.winner][-1].loss.high <= 0.02
    assert found.rungs == (16, 32, 64, 128, 256, 512, 800)
    assert sum(counts.values()) < 0.5 * len(TRUTH) * len(PROMPTS), "halving saves most of the work"
    assert len(found.standings["bad 0.2"]) == 1, "what cannot come right is given up after the first rung"
    assert found.failed == {"fair 0.2": "cannot do this one"}
    assert "fair 0.2" not in found.standings


def test_finds_the_most_loyal_that_is_fast(tmp_path: Path) -> None:
    found = run(tmp_path / "rows", Wish(speedup=2))
    assert found.winner == "good 0.4"
    assert found.standings["good 0.6"][-1].prompts == 16, "too slow"
    assert found.controls == ("random 0.4",)
    assert found.standings["random 0.4"][-1].prompts == len(PROMPTS), "the control is asked everything in the end"
    data = findings(found, dict.fromkeys(TRUTH, Random(keep=0.5)), {}, PROMPTS, Wish(speedup=2))
    (control,) = data["controls"]
    assert control["ahead"]["value"] == pytest.approx(0.8 * 0.36, abs=0.05)
    assert any("good 0.4 is ahead by at least" in line for line in verdict(data))


@pytest.mark.parametrize(
    ("wish", "closest"), [(Wish(max_loss=0.0075, confidence=0.99), None), (Wish(speedup=8), "0.2")]
)
def test_says_when_nothing_fulfils_the_wish(tmp_path: Path, wish: Wish, closest: str | None) -> None:
    worse = {name: (max(loss, 0.02), cost) for name, (loss, cost) in TRUTH.items()}
    before = dict(TRUTH)
    TRUTH.update(worse)
    try:
        found = run(tmp_path / "rows", wish)
    finally:
        TRUTH.update(before)
    assert found.winner is None
    if closest:
        assert found.closest.endswith(closest)
    else:
        last = {name: s[-1].loss.high for name, s in found.standings.items()}
        assert last[found.closest] == min(last.values())
    data = findings(found, dict.fromkeys(TRUTH, Random(keep=0.5)), {}, PROMPTS, wish)
    assert (data["fulfilled"], data["reducer"], data["closest"]) == (False, None, found.closest)
    assert verdict(data)[0].startswith("No candidate fulfils the wish")


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    path, wish = tmp_path / "rows", Wish(speedup=2)
    whole = run(path, wish)
    lines = path.read_text().splitlines(keepends=True)
    first = 1 + len(PROMPTS)
    assert first <= len(lines) <= first + len(PROMPTS), "settings, prompts, and the control where it was not asked"
    for kept in (1, 10, 300, first - 5):
        counts.clear()
        path.write_text("".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        again = run(path, wish)
        assert again == whole
        assert path.read_text() == "".join(lines)
        assert len(counts) <= len(PROMPTS)
        assert sum(counts.values()) < sum(len(json.loads(x)["arms"]) for x in lines[1:]) or kept == 1


def test_what_runs_nowhere_and_flops_that_are_unknown_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = {"error": "no place for this"}

    def ask(self: Any, prompt: Prompt, names: Any, *, count: bool = False) -> dict[str, Any]:
        return {
            "line": prompt.line,
            "answer": "a",
            "right": None,
            "seconds": 1.0,
            "arms": {n: dict(arm) for n in names},
        }

    monkeypatch.setattr(Known, "ask", ask)
    wish = Wish(speedup=2, by="flops")
    found = run(tmp_path / "failed", wish)
    assert (found.winner, found.closest, set(found.failed)) == (None, None, set(TRUTH))
    data = findings(found, dict.fromkeys(TRUTH, Random(keep=0.5)), {}, PROMPTS, wish)
    assert verdict(data) == ["No candidate ran on these prompts."]
    save(tmp_path / "empty.png", data)
    arm = {
        "answer": "a",
        "same": True,
        "right": None,
        "kl": 0.0,
        "time": 1.0,
        "seconds": 1.0,
        "tokens": 1.0,
        "flops": None,
    }
    with pytest.raises(UnsupportedModelError, match="go by time"):
        run(tmp_path / "unknown", wish)
    assert len((tmp_path / "unknown").read_text().splitlines()) == 2, "told after the first prompt"


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "rows", Wish(speedup=2), PROMPTS[:16])
    with pytest.raises(InputError, match="other settings"):
        run(tmp_path / "rows", Wish(speedup=3), PROMPTS[:16])
    with pytest.raises(InputError, match="damaged at line 2"):
        run(tmp_path / "rows", Wish(speedup=2), PROMPTS[16:])
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(InputError, match="no journal"):
        run(tmp_path / "text", Wish(speedup=2))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "wish for one thing"),
        ({"max_loss": 0.01, "speedup": 2}, "wish for one thing"),
        ({"max_loss": 0.0}, "between 0 and 1"),
        ({"max_loss": 1.0}, "between 0 and 1"),
        ({"speedup": 1.0}, "above 1"),
        ({"speedup": math.inf}, "above 1"),
        ({"speedup": math.nan}, "above 1"),
        ({"speedup": 2, "confidence": 1.0}, "confidence"),
    ],
)
def test_wishes_that_are_none(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Wish(**wish)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="7 prompts tell nothing"):
        Wish(speedup=2).check_prompts(PROMPTS[:7])
    with pytest.raises(InputError, match=r"100 prompts cannot show .* give about 3\d\d prompts, or allow 0.030"):
        Wish(max_loss=0.01).check_prompts(PROMPTS[:100])
    labelled = [replace(prompt, answer="a") for prompt in PROMPTS]
    for prompts, least in ((PROMPTS, 299), (labelled, 231)):  # as docs/tune.md has it
        Wish(max_loss=0.01).check_prompts(prompts[:least])
        with pytest.raises(InputError, match="cannot show a loss"):
            Wish(max_loss=0.01).check_prompts(prompts[: least - 1])
    Wish(speedup=2).check_prompts(PROMPTS[:8])


def test_rungs_double_and_end_with_all() -> None:
    assert rung_sizes(16, 100) == [16, 32, 64, 100]
    assert rung_sizes(16, 16) == [16]
    assert rung_sizes(16, 9) == [9]


def test_the_front_holds_what_nothing_equals() -> None:
    points = {"a": (1.0, 3.0), "b": (2.0, 3.0), "c": (2.0, 1.0), "d": (3.0, 2.0), "e": (1.0, 3.0)}
    assert pareto(points) == ["a", "c"]
    assert pareto({"a": (1.0, 3.0, 2.0), "b": (2.0, 3.0, 1.0), "c": (2.0, 3.0, 2.0)}) == ["a", "b"]


def test_the_defaults_run_on_the_families_or_are_left_out() -> None:
    for family in all_families().values():
        found, left_out = candidates(family)
        assert {key.split()[0] for key in found} | {key.split()[0] for key in left_out} == {*METHODS, *CONTROLS}
        for key, reducer in found.items():
            assert not family.lacks(reducer), key
        for control in CONTROLS:
            assert {f"{control} {keep}" for keep in BUDGETS} <= set(found)
    assert not candidates(all_families()["llava"])[1]


def test_candidates_by_name_and_file(tmp_path: Path) -> None:
    llava = all_families()["llava"]
    path = tmp_path / "mine.json"
    foveate.VisPruner(keep=9, order="rank").save(path)
    found, left_out = candidates(llava, ["pyramiddrop", str(path), "codebook"], ["64", "0.5"])
    assert found[str(path)] == foveate.VisPruner(keep=9, order="rank")
    assert list(left_out) == ["pyramiddrop 64", "codebook"]
    assert "file" in left_out["codebook"]
    assert {"pyramiddrop 0.5", "random 64", "pool 0.5"} <= set(found)
    with pytest.raises(UnknownNameError, match="no method is called 'nope'"):
        candidates(llava, ["nope"])
    with pytest.raises(InputError, match="no method is left"):
        candidates(llava, ["random"])
    with pytest.raises(InputError, match="cannot read the method"):
        candidates(llava, ["nowhere.json"])
    path.write_text("[]")
    with pytest.raises(FoveateError, match=r"configuration|describe"):
        candidates(llava, [str(path)])


def test_divergence() -> None:
    one = torch.tensor([0.0, 1.0, -torch.inf])
    p, q = torch.tensor([0.2689414, 0.7310586]), torch.tensor([0.5, 0.5])
    assert divergence(one, torch.tensor([2.0, 2.0, -torch.inf])) == pytest.approx(float((p * (p / q).log()).sum()))
    assert divergence(one, one) == 0.0
    ruled_out = torch.tensor([0.0, -torch.inf, -torch.inf])
    assert divergence(one, ruled_out) == math.inf
    assert divergence(ruled_out, one) == pytest.approx(1.3132617)
    # What is as good as ruled out counts nothing, but what the rest comes to does.
    tiny = torch.tensor([0.0, 1.0, -1e4])
    assert divergence(tiny, torch.tensor([2.0, 2.0, -torch.inf])) == pytest.approx(float((p * (p / q).log()).sum()))
    assert math.isfinite(divergence(tiny, torch.tensor([0.0, -3e38, 3e38]))), "logits that are numbers rule nothing out"


@pytest.fixture(scope="module")
def model() -> Any:
    return nano.load()


def test_measures_what_the_library_does(model: Any, tmp_path: Path) -> None:
    about = nano.sample()
    prompt = Prompt(1, (nano.SAMPLE,), about.question, about.answer)
    arms = {
        "vispruner 32": foveate.VisPruner(keep=32), "fastv 0.1": foveate.load_reducer("fastv", keep=0.1),
        "random 1": Random(keep=1), "all": Random(keep=1.0), "layer": foveate.load_reducer("fastv", keep=3, layer=9),
    }  # fmt: skip
    row = Asker(*model, max_new_tokens=3).ask(prompt, arms, count=True)
    json.dumps(row)
    assert row["answer"] == about.answer
    assert row["right"] is True
    found = row["arms"]
    assert "layer" in found["layer"]["error"]
    assert found["vispruner 32"]["same"]
    assert found["vispruner 32"]["right"]
    assert found["all"]["kl"] == 0.0
    assert found["all"]["tokens"] == found["all"]["flops"] == 1.0
    assert found["vispruner 32"]["tokens"] == 32 / 256
    assert found["fastv 0.1"]["tokens"] == pytest.approx((256 * 2 + 26 * 2) / 4 / 256)
    assert 0 < found["vispruner 32"]["kl"] < found["random 1"]["kl"]
    assert found["random 1"]["flops"] < found["vispruner 32"]["flops"] < found["fastv 0.1"]["flops"] < 1
    loaded, processor = model
    inputs = processor(images=about.image, text=f"<image>\n{about.question}", return_tensors="pt")
    with torch.no_grad():
        full = loaded(**inputs).logits[0, -1]
        kept = loaded(**foveate.reduce(loaded, inputs, arms["vispruner 32"])).logits[0, -1]
    assert found["vispruner 32"]["kl"] == pytest.approx(divergence(full, kept), rel=1e-3)


def test_an_infinite_divergence_is_valid_json(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = nano.sample()
    prompt = Prompt(1, (nano.SAMPLE,), about.question, about.answer)
    head = model[0].lm_head
    passes = []

    def rule_out(module: Any, args: Any, logits: torch.Tensor) -> None:
        passes.append(logits)
        if len(passes) > 1:  # the pruned model's turn
            logits[..., int(passes[0][0, -1].argmax())] = -math.inf

    asker = Asker(*model, max_new_tokens=1)
    monkeypatch.setattr("random.Random.randint", lambda self, low, high: high)  # candidates first
    hook = head.register_forward_hook(rule_out)
    try:
        row = asker.ask(prompt, {"random 9": Random(keep=9)})
    finally:
        hook.remove()
    assert row["arms"]["random 9"]["kl"] is None
    json.dumps(row, allow_nan=False)
    found = standing("random 9", [row], [prompt], 0.95)
    assert found.kl == math.inf
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["kl"] is None


def test_infinite_divergences_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wish, ask = Wish(max_loss=0.02), Known.ask

    def infinite(self: Known, *args: Any, **options: Any) -> dict[str, Any]:
        row = ask(self, *args, **options)
        for arm in row["arms"].values():
            arm["kl"] = None
        return row

    monkeypatch.setattr(Known, "ask", infinite)
    found = run(tmp_path / "rows", wish)
    data = findings(found, dict.fromkeys(TRUTH, Random(keep=0.5)), {}, PROMPTS, wish)
    data = json.loads(json.dumps({**data, "config": {"clock": "wall"}}, allow_nan=False))
    assert found.winner == "good 0.2"
    assert {row[HEADER.index("KL")] for row in table(data)} == {"inf"}


def test_logits_that_are_no_numbers_are_refused(model: Any) -> None:
    about = nano.sample()
    prompt = Prompt(1, (nano.SAMPLE,), about.question, about.answer)

    def overflow(module: Any, args: Any, logits: torch.Tensor) -> None:
        logits[..., 5] = math.inf

    hook = model[0].lm_head.register_forward_hook(overflow)
    try:
        with pytest.raises(InputError, match="another dtype"):
            Asker(*model, max_new_tokens=1).ask(prompt, {})
    finally:
        hook.remove()


def test_a_prompt_that_the_model_cannot_take_is_named(model: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"the prompt in line 4: .*not an image"):
        Asker(*model).ask(Prompt(4, (tmp_path / "broken.png",), "what?", None), {})
    with pytest.raises(InputError, match=r"the prompt in line 5: .*placeholder"):
        Asker(*model).ask(Prompt(5, (nano.SAMPLE,), "what <image>?", None), {})


def test_the_report_is_json_and_a_table(tmp_path: Path) -> None:
    wish = Wish(max_loss=0.02)
    found = run(tmp_path / "rows", wish)
    data = findings(found, dict.fromkeys(TRUTH, Random(keep=0.5)), {"x": "why"}, PROMPTS, wish)
    data = json.loads(json.dumps({**data, "config": {"clock": "wall"}}, allow_nan=False))
    assert data["fulfilled"]
    assert data["reducer"] == {"method": "random", "keep": 0.5, "seed": 0}
    cells = table(data)
    assert {row[0] for row in cells} == {*data["front"], data["winner"], *(c["control"] for c in data["controls"])}
    times = [float(row[-1].rstrip("%")) for row in cells]
    assert times == sorted(times)
    text = markdown(data)
    assert "good 0.2 fulfils the wish, a loss of at most 2.00%, with 95% confidence" in text
    assert text.count("\n| ") == len(cells) + 1
