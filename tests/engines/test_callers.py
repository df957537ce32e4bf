"""Callers that the engine does not choose: how they call, from which thread, and what they call in between."""

import copy
import threading

import accelerate
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import foveate
from foveate.core.errors import AttachError, UnsupportedModelError
from foveate.methods import FastV, Uniform
from tiny import FAMILIES, IN_LLM, collate, deep_model, in_depth, make, method_id, model, sample, samples

GREEDY = {"max_new_tokens": 4, "do_sample": False}
REDUCERS = [Uniform(keep=9), FastV(keep=9, layer=1)]


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: r.name)
def test_arguments_of_generate_may_come_by_place(reducer):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    seen = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape[1])
            return scores

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= length + 3)

    length = inputs["input_ids"].shape[1]
    config = GenerationConfig(max_length=length + 7, do_sample=False, pad_token_id=0)
    further = [config, LogitsProcessorList([Look()]), StoppingCriteriaList([Stop()])]
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with foveate.attach(net, reducer):
        expected = net.generate(**inputs, **GREEDY)[:, : length + 3]
        assert torch.equal(net.generate(inputs["input_ids"], *further, **rest), expected)
        assert seen == [length, length + 1, length + 2]
        assert torch.equal(
            net.generate(inputs=inputs["input_ids"], generation_config=config, **rest)[:, : length + 3], expected
        )
        with pytest.raises(TypeError, match="several values for generation_config"):
            net.generate(inputs["input_ids"], config, generation_config=config, **rest)


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: r.name)
def test_a_generate_that_knows_of_no_method_is_refused(reducer):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    taken = net.generate
    expected = taken(**inputs, **GREEDY)
    with foveate.attach(net, reducer):
        for call in (taken, lambda **kwargs: type(net).generate(net, **kwargs)):
            with pytest.raises(AttachError, match=r"call model.generate\(...\) of the model itself"):
                call(**inputs, **GREEDY)
    assert torch.equal(taken(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"])
@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: r.name)
def test_a_callback_runs_the_model_as_outside(reducer, where):
    net, inputs, other = deep_model("llava"), collate(samples("llava")), collate([sample(4, "image", 2)])
    found = []

    def run(result):
        found.append(net(**other).logits)
        return result

    callback = {
        "logits_processor": [lambda ids, scores: run(scores)],
        "stopping_criteria": [lambda ids, scores, **_: run(torch.zeros(len(ids), dtype=torch.bool))],
        "prefix_allowed_tokens_fn": lambda prompt, ids: run(list(range(110))),
    }
    with foveate.attach(net, reducer) as handle, torch.no_grad():
        expected = net(**other).logits
        allowed = {} if where != "prefix_allowed_tokens_fn" else {where: lambda prompt, ids: list(range(110))}
        plain = net.generate(**inputs, **GREEDY, **allowed)
        assert torch.equal(net.generate(**inputs, **GREEDY, **{where: callback[where]}), plain)
        assert [len(row) for row in handle.selections] == [1, 2, 1]
    assert found
    assert all(torch.equal(x, expected) for x in found)


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, "pipeline"])
def test_wrappers_are_told_which_part_to_pass(wrapper):
    net = model("llava")

    class Pipeline:
        def __init__(self, model):
            self.model = model

    wrapped = Pipeline(net) if wrapper == "pipeline" else wrapper(net)
    with pytest.raises(UnsupportedModelError, match=r"pass its \.(module|model)"):
        foveate.attach(wrapped, Uniform(keep=9))


def _together(count, work):
    barrier, faults = threading.Barrier(count), []

    def run(i):
        barrier.wait(timeout=60)
        try:
            work(i)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


def test_threads_that_attach_get_one_handle_and_leave_no_hook():
    net = deep_model("llava")
    for _ in range(10):
        handles = []
        faults = _together(4, lambda _, found=handles: found.append(foveate.attach(net, FastV(keep=9, layer=1))))
        assert len(handles) == 1
        assert [type(fault) for fault in faults] == [AttachError] * 3
        _together(4, lambda _, handle=handles[0]: handle.detach())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("entry", [("tome", {}), ("vispruner", {}), ("flowcut", {})], ids=method_id)
def test_threads_share_the_tower(entry):
    net, inputs = model("llava"), collate(samples("llava"))
    reducer = make(entry, 9)
    with torch.no_grad():
        expected = foveate.reduce(net, inputs, reducer)["mm_encoder_outputs"]["image"].pooler_output

        def work(_):
            for _ in range(10):
                found = foveate.reduce(net, inputs, reducer)["mm_encoder_outputs"]["image"].pooler_output
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

        faults = _together(3, work)
    assert not faults
    assert net.model.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("entry", [("downsample", {}), ("codebook", {}), ("vispruner", {})], ids=method_id)
@pytest.mark.parametrize("family", [pytest.param(name, marks=in_depth(name)) for name in FAMILIES])
@torch.no_grad()
def test_offloaded_weights(family, entry):
    net, inputs = copy.deepcopy(model(family)), collate(samples(family))
    with foveate.attach(net, reducer := make(entry, 9, family)):
        expected = net(**inputs).logits
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    try:
        net(**inputs)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"accelerate cannot offload this model without foveate: {error}")
    with foveate.attach(net, reducer):
        assert torch.equal(net(**inputs).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "entry", [e for e in IN_LLM if e[0] in ("fastv", "pyramiddrop", "sparsevlm", "visiondrop_llm")], ids=method_id
)
def test_gradients_do_not_hang_on_checkpointing(entry, reentrant):
    rows = [*samples("llava"), sample(7, seed=9)]
    inputs = collate(rows, labels=True)
    name, config = entry
    results = []
    for checkpointing in (False, True):
        net = copy.deepcopy(deep_model("llava")).train()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
            net.enable_input_require_grads()
        with foveate.attach(net, name, **config):
            net(**inputs, use_cache=False).loss.backward()
        results.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    plain, checkpointed = results
    assert any(".layers.3." in n for n in plain)
    assert all(torch.allclose(plain[n], checkpointed[n], atol=1e-6) for n in checkpointed)
    assert {n for n in plain if "language_model" in n} <= set(checkpointed)


@pytest.mark.parametrize("entry", IN_LLM, ids=method_id)
@torch.no_grad()
def test_selections_inside_merge_when_the_method_does(entry):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    name, config = entry
    with foveate.attach(net, name, **config) as handle:
        net(**inputs)
    for rows in (handle.selections, *handle.layers.values()):
        for span in (s for row in rows for s in row):
            span.check()
            if span.merge is not None:
                assert len(span.merge.target.unique()) == len(span)
    assert (name in ("sparsevlm", "sparsevlm+", "topv", "visiondrop_llm")) or all(
        s.merge is None for row in handle.selections for s in row
    )
