"""What is measured is what users get: the inputs and answers of metered runs are those of plain reduce and attach."""

from types import SimpleNamespace

import pytest
import torch

import foveate
import tiny
from foveate import Chain, load_reducer
from foveate.bench.model import arms_of
from foveate.core.in_llm import of_encoder
from foveate.engines.pipeline import Meter
from foveate.engines.settings import Settings
from foveate.engines.transformers.reduce import reduce_with
from foveate.families import all_families, family_of
from foveate.measure.job import Job
from foveate.measure.run import run_once
from foveate.measure.timing import Clock

BEFORE = [
    load_reducer("vispruner", keep=9), load_reducer("divprune", keep=0.3), load_reducer("cdpruner", keep=9),
    load_reducer("pool", keep=9), load_reducer("tome", keep=9), load_reducer("downsample", keep=9),
]  # fmt: skip
INSIDE = [load_reducer("fastv", keep=9, layer=1), load_reducer("pyramiddrop", keep=0.4, layers=(1, 3))]
STAGED = [load_reducer(name, **config) for name, config in tiny.STAGED]
CHAINED = [
    Chain(load_reducer("divprune", keep=0.6), load_reducer("random", keep=9)),
    Chain(load_reducer("divprune", keep=0.6), load_reducer("fastv", keep=0.5, layer=1)),
]
REDUCERS = [*BEFORE, *INSIDE, *STAGED, *CHAINED]

families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "llava_onevision"])
LENGTH = 5


def _id(reducer):
    return "+".join(part.name for part in getattr(reducer, "reducers", (reducer,)))


def _job(name):
    model = tiny.deep_model(name)
    keys = {key for key, kind in all_families()[name].inputs.items() if kind == "image"}
    picture = next(visual for visual in tiny.VISUALS[name] if keys & tiny.sample(visual).keys())
    inputs = tiny.collate([tiny.sample(3, picture, 4)])
    family = family_of(model)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
    return Job(model, SimpleNamespace(tokenizer=tokenizer), family, inputs, family.spans(model, inputs), LENGTH)


def _answer(job, inputs):
    with torch.no_grad():
        out = job.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def _kept(selection):
    return [span.kept.tolist() for span in selection]


class Noting(Meter):
    """A meter that notes down what it is told."""

    def __init__(self):
        self.stages, self.decisions = [], []

    def stop(self, stage):
        self.stages.append(stage)

    def decided(self, decision):
        self.decisions.append(decision)


def _equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@families
@pytest.mark.parametrize("reducer", [*BEFORE, CHAINED[0]], ids=_id)
def test_metered_inputs_are_those_of_reduce(family, reducer):
    job, meter = _job(family), Noting()
    metered = reduce_with(job.model, job.family, job.inputs, Settings.make(reducer, family=job.family), meter)
    plain = foveate.reduce(job.model, job.inputs, reducer)
    assert _kept(metered.selection) == _kept(plain.selection)
    outputs = [{kind: x.pooler_output for kind, x in y.pop("mm_encoder_outputs").items()} for y in (metered, plain)]
    assert _equal(*outputs)
    assert _equal(dict(metered), dict(plain))
    once = [
        "vision",
        "select",
    ]  # look, decide, embed, apply; of smaller pictures, which are planned first, in two steps
    assert meter.stages == (once if reducer.stage == "pixels" else 2 * once)
    (decision,) = meter.decisions
    assert _kept(decision.selection) == _kept(plain.selection)
    assert (decision.tokens is None) == (reducer.stage == "pixels")


@families
@pytest.mark.parametrize("reducer", REDUCERS, ids=_id)
def test_what_run_measures_is_what_attach_gives(family, reducer, monkeypatch):
    job, stages, stop = _job(family), [], Clock.stop
    monkeypatch.setattr(Clock, "stop", lambda self, stage: (stages.append(stage), stop(self, stage))[1])
    result = run_once(job, Settings.make(reducer, family=job.family))
    with foveate.attach(job.model, reducer) as handle:
        answer = _answer(job, job.inputs)
    assert result.answer == " ".join(map(str, answer))
    assert _kept(result.selection) == _kept(handle.selections[0])
    assert list(result.layers) == handle.received[0]
    if reducer.stage != "in_llm" and not any(part.stage == "in_llm" for part in reducer.stages()):
        assert answer == _answer(job, foveate.reduce(job.model, job.inputs, reducer))
    decided = stages.count("select")
    alone = all(part.stage == "in_llm" for part in reducer.stages()) and not any(map(of_encoder, reducer.stages()))
    assert decided == (0 if alone else 1 if reducer.stage == "pixels" else 2)
    assert stages[-2:] == ["prefill", "decode"]
    assert stages.count("decode") == 1
    assert stages.count("vision") == (1 if alone else decided)
    assert stages.count("prefill") == (2 if alone else 1)  # what comes before the model's own encoder is prefill
    assert sum(result.seconds.values()) > 0


@families
def test_a_run_of_the_stock_model_is_plain_generate(family):
    job = _job(family)
    for settings in (None, Settings.make(load_reducer("random", keep=1.0), family=job.family)):
        result = run_once(job, settings)
        assert result.answer == " ".join(map(str, _answer(job, job.inputs)))
        assert result.stock
        assert result.seconds["vision"] > 0
        assert result.layers == (job.visual_tokens,) * job.depth


@families
@pytest.mark.parametrize("reducer", [*BEFORE[1:3], *INSIDE], ids=_id)
def test_what_bench_measures_is_what_users_get(family, reducer):
    job = _job(family)
    (arm,) = [arm for arm in arms_of(job, Settings.make(reducer, family=job.family)) if arm.name == "method"]
    meter, out = arm.run(Noting)
    with foveate.attach(job.model, reducer) as handle, torch.no_grad():
        plain = job.model.generate(**job.inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False)
    assert out.sequences[0, -LENGTH:].tolist() == plain[0, -LENGTH:].tolist()
    assert list(arm.received) == handle.received[0]
    assert meter.stages[-2:] == ["prefill", "decode"]
