"""Callers that the engine does not choose: callbacks that run the model, offloaded weights, checkpointing, merges."""

import copy

import pytest
import torch

import foveate
from callers import check_checkpointing, check_offload
from foveate.core.errors import UnsupportedModelError
from foveate.engines.transformers.in_llm import support
from foveate.methods import FastV, Uniform
from foveate.registry import get_method
from tiny import (
    FAMILIES,
    IN_LLM,
    METHODS,
    collate,
    deep_model,
    in_depth,
    make,
    method_id,
    model,
    of_each_kind,
    sample,
    samples,
)

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


@pytest.mark.parametrize("entry", [("downsample", {}), ("codebook", {})], ids=method_id)
@pytest.mark.parametrize("family", [pytest.param(name, marks=in_depth(name)) for name in FAMILIES])
def test_offloaded_weights_beside_their_modules(family, entry):
    check_offload(family, make(entry, 9, family))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "entry", [e for e in IN_LLM if e[0] in ("pyramiddrop", "sparsevlm", "visiondrop_llm")], ids=method_id
)
def test_gradients_do_not_hang_on_checkpointing_inside(entry, reentrant):
    name, config = entry
    if support._RECOMPUTES_HOOKS:
        with pytest.raises(UnsupportedModelError, match="update transformers"):
            check_checkpointing("llava", get_method(name)(**config), (reentrant,))
    else:
        check_checkpointing("llava", get_method(name)(**config), (reentrant,))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("entry", of_each_kind(METHODS), ids=method_id)
def test_gradients_do_not_hang_on_checkpointing_before(entry, reentrant):
    if support._RECOMPUTES_HOOKS and reentrant:
        with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
            check_checkpointing("llava", make(entry, 9, "llava"), (reentrant,))
    else:
        check_checkpointing("llava", make(entry, 9, "llava"), (reentrant,))


def test_a_frozen_tower_is_checkpointed_anyhow():
    net = copy.deepcopy(model("llava")).train()
    net.model.vision_tower.requires_grad_(False)
    net.gradient_checkpointing_enable({"use_reentrant": True})
    net.enable_input_require_grads()
    with foveate.attach(net, Uniform(keep=9)):
        net(**collate(samples("llava"), labels=True), use_cache=False).loss.backward()
    assert all(p.grad is not None for p in net.model.language_model.layers[0].parameters())


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
