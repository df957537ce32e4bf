"""Methods inside the LLM equal the plain model in whose later layers the dropped columns are hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from layered import layered, layered_answer
from oracle import visible_columns
from transformers import DynamicCache, StaticCache

import foveate
from foveate import Chain, FoveateError
from foveate.cost import kv_bytes
from foveate.in_llm import InLlmReducer
from foveate.methods import FastV, TopV, VisPruner, topv
from foveate.reducer import get_method
from foveate.selection import Selection, SpanSelection
from tiny import (
    IN_LLM,
    IN_LLM_FAMILIES,
    STAGED,
    TINIES,
    VISUALS,
    collate,
    deep_model,
    in_depth,
    method_id,
    model,
    sample,
    samples,
)

TOKENS = 9
DEPTH = 4
methods = pytest.mark.parametrize("inside", IN_LLM, ids=method_id)
every_family = pytest.mark.parametrize("family", IN_LLM_FAMILIES)
every_family_in_depth = pytest.mark.parametrize("family", [pytest.param(f, marks=in_depth(f)) for f in IN_LLM_FAMILIES])


def make(inside):
    name, config = inside
    return get_method(name)(**config)


@pytest.fixture(autouse=True)
def _that_run(request):
    """Skip what a family does not give a method."""
    given = getattr(request.node, "callspec", None)
    if given is None or not {"family", "inside"} <= given.params.keys():
        return
    lacking = foveate.families.FAMILIES[given.params["family"]].lacks(make(given.params["inside"]))
    if lacking:
        pytest.skip(f"needs {lacking}")


def positions_of(reducer, family):
    return "original" if foveate.families.FAMILIES[family].keeps_positions else reducer.positions


def generate(net, inputs, **kwargs):
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return net.generate(**inputs, **{**options, **kwargs})


def answer_of(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


def kept(rows):
    return [[span.kept.tolist() for span in row] for row in rows]


@dataclass(frozen=True)
class Replay(InLlmReducer):
    """Drops what another run dropped."""

    keep: Any = None
    cuts: tuple[tuple[int, tuple[SpanSelection, ...]], ...] = ()

    name = "replay"
    adaptive = True

    def boundaries(self, depth: int) -> Sequence[int]:
        return tuple(boundary for boundary, _ in self.cuts)

    def counts(self, depth: int, images: Any) -> Sequence[int]:
        return (0,) * len(self.cuts)

    def select(self, tokens: Any) -> Selection:
        return Selection(dict(self.cuts)[tokens.boundary])


class Recording:
    """Notes down every selection of a method."""

    def __init__(self, reducer, monkeypatch):
        self.cuts, plain = {}, type(reducer).select

        def select(own, tokens):
            chosen = plain(own, tokens)
            self.cuts[tokens.boundary] = tuple(chosen)
            return chosen

        monkeypatch.setattr(type(reducer), "select", select)

    def replay(self):
        return Replay(cuts=tuple(self.cuts.items()))


@every_family_in_depth
@methods
def test_generation_equals_hidden_columns(family, inside):
    reducer = make(inside)
    if reducer.merges:
        pytest.skip("merged tokens have no counterpart in the plain model")
    net, inputs, positions = deep_model(family), collate(samples(family)), positions_of(make(inside), family)
    with foveate.attach(net, reducer) as handle:
        out = generate(net, inputs)
    assert handle.layers or reducer.adaptive
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    close(torch.stack(out.logits, 1), layered_answer(net, inputs, handle.layers, answer_of(out, inputs), positions))


@methods
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(("attention", "dtype"), [("eager", torch.float32), ("sdpa", torch.bfloat16)], ids=str)
def test_implementations_and_precisions(inside, positions, attention, dtype):
    reducer = make(inside)
    net, inputs = deep_model("llava", attention, dtype), collate(samples("llava"))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with foveate.attach(net, reducer, positions=positions) as handle:
        out = generate(net, inputs)
    if not reducer.merges:
        expected = layered_answer(net, inputs, handle.layers, answer_of(out, inputs), positions)
        close(torch.stack(out.logits, 1), expected, 1e-4 if dtype == torch.float32 else 0.15)


def other(span):
    """Return the tokens next to those kept, or all instead of none and none instead of all."""
    if 0 < len(span) < span.length:
        return (span.kept + 1) % span.length
    return torch.arange(0 if len(span) else span.length)


@methods
def test_the_oracle_tells_selections_apart(inside):
    reducer = make(inside)
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, reducer) as handle:
        out = generate(net, inputs)
    wrong = {b: [[SpanSelection(s.length, other(s)) for s in row] for row in rows] for b, rows in handle.layers.items()}
    answer = answer_of(out, inputs)
    right = layered_answer(net, inputs, handle.layers, answer, "original")
    assert (right - layered_answer(net, inputs, wrong, answer, "original")).abs().max() > 1e-2


@every_family_in_depth
@methods
@pytest.mark.parametrize("count", [1, 3], ids=["alone", "padded-batch"])
def test_cached_decoding_equals_full_recomputation(family, inside, count, monkeypatch):
    reducer = make(inside)
    net, inputs = deep_model(family), collate(samples(family)[:count])
    record = Recording(reducer, monkeypatch)
    with foveate.attach(net, reducer):
        out = generate(net, inputs, max_new_tokens=17)
    answer = answer_of(out, inputs)
    whole = {k: v for k, v in inputs.items() if not k.endswith("type_ids")}
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            further = answer if key == "input_ids" else torch.full_like(answer, key == "attention_mask")
            if key == "token_type_ids":
                further = torch.full_like(answer, TINIES[family].answer_type)
            whole[key] = torch.cat([inputs[key], further], dim=1)
    with foveate.attach(net, record.replay(), positions=positions_of(reducer, family)), torch.no_grad():
        logits = net(**whole).logits
    assert logits.shape[1] == whole["input_ids"].shape[1]
    close(torch.stack(out.logits, 1), logits[:, -18:-1])


@every_family_in_depth
@methods
def test_a_prompt_alone_and_in_padded_batches(family, inside, monkeypatch):
    reducer, rows = make(inside), samples(family)
    net = deep_model(family)
    for side in ("left", "right"):
        inputs = collate(rows, side)
        record = Recording(reducer, monkeypatch)
        with foveate.attach(net, reducer) as handle, torch.no_grad():
            together = net(**inputs).logits
            selections = handle.selections
        for i, row in enumerate(rows):
            alone = Recording(reducer, monkeypatch)
            with foveate.attach(net, reducer) as handle, torch.no_grad():
                single = net(**collate([row])).logits[0]
            assert kept(handle.selections) == kept(selections[i : i + 1])
            assert alone.cuts.keys() <= record.cuts.keys()  # once all tokens are gone, nothing is left to choose
            close(together[i, inputs["attention_mask"][i].bool()], single)


@every_family
def test_every_family_generates_with_fastv(family):
    net, inputs = deep_model(family), collate(samples(family))
    reducer = FastV(keep=9, layer=2)
    with foveate.attach(net, reducer) as handle:
        out = generate(net, inputs)
    close(torch.stack(out.logits, 1), layered_answer(net, inputs, handle.layers, answer_of(out, inputs), "original"))


@every_family_in_depth
@methods
def test_layers_hold_what_the_schedule_says(family, inside):
    reducer = make(inside)
    if reducer.adaptive:
        pytest.skip("the schedule depends on the image")
    net, inputs = deep_model(family), collate(samples(family)[:1])
    visual = sum(len(span) for span in foveate.families.family_of(net).spans(net, inputs))
    text = inputs["input_ids"].shape[1] - visual
    with foveate.attach(net, reducer) as handle:
        out = generate(net, inputs, max_new_tokens=3)
    schedule = reducer.schedule(DEPTH, visual)
    sizes = [layer.get_seq_length() for layer in out.past_key_values.layers]
    assert sizes == [text + n + 2 for n in schedule]
    assert schedule[-1] < visual
    for boundary, rows in handle.layers.items():
        for row in rows:
            assert sum(len(s) for s in row) == schedule[boundary]
            for span in row:
                span.check()


@every_family_in_depth
@methods
def test_nothing_to_drop_is_bit_identical(family, inside):
    name, config = inside
    if make(inside).adaptive:
        pytest.skip("an adaptive method has no budget")
    reducer = get_method(name)(**{**config, "keep": 1.0})
    net, inputs = deep_model(family), collate(samples(family))
    plain = generate(net, inputs)
    with foveate.attach(net, reducer):
        out = generate(net, inputs)
    assert torch.equal(out.sequences, plain.sequences)
    for a, b in zip(out.logits, plain.logits, strict=True):
        assert torch.equal(a, b)
    after = generate(net, inputs)
    assert torch.equal(torch.stack(after.logits), torch.stack(plain.logits))


@methods
def test_text_alone_passes_through(inside):
    net, inputs = deep_model("llava"), collate([sample(7), sample(4, seed=1)])
    plain = generate(net, inputs)
    with foveate.attach(net, make(inside)) as handle:
        out = generate(net, inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    assert handle.selections == []


@methods
def test_a_prompt_without_image_in_the_batch(inside):
    net = deep_model("llava")
    rows = [sample(3, "image", 4), sample(90, seed=2), sample(2, "image", 3, "image", 5, seed=4)]
    with foveate.attach(net, make(inside)), torch.no_grad():
        together = net(**collate(rows)).logits
        for i, row in enumerate(rows):
            inputs = {k: v for k, v in collate([row]).items() if i != 1 or k != "pixel_values"}
            close(together[i, -len(row["ids"]) :], net(**inputs).logits[0])


@methods
def test_a_prompt_that_ends_with_its_image(inside):
    net, inputs = deep_model("llava"), collate([sample(3, "image"), sample(5, "image", seed=2)])
    with foveate.attach(net, make(inside)) as handle:
        out = generate(net, inputs)
    for row in handle.selections:
        assert row[-1].kept[-1] == 63
    if not make(inside).merges:
        expected = layered_answer(net, inputs, handle.layers, answer_of(out, inputs), make(inside).positions)
        close(torch.stack(out.logits, 1), expected)


@methods
def test_beams(inside):
    reducer = make(inside)
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, reducer) as handle:
        out = generate(net, inputs, num_beams=3, num_return_sequences=2, max_new_tokens=5, output_scores=True)
    assert len(handle.selections) == 3
    if reducer.merges:
        return
    answers = answer_of(out, inputs)
    for k in (0, 1):
        logits = layered_answer(net, inputs, handle.layers, answers[k::2], reducer.positions)
        score = logits.log_softmax(-1).gather(-1, answers[k::2, :, None]).sum((1, 2)) / 5
        close(out.sequences_scores[k::2], score)


@methods
def test_several_answers(inside):
    reducer = make(inside)
    net, inputs = deep_model("llava"), collate(samples("llava"))
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 2}
    torch.manual_seed(7)
    with foveate.attach(net, reducer) as handle:
        out = generate(net, inputs, **options)
    answers = answer_of(out, inputs)
    assert (answers[0::2] != answers[1::2]).any()
    for k in (0, 1):
        if not reducer.merges:
            expected = layered_answer(net, inputs, handle.layers, answers[k::2], reducer.positions)
            close(torch.stack(out.logits, 1)[k::2], expected)


@every_family_in_depth
@methods
@pytest.mark.parametrize("new_image", [False, True], ids=["text", "image"])
def test_second_turn_on_the_same_cache(family, inside, new_image):
    reducer = make(inside)
    if new_image and "test_second_turn_on_the_same_cache" in TINIES[family].skips:
        pytest.skip(TINIES[family].skips["test_second_turn_on_the_same_cache"])
    net, first = deep_model(family), samples(family)
    second = [sample(2, *([VISUALS[family][0]] if new_image else []), 4, seed=20 + i) for i in range(3)]
    inputs, cache = collate(first), TINIES[family].cache(net)
    positions = positions_of(reducer, family)
    with foveate.attach(net, reducer) as handle:
        one = generate(net, inputs, max_new_tokens=4, past_key_values=cache)
        before = handle.layers
        rows = []
        for a, answer, b in zip(first, answer_of(one, inputs).tolist(), second, strict=True):
            row = {key: a.get(key, []) + b.get(key, []) for key in {**a, **b}}
            rows.append({**row, "ids": a["ids"] + answer + b["ids"]})
        whole = collate(rows)
        turn = {k: x for k, x in collate(second).items() if not k.endswith(("_ids", "attention_mask")) or "pixel" in k}
        turn |= {k: whole[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in whole}
        two = generate(net, turn, past_key_values=cache)
        after = handle.layers if new_image else {b: [[] for _ in row] for b, row in before.items()}
    if reducer.merges or before.keys() != after.keys():
        return
    cuts = {b: [x + y for x, y in zip(before[b], after[b], strict=True)] for b in before}
    close(torch.stack(two.logits, 1), layered_answer(net, whole, cuts, answer_of(two, turn), positions))


@methods
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss(inside, side):
    reducer = make(inside)
    net, inputs = deep_model("llava"), collate(samples("llava"), side, labels=True)
    with foveate.attach(net, reducer) as handle:
        out = net(**inputs)
        out.loss.backward()
    assert all(p.grad is not None for p in net.model.multi_modal_projector.parameters())
    net.zero_grad()
    if reducer.merges:
        return
    logits = layered(net, inputs, handle.layers, reducer.positions)
    losses = []
    for i, columns in enumerate(visible_columns(inputs, handle.selections)):
        labels = inputs["labels"][i, columns]
        rows = logits[i, columns][:-1]
        losses.append(torch.nn.functional.cross_entropy(rows, labels[1:], reduction="none")[labels[1:] >= 0])
    close(out.loss, torch.cat(losses).mean())


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


@every_family_in_depth
@pytest.mark.parametrize("inside", STAGED, ids=method_id)
def test_methods_in_stages_alone_in_batches_and_with_a_whole_budget(family, inside):
    name, config = inside
    net, rows, reducer = deep_model(family), samples(family), make(inside)
    for side in ("left", "right"):
        with foveate.attach(net, reducer) as handle, torch.no_grad():
            together, selections = net(**collate(rows, side)).logits, handle.selections
            assert handle.layers or reducer.stages()[1].adaptive
            assert all(len(span) < span.length for row in selections for span in row)
            for i, row in enumerate(rows):
                single = net(**collate([row])).logits[0]
                assert kept(handle.selections) == kept(selections[i : i + 1])
                own = together[i, : len(single)] if side == "right" else together[i, -len(single) :]
                close(own, single)
    if reducer.stages()[1].adaptive:
        return
    plain = generate(net, collate(rows), max_new_tokens=3)
    with foveate.attach(net, get_method(name)(**{**config, "keep": 1.0})):
        out = generate(net, collate(rows), max_new_tokens=3)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


def test_a_method_inside_acts_where_the_one_before_it_keeps_everything():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, FastV(keep=9, layer=2)) as handle:
        expected, alone = generate(net, inputs), kept(handle.selections)
    with foveate.attach(net, Chain(VisPruner(keep=1.0), FastV(keep=9, layer=2))) as handle:
        out = generate(net, inputs)
        assert kept(handle.selections) == alone
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


def test_hidden_states_are_those_of_the_tokens_that_are_left():
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5)])
    plain = net(**inputs, output_hidden_states=True).hidden_states
    with foveate.attach(net, FastV(keep=9, layer=2)):
        out = net(**inputs, output_hidden_states=True).hidden_states
    assert [x.shape[1] for x in out] == [73, 73, 73, 18, 73]  # the input, the outputs of the layers, the last normed
    assert all(torch.equal(a, b) for a, b in zip(out[:3], plain[:3], strict=True))


def test_chain_of_before_and_inside():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    chain = Chain(VisPruner(keep=20), FastV(keep=0.35, layer=2))
    with foveate.attach(net, chain) as handle:
        out = generate(net, inputs)
        final = handle.selections
    reduced = foveate.reduce(net, inputs, VisPruner(keep=20))
    with foveate.attach(net, FastV(keep=0.35, layer=2)):
        two_steps = generate(net, dict(reduced))
    close(torch.stack(out.logits, 1), torch.stack(two_steps.logits, 1))
    sizes = [layer.get_seq_length() for layer in out.past_key_values.layers]
    width = reduced["input_ids"].shape[1]
    assert sizes[:2] == [width + TOKENS - 1] * 2
    assert sizes[2] == sizes[3] < width
    for row, before in zip(final, reduced.selection.by_prompt(3), strict=True):
        assert [len(s) for s in row] != []
        assert sum(len(s) for s in row) == 7 * len(row)
        for span, whole in zip(row, before, strict=True):
            assert set(span.kept.tolist()) <= set(whole.kept.tolist())


def test_beams_and_a_second_turn_behind_a_chain():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    chain = Chain(VisPruner(keep=20), FastV(keep=7, layer=2))
    cache = DynamicCache()
    with foveate.attach(net, chain) as handle:
        beams = generate(net, inputs, num_beams=2, max_new_tokens=4)
        assert len(handle.selections) == 3
        one = generate(net, inputs, max_new_tokens=4, past_key_values=cache)
        rows = [{**row, "ids": row["ids"] + answer + [5, 6, 7]}
                for row, answer in zip(samples("llava"), answer_of(one, inputs).tolist(), strict=True)]  # fmt: skip
        whole = collate(rows)
        two = generate(net, {k: whole[k] for k in ("input_ids", "attention_mask")}, past_key_values=cache)
        # The same without a cache: the chain sees the same images, and FastV another end of the prompt.
    assert beams.sequences.shape == (3, inputs["input_ids"].shape[1] + 4)
    assert torch.equal(two.sequences[:, : whole["input_ids"].shape[1]], whole["input_ids"])
    assert torch.isfinite(torch.stack(two.logits)).all()


def test_detaching_restores_the_model_exactly():
    net = deep_model("llava")
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    with foveate.attach(net, FastV(keep=9, layer=2)):
        pass
    for name, module in net.named_modules():
        now = vars(module)
        assert now.keys() == before[name].keys()
        assert now.get("config") is before[name].get("config")
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert "generate" not in vars(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "DynamicCache"),
        ({"cache_implementation": "offloaded_static"}, "DynamicCache"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 3}, "takes tokens back"),
        ({"assistant_model": object()}, "takes tokens back"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_generation_cannot_go_along_with(options, message):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, FastV(keep=9)), pytest.raises(FoveateError, match=message):
        net.generate(**inputs, max_new_tokens=2, **options)


def test_a_static_cache_is_refused():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    cache = StaticCache(config=net.config.get_text_config(), max_cache_len=200)
    with foveate.attach(net, FastV(keep=9)), pytest.raises(FoveateError, match="DynamicCache"):
        net(**inputs, past_key_values=cache)


def test_gradient_checkpointing_is_refused():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    net.gradient_checkpointing_enable()
    net.train()
    with foveate.attach(net, FastV(keep=9)), pytest.raises(FoveateError, match="gradient checkpointing"):
        net(**inputs)
    net.eval()


@pytest.mark.parametrize("family", ["lfm2_vl", "qwen3_5"])
def test_recurrent_layers_are_refused(family):
    with pytest.raises(FoveateError, match="attention in every layer of the LLM"):
        foveate.attach(model(family), FastV(keep=9, layer=1))
    net = model(family)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_layers_that_the_model_lacks():
    with pytest.raises(FoveateError, match="layers 0 to 1"):
        foveate.attach(model("llava"), FastV(keep=9, layer=2))


def test_reduce_is_no_way_to_run_it():
    net = deep_model("llava")
    with pytest.raises(FoveateError, match=r"foveate\.attach"):
        foveate.reduce(net, collate(samples("llava")), FastV(keep=9))


def test_chains_put_methods_inside_the_llm_last():
    with pytest.raises(FoveateError, match="come last"):
        Chain(FastV(keep=9), VisPruner(keep=5))
    with pytest.raises(FoveateError, match="ascending"):
        foveate.attach(deep_model("llava"), Chain(FastV(keep=9, layer=2), FastV(keep=5, layer=1)))
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, Chain(FastV(keep=9, layer=1), FastV(keep=5, layer=3))) as handle:
        out = generate(net, inputs)
    assert list(handle.layers) == [1, 3]
    close(torch.stack(out.logits, 1), layered_answer(net, inputs, handle.layers, answer_of(out, inputs), "original"))


def test_an_engine_of_vllm_is_refused_with_the_alternative():
    engine = type("LLM", (), {"__module__": "vllm.entrypoints.llm"})()
    with pytest.raises(FoveateError, match=r"inside the LLM.*use a method that acts before the LLM: .*vispruner"):
        foveate.attach(engine, FastV(keep=9))
    with pytest.raises(FoveateError, match="models of transformers"):
        foveate.attach(engine, VisPruner(keep=9))


@methods
def test_what_each_layer_received(inside):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, make(inside)) as handle, torch.no_grad():
        net(**inputs)
        for i, row in enumerate(handle.received):
            assert row[0] == 64 * len(handle.selections[i])
            for boundary, rows in handle.layers.items():
                assert row[boundary] == sum(map(len, rows[i]))
            assert row[-1] == sum(map(len, handle.selections[i]))
    with foveate.attach(net, Chain(VisPruner(keep=20), FastV(keep=7, layer=2))) as handle, torch.no_grad():
        net(**inputs)
    assert handle.received == [[20, 20, 7, 7], [40, 40, 14, 14], [20, 20, 7, 7]]


@every_family_in_depth
@methods
def test_a_cache_is_as_large_as_the_costs_say(family, inside):
    net, inputs = deep_model(family), collate(samples(family)[:1])
    with foveate.attach(net, make(inside)) as handle, torch.no_grad():
        cache = net(**inputs, use_cache=True).past_key_values
        (received,) = handle.received
    text = inputs["input_ids"].shape[1] - received[0]
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    config = net.config.get_text_config()
    assert held == kv_bytes(config, [text + n for n in received], 4)


@methods
def test_a_prompt_with_a_single_visual_token(inside):
    """All but one of the tokens of a picture are dropped before the LLM."""
    reducer = make(inside)
    net, inputs = deep_model("llava"), collate([sample(4, "image", 9), sample(2, "image", 5, "image", 3, seed=2)])
    chain = Chain(VisPruner(keep=1), reducer)
    with foveate.attach(net, chain) as handle:
        out = generate(net, inputs, max_new_tokens=4)
    assert torch.isfinite(torch.stack(out.logits)).all()
    assert all(row[0] == n for row, n in zip(handle.received, (1, 2), strict=True))


@methods
def test_an_image_that_stands_twice_in_a_prompt(inside):
    row = sample(3, "image", 4, "image", 5)
    row["pixel_values"][1] = row["pixel_values"][0]
    net = deep_model("llava")
    with foveate.attach(net, make(inside)) as handle, torch.no_grad():
        logits = net(**collate([row])).logits
    assert torch.isfinite(logits).all()
    assert [span.length for span in handle.selections[0]] == [64, 64]
