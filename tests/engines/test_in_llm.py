"""Methods inside the LLM equal the plain model in whose later layers the dropped columns are hidden."""

from __future__ import annotations

import pytest
import torch
from inside import (
    DEPTH,
    TOKENS,
    Recording,
    answer_of,
    answered,
    close,
    each_method,
    every_family,
    every_family_in_depth,
    generate,
    kept,
    make,
    methods,
    one_family_in_depth,
    positions_of,
)
from layered import layered, layered_answer
from oracle import visible_columns

import foveate
from foveate import Chain
from foveate.core.in_llm import tokens_per_layer
from foveate.core.selection import SpanSelection
from foveate.cost import kv_bytes
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.engines.transformers.caches import cache_of
from foveate.methods import FastV, VisPruner
from foveate.registry import get_method
from tiny import (
    TINIES,
    VISUALS,
    collate,
    deep_model,
    sample,
    samples,
)


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


@each_method
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


@one_family_in_depth
@methods
@pytest.mark.parametrize("count", [1, 3], ids=["alone", "padded-batch"])
def test_cached_decoding_equals_full_recomputation(family, inside, count, monkeypatch):
    reducer = make(inside)
    net, inputs = deep_model(family), collate(samples(family)[:count])
    record = Recording(reducer, monkeypatch)
    with foveate.attach(net, reducer):
        out = generate(net, inputs, max_new_tokens=17)
    whole = answered(family, inputs, answer_of(out, inputs))
    with foveate.attach(net, record.replay(), positions=positions_of(reducer, family)), torch.no_grad():
        logits = net(**whole).logits
    assert logits.shape[1] == whole["input_ids"].shape[1]
    close(torch.stack(out.logits, 1), logits[:, -18:-1])


@one_family_in_depth
@each_method
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


@one_family_in_depth
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
    schedule = tokens_per_layer(reducer, DEPTH, visual)
    sizes = [layer.get_seq_length() for layer in cache_of(out).layers]
    assert sizes == [text + n + 2 for n in schedule]
    assert schedule[-1] < visual
    for boundary, rows in handle.layers.items():
        for row in rows:
            assert sum(len(s) for s in row) == schedule[boundary]
            for span in row:
                span.check()


@one_family_in_depth
@each_method
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


@each_method
def test_text_alone_passes_through(inside):
    net, inputs = deep_model("llava"), collate([sample(7), sample(4, seed=1)])
    plain = generate(net, inputs)
    with foveate.attach(net, make(inside)) as handle:
        out = generate(net, inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    assert handle.selections == []


@each_method
def test_a_prompt_without_image_in_the_batch(inside):
    net = deep_model("llava")
    rows = [sample(3, "image", 4), sample(90, seed=2), sample(2, "image", 3, "image", 5, seed=4)]
    with foveate.attach(net, make(inside)), torch.no_grad():
        together = net(**collate(rows)).logits
        for i, row in enumerate(rows):
            inputs = {k: v for k, v in collate([row]).items() if i != 1 or k != "pixel_values"}
            close(together[i, -len(row["ids"]) :], net(**inputs).logits[0])


@each_method
def test_a_prompt_that_ends_with_its_image(inside):
    net, inputs = deep_model("llava"), collate([sample(3, "image"), sample(5, "image", seed=2)])
    with foveate.attach(net, make(inside)) as handle:
        out = generate(net, inputs)
    for row in handle.selections:
        assert row[-1].kept[-1] == 63
    if not make(inside).merges:
        expected = layered_answer(net, inputs, handle.layers, answer_of(out, inputs), make(inside).positions)
        close(torch.stack(out.logits, 1), expected)


@each_method
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


@each_method
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


def left(layers, boundary, shown):
    """What a turn left behind a boundary, which may be none of its own."""
    earlier = [b for b in layers if b <= boundary]
    if earlier:
        return layers[max(earlier)]
    return [[SpanSelection(s.length, torch.arange(s.length), kind=s.kind) for s in row] for row in shown]


@one_family_in_depth
@each_method
@pytest.mark.parametrize("new_image", [False, True], ids=["text", "image"])
def test_second_turn_on_the_same_cache(family, inside, new_image, monkeypatch):
    reducer = make(inside)
    record = Recording(reducer, monkeypatch)
    if new_image and "test_second_turn_on_the_same_cache" in TINIES[family].skips:
        pytest.skip(TINIES[family].skips["test_second_turn_on_the_same_cache"])
    net, first = deep_model(family), samples(family)
    second = [sample(2, *([VISUALS[family][0]] if new_image else []), 4, seed=20 + i) for i in range(3)]
    inputs, cache = collate(first), TINIES[family].cache(net)
    positions = positions_of(reducer, family)
    with foveate.attach(net, reducer) as handle:
        one = generate(net, inputs, max_new_tokens=4, **{CACHE: cache})
        before, shown_before = handle.layers, handle.selections
        rows = []
        for a, answer, b in zip(first, answer_of(one, inputs).tolist(), second, strict=True):
            row = {key: a.get(key, []) + b.get(key, []) for key in {**a, **b}}
            rows.append({**row, "ids": a["ids"] + answer + b["ids"]})
        whole = collate(rows)
        turn = {k: x for k, x in collate(second).items() if not k.endswith(("_ids", "attention_mask")) or "pixel" in k}
        turn |= {k: whole[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in whole}
        two = generate(net, turn, **{CACHE: cache})
        after, shown_after = (handle.layers, handle.selections) if new_image else ({}, [[] for _ in first])
    if reducer.merges:  # no masks equal it: one pass over all columns, with what the first turn chose
        if not new_image:
            longest = answered(family, whole, answer_of(two, turn))
            with foveate.attach(net, record.replay(), positions=positions), torch.no_grad():
                logits = net(**longest).logits
            close(torch.stack(two.logits, 1), logits[:, -TOKENS - 1 : -1])
        return
    cuts = {
        b: [x + y for x, y in zip(left(before, b, shown_before), left(after, b, shown_after), strict=True)]
        for b in sorted({*before, *after})
    }
    close(torch.stack(two.logits, 1), layered_answer(net, whole, cuts, answer_of(two, turn), positions))


@each_method
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


@one_family_in_depth
@methods
def test_a_cache_is_as_large_as_the_costs_say(family, inside):
    net, inputs = deep_model(family), collate(samples(family)[:1])
    with foveate.attach(net, make(inside)) as handle, torch.no_grad():
        cache = cache_of(net(**inputs, use_cache=True))
        (received,) = handle.received
    text = inputs["input_ids"].shape[1] - received[0]
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    config = net.config.get_text_config()
    assert held == kv_bytes(config, [text + n for n in received], 4)


@each_method
def test_a_prompt_with_a_single_visual_token(inside):
    """All but one of the tokens of a picture are dropped before the LLM."""
    reducer = make(inside)
    net, inputs = deep_model("llava"), collate([sample(4, "image", 9), sample(2, "image", 5, "image", 3, seed=2)])
    chain = Chain(VisPruner(keep=1), reducer)
    with foveate.attach(net, chain) as handle:
        out = generate(net, inputs, max_new_tokens=4)
    assert torch.isfinite(torch.stack(out.logits)).all()
    assert all(row[0] == n for row, n in zip(handle.received, (1, 2), strict=True))


@each_method
def test_an_image_that_stands_twice_in_a_prompt(inside):
    row = sample(3, "image", 4, "image", 5)
    row["pixel_values"][1] = row["pixel_values"][0]
    net = deep_model("llava")
    with foveate.attach(net, make(inside)) as handle, torch.no_grad():
        logits = net(**collate([row])).logits
    assert torch.isfinite(logits).all()
    assert [span.length for span in handle.selections[0]] == [64, 64]
