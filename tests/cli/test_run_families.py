from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
import tiny
from foveate.families import all_families, family_of
from foveate.measure.baselines import baselines
from foveate.measure.job import Job
from foveate.measure.run import run_methods
from foveate.measure.summary import summarize
from foveate.registry import load_reducer


def _job(name: str, *parts: tiny.Part) -> Job:
    model = tiny.model(name, "eager")  # the counter of FLOPs does not see the fused kernels of the CPU
    inputs = tiny.collate([tiny.sample(3, *(tiny.Visual(name, part) for part in parts), 4)])
    family = family_of(model)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
    return Job(model, SimpleNamespace(tokenizer=tokenizer), family, inputs, family.spans(model, inputs), 5)


READING = ["llava", "llava_next", "video_llava", "vipllava"]
"""Families on which a method that reads attention is tried."""
OTHERS = [name for name in tiny.FAMILIES if name not in READING]
COUNTED = [
    (name, method)
    for name in tiny.FAMILIES
    if name != "qwen3_5"  # torch's reference for its recurrent layers works in chunks, which cost more than the steps
    for method in ("unpruned", "vispruner", "pool", "downsample")
    # What it costs to read a tower that nobody has described is not known.
    if (name, method) != ("generic", "vispruner")
    if method == "unpruned" or all_families()[name].lacks(load_reducer(method, keep=0.25)) is None
]


def _picture(name: str) -> Any:
    keys = {key for key, kind in all_families()[name].inputs.items() if kind == "image"}
    return next(visual.what for visual in tiny.VISUALS[name] if keys & tiny.sample(visual).keys())


@pytest.mark.parametrize("name", READING)
def test_every_family_answers_as_generate_does(name: str) -> None:
    job = _job(name, _picture(name))
    reducer = foveate.VisPruner(keep=24)
    methods = [reducer, *baselines(job, reducer)]
    stock, *pruned = run_methods(job, [None, *methods], repeats=1)
    prompt = job.inputs["input_ids"].shape[1]
    plain = job.model.generate(**job.inputs, max_new_tokens=5, do_sample=False)
    assert stock.answer == " ".join(map(str, plain[0, prompt:].tolist()))
    for method, arm in zip(methods, pruned, strict=True):
        ready = foveate.reduce(job.model, job.inputs, method)
        out = job.model.generate(**ready, max_new_tokens=5, do_sample=False)
        assert arm.answer == " ".join(map(str, out[0, ready["input_ids"].shape[1] :].tolist()))
        assert arm.kept <= 24
        assert arm.cost is not None
        assert arm.cost.total < stock.cost.total
    assert summarize(job, stock, pruned[0])["kept"] == [span.kept.tolist() for span in pruned[0].selection]
    assert pruned[0].saliency is not None
    assert [len(x) for x in pruned[0].saliency] == [len(crop) for crop in job.spans[0].crops]


@pytest.mark.parametrize("name", OTHERS)
def test_families_with_any_method(name: str) -> None:
    job = _job(name, _picture(name))
    reducer, said = foveate.methods.Random(keep=7), []
    methods = [reducer, *baselines(job, reducer, said.append)]
    assert len(methods) + len(said) == 4
    stock, *pruned = run_methods(job, [None, *methods], repeats=1)
    prompt = job.inputs["input_ids"].shape[1]
    plain = job.model.generate(**job.inputs, max_new_tokens=5, do_sample=False)
    assert stock.answer == " ".join(map(str, plain[0, prompt:].tolist()))
    for method, arm in zip(methods, pruned, strict=True):
        ready = foveate.reduce(job.model, job.inputs, method)
        out = job.model.generate(**ready, max_new_tokens=5, do_sample=False)
        assert arm.answer == " ".join(map(str, out[0, ready["input_ids"].shape[1] :].tolist()))
        assert 0 < arm.kept <= 7
        assert arm.cost is not None
        assert stock.cost is not None
        assert arm.cost.prefill < stock.cost.prefill
        assert arm.kv_bytes < stock.kv_bytes
        assert arm.seconds["vision"] > 0
    data = summarize(job, stock, pruned[0], pruned[1:])
    assert data["flops"]["after"] < data["flops"]["before"]
    assert data["kept"] == [span.kept.tolist() for span in pruned[0].selection]
    located = job.family.located(job.spans, (30, 60))
    assert all(crop.box is not None for span in located for crop in span.crops)


def test_baselines_that_do_not_run_are_named() -> None:
    job, said = _job("perception_lm", _picture("perception_lm")), []
    names = [r.name for r in baselines(job, foveate.methods.Random(keep=7), said.append)]
    assert names == ["uniform", "pool"]
    assert said == [
        "downsample is left out: it needs an encoder that takes smaller pictures, which the family 'perception_lm' "
        "does not give"
    ]


@pytest.mark.parametrize(("name", "method"), [pytest.param(*case, marks=tiny.in_depth(case[0])) for case in COUNTED])
def test_flops_are_those_that_run(name: str, method: str) -> None:
    job = _job(name, _picture(name))
    reducer = None if method == "unpruned" else load_reducer(method, keep=0.25)
    (arm,) = run_methods(job, [reducer], repeats=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ready = job.inputs if reducer is None else foveate.reduce(job.model, job.inputs, reducer)
        job.model(**ready, logits_to_keep=1)
    assert arm.cost is not None
    total = counter.get_total_flops() - tiny.table_flops(name, counter)
    assert arm.cost.total == pytest.approx(total, rel=0.01)


def _clip(name: str) -> Any:
    return next((visual.what for visual in tiny.VISUALS[name] if "pixel_values_videos" in tiny.sample(visual)), None)


@pytest.mark.parametrize("name", [name for name in OTHERS if _clip(name) is not None])
def test_videos_beside_images(name: str) -> None:
    job = _job(name, _picture(name), _clip(name))
    assert [span.kind for span in job.spans] == ["image", "video"]
    stock, pruned = run_methods(job, [None, foveate.methods.Random(keep={"image": 4, "video": 9})], repeats=1)
    prompt = job.inputs["input_ids"].shape[1]
    for ready, arm in ((job.inputs, stock), (foveate.reduce(job.model, job.inputs, pruned.reducer), pruned)):
        out = job.model.generate(**ready, max_new_tokens=5, do_sample=False)
        assert arm.answer == " ".join(map(str, out[0, ready["input_ids"].shape[1] :].tolist()))
    assert prompt == job.text_tokens + job.visual_tokens
    data = summarize(job, stock, pruned)
    assert [(span["kind"], span["after"]) for span in data["tokens"]["spans"]] == [("image", 4), ("video", 9)]
    assert [len(kept) for kept in data["kept"]] == [4, 9]
