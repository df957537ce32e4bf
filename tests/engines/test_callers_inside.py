"""Callers that the engine does not choose: callbacks that run the model, offloaded weights, checkpointing, merges."""

import copy

import pytest
import torch
from inside import Recording
from transformers.generation.streamers import BaseStreamer

import foveate
from callers import check_checkpointing, check_offload
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.selection import SpanSelection
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


class Streamer(BaseStreamer):
    def __init__(self, run):
        self.put = self.end = run


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"])
@pytest.mark.parametrize("runs", ["forward", "generate"])
@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: r.name)
def test_a_callback_runs_the_model_as_outside(reducer, where, runs):
    net, other = deep_model("llava"), collate([sample(4, "image", 2)])
    inputs = collate(samples("llava")[:1] if where == "streamer" else samples("llava"))
    found = []

    def ask():
        return net(**other).logits if runs == "forward" else net.generate(**other, **GREEDY)

    def run(result=None):
        found.append(ask())
        return result

    callback = {
        "logits_processor": [lambda ids, scores: run(scores)],
        "stopping_criteria": [lambda ids, scores, **_: run(torch.zeros(len(ids), dtype=torch.bool))],
        "prefix_allowed_tokens_fn": lambda prompt, ids: run(list(range(110))),
        "streamer": Streamer(run),
    }
    with foveate.attach(net, reducer) as handle, torch.no_grad():
        expected = ask()
        allowed = {} if where != "prefix_allowed_tokens_fn" else {where: lambda prompt, ids: list(range(110))}
        plain = net.generate(**inputs, **GREEDY, **allowed)
        assert torch.equal(net.generate(**inputs, **GREEDY, **{where: callback[where]}), plain)
        assert [len(row) for row in handle.selections] == [1, 2, 1][: len(plain)]
    assert len(found) > 3
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


@pytest.mark.parametrize("entry", [e for e in IN_LLM if get_method(e[0])(**e[1]).merges], ids=method_id)
@torch.no_grad()
def test_merges_across_images_are_told(entry, monkeypatch):
    rows = [sample(3, "image", 2, "image", 4, "image", 5, seed=1), *samples("llava")]
    net, inputs = deep_model("llava"), collate(rows)
    name, config = entry
    reducer = get_method(name)(**config)
    record = Recording(reducer, monkeypatch)
    with foveate.attach(net, reducer) as handle:
        net(**inputs)
    across = 0
    for prompt, images in enumerate([3, 1, 2, 1]):
        states = torch.randn(64 * images, 5, generator=torch.Generator().manual_seed(3))
        own, left = states.split(64), states
        for boundary, cut in record.cuts.items():
            left, spans, merged = cut[prompt].apply(left), handle.layers[boundary][prompt], []
            for i, span in enumerate(spans):
                others = [x for j, x in enumerate(own) if j != i]
                across += bool(span.extra)
                merged.append(span.apply(torch.cat([own[i], *others]) if span.extra else own[i]))
                span.check()
                assert SpanSelection.from_dict(span.to_dict()).extra == span.extra
                if span.extra:
                    with pytest.raises(InputError, match=r"merges rows of the \d+ behind the 64 tokens"):
                        span.apply(own[i])
            torch.testing.assert_close(torch.cat(merged), left, atol=1e-5, rtol=1e-5)
    assert bool(across) == (name in ("sparsevlm", "sparsevlm+") and config.get("recycle") != 0.0)
