"""Callers that the engine does not choose: callbacks that run the model, offloaded weights, checkpointing, merges."""

import copy

import accelerate
import pytest
import torch

import foveate
from foveate.core.errors import UnsupportedModelError
from foveate.engines.transformers.in_llm import support
from foveate.methods import FastV, Uniform
from tiny import FAMILIES, IN_LLM, collate, deep_model, in_depth, make, method_id, model, sample, samples

GREEDY = {"max_new_tokens": 4, "do_sample": False}
REDUCERS = [Uniform(keep=9), FastV(keep=9, layer=1)]


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
    if support._RECOMPUTES_HOOKS:
        net = copy.deepcopy(deep_model("llava")).train()
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with (
            foveate.attach(net, entry[0], **entry[1]),
            pytest.raises(UnsupportedModelError, match="update transformers"),
        ):
            net(**collate(samples("llava")), use_cache=False)
        return
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
