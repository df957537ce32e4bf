"""What methods inside the LLM read is what the plain model computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from inside import (
    DEPTH,
    Recording,
    answer_of,
    close,
    generate,
    kept,
    make,
    methods,
)
from layered import layered_answer
from transformers import DynamicCache

import foveate
from foveate import Chain
from foveate.core.in_llm import InLlmReducer
from foveate.core.probes import LayerAttention
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.methods import FastV, TopV, VisPruner, topv
from foveate.registry import get_method
from tiny import (
    collate,
    deep_model,
    sample,
    samples,
)


@methods
def test_eager_and_fused_attention_choose_alike(inside):
    inputs = collate(samples("llava"))
    found = []
    for attention in ("eager", "sdpa"):
        net = deep_model("llava", attention)
        with foveate.attach(net, make(inside)) as handle, torch.no_grad():
            net(**inputs)
        found.append({b: kept(rows) for b, rows in handle.layers.items()})
    assert found[0] == found[1]


def test_fastv_reads_the_attention_of_the_layer_that_ran():
    net, inputs = deep_model("llava", "eager"), collate([sample(4, "image", 5)])
    columns = torch.arange(4, 68)
    maps = net(**inputs, output_attentions=True).attentions
    for query, rows in (("last", slice(-1, None)), ("text", slice(68, None)), ("all", slice(None))):
        for layer in (1, 2, 3):
            scores = maps[layer - 1][0, :, rows].mean(dim=(0, 1))[columns]
            expected = sorted(scores.argsort(descending=True)[:9].tolist())
            with foveate.attach(net, FastV(keep=9, layer=layer, query=query)) as handle, torch.no_grad():
                net(**inputs)
            assert handle.selections[0][0].kept.tolist() == expected


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm+"])
def test_sparsevlm_reads_what_raters_attend_to(name):
    net, inputs = deep_model("llava", "eager"), collate([sample(4, "image", 9)])
    (boundary, *_), columns = get_method(name)(keep=16).boundaries(DEPTH), torch.arange(4, 68)
    with torch.no_grad():
        out = net(**inputs, output_attentions=True, output_hidden_states=True)
    given = out.hidden_states[0][0]
    relevance = (given[columns] @ given[68:].T).softmax(dim=1).mean(dim=0)
    raters = 68 + (relevance > 1 / 9).nonzero().flatten()
    assert 0 < len(raters) < 9
    attention = out.attentions[boundary - 1][0][:, raters][..., columns].double()
    if name == "sparsevlm+":
        turns = net.get_decoder().rotary_emb.inv_freq.double() * (raters[:, None] - columns)[..., None]
        pull = turns.cos().sum(dim=-1) * 2 / (2 * turns.shape[-1]) ** 0.5
        attention = attention / pull.clamp(min=0.1 * (2 * turns.shape[-1]) ** 0.5)
        heads = attention.sum(dim=(1, 2)).argsort(descending=True)[: -(-14 * len(attention) // 32)]
        attention = attention[heads]
    reducer = get_method(name)(keep=16, **({"recycle": 0.0} if name == "sparsevlm" else {}))
    count = reducer.counts(DEPTH, [("image", 64)])[0]
    expected = sorted(attention.mean(dim=(0, 1)).argsort(descending=True)[:count].tolist())
    with foveate.attach(net, reducer) as handle, torch.no_grad():
        net(**inputs)
    assert handle.layers[boundary][0][0].kept.tolist() == expected


def test_sparsevlm_without_recycling_equals_hidden_columns():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    reducer = get_method("sparsevlm")(keep=0.5, recycle=0.0)
    with foveate.attach(net, reducer) as handle:
        out = generate(net, inputs)
    close(torch.stack(out.logits, 1), layered_answer(net, inputs, handle.layers, answer_of(out, inputs), "compact"))


def test_the_next_layer_receives_merged_states(monkeypatch):
    net, inputs = deep_model("llava"), collate([sample(4, "image", 9), sample(2, "image", 6, seed=2)])
    layer, received = net.get_decoder().layers[1], []
    hook = layer.register_forward_pre_hook(lambda _, a, k: received.append(a[0] if a else k["hidden_states"]),
                                           with_kwargs=True)  # fmt: skip
    reducer = get_method("sparsevlm")(keep=16)
    assert reducer.boundaries(DEPTH)[0] == 1
    record = Recording(reducer, monkeypatch)
    with torch.no_grad():
        net(**inputs)
        hook.remove()
        with foveate.attach(net, reducer):
            again = layer.register_forward_pre_hook(
                lambda _, a, k: received.append(a[0] if a else k["hidden_states"]), with_kwargs=True
            )
            net(**inputs)
            again.remove()
    plain, short = received
    for i, (text, behind) in enumerate([(4, 9), (2, 6)]):
        chosen, states = record.cuts[1][i], plain[i, -64 - behind : -behind]
        assert chosen.merge is not None
        expected = torch.cat([plain[i, -64 - behind - text : -64 - behind], chosen.apply(states), plain[i, -behind:]])
        close(short[i, -len(expected) :], expected)
        assert int((chosen.merge.weight < 1).sum()) > 1


def test_topv_reads_what_goes_into_a_layer_and_its_network():
    net, inputs = deep_model("llava"), collate([sample(4, "image", 9)])
    layer, columns, seen = net.get_decoder().layers[1], torch.arange(4, 68), []
    hook = layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        states = net(**inputs, output_hidden_states=True).hidden_states
    hook.remove()
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    for target, values in (("mlp", seen[0]), ("output", states[2])):
        unit = [torch.nn.functional.normalize(x[0, columns], dim=1) for x in (states[1], values)]
        importance = topv.sent(topv.visual_cost(torch.cdist(*unit), places))
        with foveate.attach(net, TopV(keep=20, layer=2, target=target)) as handle, torch.no_grad():
            net(**inputs)
        assert handle.selections[0][0].kept.tolist() == topv.with_recovery(importance, 20, 4).tolist()


def test_topv_does_not_depend_on_the_question():
    net, found = deep_model("llava"), []
    for ids in ([3, 4, 5], [6, 7, 8, 9, 10]):
        row = sample(4, "image")
        with foveate.attach(net, TopV(keep=20, layer=2)) as handle, torch.no_grad():
            net(**collate([{**row, "ids": row["ids"] + ids}]))
            found.append(kept(handle.selections))
    assert found[0] == found[1]


def test_topv_behind_a_method_before_the_llm():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, Chain(VisPruner(keep=20), TopV(keep=8, layer=2))) as handle, torch.no_grad():
        net(**inputs)
        final = handle.selections
    before = foveate.reduce(net, inputs, VisPruner(keep=20)).selection.by_prompt(3)
    for row, first in zip(final, before, strict=True):
        assert sum(map(len, row)) == 8 * len(row)
        for span, whole in zip(row, first, strict=True):
            assert set(span.kept.tolist()) <= set(whole.kept.tolist())


@torch.no_grad()
def test_text_behind_the_last_image_may_be_none(monkeypatch):
    net, reducer, found = deep_model("llava"), get_method("visual_exit")(rule="mass", threshold=0.9, keep=0.25), []
    select = type(reducer).select

    def recorded(self, tokens):
        found.append(([len(x) for x in tokens.text], [len(x) for x in tokens.text_before], tokens.behind))
        return select(self, tokens)

    monkeypatch.setattr(type(reducer), "select", recorded)
    with foveate.attach(net, reducer):
        net(**collate([sample(4, "image"), sample(2, "image", 6)]))
    assert found
    assert all(entry == ([0, 6], [0, 6], (0, 6)) for entry in found)


@torch.no_grad()
def test_attention_in_a_later_turn_is_that_of_its_own_image():
    net, cache = deep_model("llava", "eager"), DynamicCache()
    first, second = sample(4, "image", 9), sample(2, "image", 5, seed=3)
    turn = {key: x for key, x in collate([second]).items() if key != "attention_mask"}
    with foveate.attach(net, FastV(keep=9, layer=2)) as handle:
        net(**collate([first]), **{CACHE: cache})
        net(**turn, **{CACHE: cache})
        found = handle.selections[0][0].kept.tolist()
    before = collate([first])
    whole = {key: torch.cat([before[key], x], dim=int(key == "input_ids")) for key, x in turn.items()}
    attention = net(**whole, output_attentions=True).attentions[1][0, :, -1, 79:143].mean(dim=0)
    assert found == attention.topk(9).indices.sort().values.tolist()


@torch.no_grad()
def test_merging_leaves_the_states_that_the_model_hands_out():
    net, inputs = deep_model("llava"), collate([sample(4, "image", 9)])
    reducer = get_method("sparsevlm")(keep=16)
    expected = net(**inputs, output_hidden_states=True).hidden_states[: reducer.boundaries(DEPTH)[0] + 1]
    with foveate.attach(net, reducer):
        states = net(**inputs, output_hidden_states=True).hidden_states
    for plain, found in zip(expected, states, strict=False):
        assert torch.equal(plain, found)


@dataclass(frozen=True)
class Noting(InLlmReducer):
    """Notes what it reads ahead, and keeps the first tokens."""

    keep: int
    seen: Any = field(default=None, compare=False)

    needs = (LayerAttention("last", ahead=True),)

    def boundaries(self, depth):
        return (2,)

    def counts(self, depth, images):
        return (self.keep,)

    def select(self, tokens):
        self.seen.append(tokens.probe(self.needs[0]))
        return tokens.per_prompt(lambda prompts, n: torch.arange(n).expand(len(prompts.ordinals), -1))


@torch.no_grad()
def test_looking_ahead_sees_what_is_cached():
    """A second turn with an image reads what it would read if the conversation came at once."""
    net, read = deep_model("llava"), []
    whole = collate([sample(9, 4, "image", 5, seed=3)])
    start, ids = whole["input_ids"][:, :9], whole["input_ids"][:, 9:]
    with foveate.attach(net, Noting(keep=9, seen=read)):
        net(**whole)
        cache = DynamicCache()
        net(input_ids=start, **{CACHE: cache}, use_cache=True)
        mask = torch.ones(1, whole["input_ids"].shape[1], dtype=torch.long)
        new = {"input_ids": ids, "pixel_values": whole["pixel_values"], "attention_mask": mask}
        net(**new, **{CACHE: cache}, use_cache=True)
    at_once, in_turns = read
    torch.testing.assert_close(at_once[0], in_turns[0], atol=1e-5, rtol=0)
