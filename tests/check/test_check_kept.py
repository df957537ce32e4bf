"""The checks of what methods keep, and of how often they wait: right as they are, and able to fail."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from foveate.bench.conditioning import same
from foveate.check import kept, waiting
from foveate.check.kept import Plan, all_methods, before_llm, inside_llm, on, summary, tokens_for
from foveate.check.verdicts import Minutes
from foveate.methods import FasterVLM, FastV, Uniform
from foveate.registry import get_method, list_methods, load_reducer

CPU = torch.device("cpu")
PLAN = Plan(CPU, (8, 8), 1)
WAITS = "called a synchronizing CUDA operation (Triggered internally)"


def test_every_method_is_judged_or_left_out_with_a_reason(subject):
    with all_methods(0.25) as (reducers, lacking):
        early = [r for r in reducers if r.stage != "in_llm"]
        found = before_llm(early, PLAN, Minutes(5)) + inside_llm(
            [r for r in reducers if r.stage == "in_llm"], subject, Minutes(5)
        )
    assert {verdict.check for verdict in found} | {*lacking} == {*list_methods()}
    assert [verdict for verdict in found if verdict.word == "wrong"] == []
    reasons = {verdict.check: verdict.said for verdict in found if verdict.word == "not run"} | lacking
    assert {name for name in reasons if get_method(name).stage == "before_llm"} == {"chain"}
    assert {"dyvte", "sgl"} <= reasons.keys()
    assert {verdict.check for verdict in found if verdict.word == "right"} >= {"vispruner", "fastv", "codebook", "evs"}


def test_a_method_that_keeps_others_in_batches_is_wrong(broken):
    (verdict,) = before_llm([broken], PLAN, Minutes(1))
    assert verdict.word == "wrong"
    assert verdict.figures["same"]["batch"] < 1 == verdict.figures["same"]["elsewhere"]
    whole = summary("kept sets", [verdict], {}, PLAN)
    assert whole.word == "wrong"
    assert whole.said.startswith("keeps_others_in_batches: the same")


@dataclass(frozen=True)
class ByThreads(Uniform):
    """A broken method, whose choice depends on the number of threads."""

    def pick(self, crops, count):
        return super().pick(crops, count) // 2 * 2 + (torch.get_num_threads() > 1)


@dataclass(frozen=True)
class InsideByThreads(FastV):
    """The same inside the LLM."""

    def select(self, tokens):
        order = range(1000) if torch.get_num_threads() == 1 else range(1000, 0, -1)
        return tokens.per_prompt(
            lambda prompts, count: torch.tensor([sorted(range(prompts.size), key=order.__getitem__)[:count]])
        )


def test_methods_that_keep_others_elsewhere_are_wrong(subject):
    (before,) = before_llm([ByThreads(keep=9)], PLAN, Minutes(1))
    (inside,) = inside_llm([InsideByThreads(keep=9, layer=1)], subject, Minutes(1))
    assert (before.word, inside.word) == ("wrong", "wrong")
    assert before.figures["same"] == {"rounding": 1, "batch": 1, "elsewhere": 0}


def test_methods_are_as_they_were_behind_a_recording(subject):
    reducer = FastV(keep=9, layer=1)
    assert [v.word for v in inside_llm([reducer], subject, Minutes(1))] == ["right"]
    assert "select" not in vars(reducer)


def test_what_rounding_changes_anyhow_may_differ():
    def word(**shares):
        return kept._judge("x", shares).word

    assert word(rounding=[0.9, 1.0], elsewhere=[1.0], batch=[1.0]) == "right"
    assert word(rounding=[0.9, 1.0], elsewhere=[0.9], batch=[1.0]) == "right"
    assert word(rounding=[0.9, 1.0], elsewhere=[0.8], batch=[1.0]) == "wrong"
    assert word(rounding=[1.0], elsewhere=[1.0], batch=[1.0, 0.99]) == "wrong"


def test_decisions_that_keep_nothing_are_the_same():
    assert same(set(), set()) == 1
    assert same(set(), {(1, 1)}) == 0


def test_methods_without_time_are_not_run():
    (verdict,) = before_llm([Uniform(keep=9)], PLAN, Minutes(0))
    assert verdict.word == "not run"
    assert summary("kept sets", [verdict], {}, PLAN).word == "not run"


def test_tokens_go_to_a_device_with_all_that_is_read_of_them():
    reducer = load_reducer("cdpruner", keep=9)
    there = on(tokens_for(reducer, (4, 4)), torch.device("meta"))
    assert there.device.type == "meta"
    assert {x.device.type for plane in there.planes.values() for x in plane} == {"meta"}
    assert {x.device.type for x in there.queries} == {"meta"}


class Mocked:
    """CUDA's debug mode, without CUDA."""

    def __init__(self, monkeypatch):
        self.mode, self.modes = "error", []
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode):
        self.mode = mode
        self.modes.append(mode)
        warnings.warn("Synchronization debug mode does not detect all synchronizing operations", stacklevel=1)


@pytest.fixture
def mocked(monkeypatch):
    return Mocked(monkeypatch)


@dataclass(frozen=True)
class Waiting(FasterVLM):
    """A method that waits for the device, as a mocked one says."""

    def pick(self, crops, count):
        warnings.warn(WAITS, stacklevel=1)
        return super().pick(crops, count)


@dataclass(frozen=True)
class WaitingByNature(Waiting):
    adaptive = True


def test_waits_are_counted_and_the_mode_is_restored(mocked):
    with waiting.counted() as places:
        for _ in range(3):
            warnings.warn(WAITS, stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        assert mocked.mode == "warn"
    assert len(places) == 3
    assert all(place.startswith(__file__) for place in places)
    assert mocked.modes == ["warn", "error"]


def test_the_mode_is_restored_when_something_fails(mocked):
    with pytest.raises(RuntimeError), waiting.counted():
        raise RuntimeError
    assert mocked.mode == "error"


def test_a_method_that_waits_is_wrong(mocked):
    reducers = [FasterVLM(keep=9), Waiting(keep=9), WaitingByNature(keep=9), FastV(keep=9)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = waiting.in_selection(reducers, CPU, (8, 8), Minutes(1))
    assert [verdict.word for verdict in found] == ["right", "wrong", "right"]
    assert found[1].figures["waits"] == 1
    assert waiting.summary(found).word == "wrong"
    assert waiting.summary([found[0], found[2]]).word == "right"
    assert waiting.summary([]).word == "not run"


def test_decoding_that_waits_more_than_unpruned_is_wrong(subject, mocked, monkeypatch):
    verdict = waiting.while_decoding(subject, subject.before())
    assert (verdict.word, verdict.figures) == ("right", {"unpruned": 0, "pruned": 0})

    def hook(_module, _args):
        from foveate.engines.transformers.attach import attached

        if attached(subject.model) is not None:
            warnings.warn(WAITS, stacklevel=1)

    own = subject.model.lm_head.register_forward_pre_hook(hook)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = waiting.while_decoding(subject, subject.before())
    finally:
        own.remove()
    assert (verdict.word, verdict.figures) == ("wrong", {"unpruned": 0, "pruned": 1})


def test_a_gpu_is_compared_by_name():
    assert replace(PLAN, device=torch.device("cuda:1")).elsewhere == "cuda:1"
    assert PLAN.elsewhere == "2 threads"
