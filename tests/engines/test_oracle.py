"""Pruned runs equal the plain model with the dropped columns hidden (original positions) or absent (compact)."""

import pytest
import torch
from oracle import TOKENS, answer_logits, extended, hidden, rebuilt, visible_columns, visual_features
from transformers import DynamicCache

import foveate
from foveate import Budget, Chain
from foveate.engines.hf import Reduced, Settings, decide, look
from foveate.methods import Downsample, FasterVLM, Pool, Random, Uniform, VisPruner
from foveate.reducer import identity
from tiny import (
    FAMILIES,
    IMAGE,
    METHODS,
    TINIES,
    VIDEO_METHODS,
    VISUALS,
    Visual,
    cast,
    collate,
    embedded_rows,
    in_depth,
    make,
    method_id,
    model,
    sample,
    samples,
)

REDUCERS = [Random(keep=9, seed=2), Uniform(keep=0.2), VisPruner(keep=11)]
POSITIONS = ["original", "compact"]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}

both_positions = pytest.mark.parametrize("positions", POSITIONS)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_family_in_depth = pytest.mark.parametrize("family", [pytest.param(f, marks=in_depth(f)) for f in FAMILIES])
every_position = pytest.mark.parametrize(
    ("family", "positions"), [(f, positions) for f in FAMILIES for positions in TINIES[f].positions]
)
every_position_in_depth = pytest.mark.parametrize(
    ("family", "positions"),
    [pytest.param(f, positions, marks=in_depth(f)) for f in FAMILIES for positions in TINIES[f].positions],
)


def generate(net, inputs, **kwargs):
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return net.generate(**inputs, **{**options, **kwargs})


def answer_of(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def close(a, b, dtype=torch.float32):
    torch.testing.assert_close(a.float(), b.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def check(net, inputs, out, selections, positions, dtype=torch.float32):
    """Compare a generated answer with the oracle, token by token."""
    answer = answer_of(out, inputs)
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    expected = answer_logits(net, inputs, selections, answer, positions)
    close(torch.stack(out.logits, dim=1), expected, dtype)


@every_family
def test_tiny_models_answer_in_many_ways(family):
    """Random weights must not make every oracle agree with everything."""
    net, inputs = model(family), collate(samples(family))
    plain = generate(net, inputs)
    assert len(set(answer_of(plain, inputs).flatten().tolist())) > 8
    best = torch.stack(plain.logits, 1).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-3
    # Pictures of zeros fill up the batches of some models.
    blind = generate(net, {k: 0.5 * (x != 0) if x.is_floating_point() else x for k, x in inputs.items()})
    assert (plain.logits[0] - blind.logits[0]).abs().max() > 0.1


@every_position_in_depth
@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)],
    ids=["sdpa", "eager", "bf16"],
)
def test_generation_equals_the_oracle(family, positions, reducer, attention, dtype):
    net, inputs = model(family, attention, dtype), cast(collate(samples(family)), dtype)
    with foveate.attach(net, reducer, positions=positions) as handle:
        out = generate(net, inputs)
    assert [len(row) for row in handle.selections] == [1, 2, 1]
    for row in handle.selections:
        for span in row:
            span.check()
            assert len(span) < span.length
    check(net, inputs, out, handle.selections, positions, dtype)


@every_position
def test_every_family_equals_the_oracle(family, positions):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        out = generate(net, inputs)
    check(net, inputs, out, handle.selections, positions)


@every_family
def test_every_family_keeps_what_a_budget_covers(family):
    net, inputs = model(family), collate(samples(family))
    plain = net(**inputs).logits
    with foveate.attach(net, Random(keep=1.0)):
        assert torch.equal(net(**inputs).logits, plain)


@every_position_in_depth
def test_the_oracles_tell_selections_apart(family, positions):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Random(keep=9), positions=positions):
        out = generate(net, inputs)
    with foveate.attach(net, Random(keep=9, seed=1)) as other:
        generate(net, inputs)
    logits = answer_logits(net, inputs, other.selections, answer_of(out, inputs), positions)
    assert (logits - torch.stack(out.logits, 1)).abs().max() > 0.1


@every_family_in_depth
@pytest.mark.parametrize("entry", METHODS + VIDEO_METHODS, ids=method_id)
def test_prefill_of_every_method_equals_the_oracle(entry, family):
    net, inputs = model(family), collate(samples(family))
    reducer = make(entry, 13, family)
    for positions in TINIES[family].positions:
        reduced = foveate.reduce(net, inputs, reducer, positions=positions)
        with torch.no_grad():
            logits = net(**reduced).logits[:, -1]
        selections = reduced.selection.by_prompt(3)
        if reducer.stage == "pixels":
            assert logits.isfinite().all()
            continue
        given = None
        if reducer.stage == "encoder":  # what the LLM makes of the reduced features
            given = embedded_rows(reduced)
        expected = rebuilt(net, inputs, selections, positions, reducer.merges, given)
        close(logits, torch.stack([x[-1] for x in expected]))


@every_family_in_depth
def test_methods_that_share_a_pass_do_not_disturb_each_other(family):
    """Some need the `[CLS]` tokens or all embeddings, and others, or none at all, do not."""
    net, inputs = model(family), collate(samples(family))
    family_of = foveate.families.family_of(net)
    spans = family_of.spans(net, inputs)
    reducers = [make(entry, 13, family) for entry in METHODS]
    reducers = [r for r in reducers if r.stage == "before_llm" and not family_of.lacks(r)]
    with torch.no_grad():
        tokens = look(net, family_of, inputs, spans, reducers)
        whole = family_of.embed(net, tokens, identity(spans), None)
        alone = family_of.embed(net, look(net, family_of, inputs, spans, []), identity(spans), None)
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a, b)
        for reducer in reducers:
            together = decide(tokens, Settings(reducer, "compact"))
            reduced = foveate.reduce(net, inputs, reducer)
            assert [s.kept.tolist() for s in together] == [s.kept.tolist() for s in reduced.selection]
            embeds = family_of.embed(net, tokens, together, reducer.merges)
            shared = Reduced(mm_encoder_outputs=family_of.encoder_outputs(spans, embeds))
            shared.selection = reduced.selection
            for x, given in zip(embedded_rows(shared), embedded_rows(reduced), strict=True):
                close(x, given)


@both_positions
def test_downsample_equals_smaller_pictures(positions):
    net, inputs = model("llava"), collate([sample(4, "image", 5, seed=1)])
    reduced = foveate.reduce(net, inputs, Downsample(keep=16), positions=positions)
    assert len(reduced.selection[0]) == 16
    small = torch.nn.functional.interpolate(inputs["pixel_values"], size=(16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        tower = net.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
        expected = net.model.multi_modal_projector(tower.hidden_states[-2][0, 1:])
        (embeds,) = reduced["mm_encoder_outputs"]["image"].pooler_output
        torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)
        ids = torch.cat([inputs["input_ids"][:, :4], torch.full((1, 16), IMAGE), inputs["input_ids"][:, -5:]], 1)
        assert torch.equal(reduced["input_ids"], ids)
        embedded = net.get_input_embeddings()(ids)
        embedded[0, 4:20] = expected
        columns = torch.tensor(visible_columns(inputs, reduced.selection.by_prompt(1)))
        at = columns if positions == "original" else torch.arange(ids.shape[1])[None]
        close(net(**reduced).logits, net(inputs_embeds=embedded, position_ids=at).logits)


@pytest.mark.parametrize("family", [f for f in FAMILIES if foveate.families.FAMILIES[f].resizes])
def test_downsample_through_every_tower(family):
    """Of a crop whose grid stays whole, the resized picture is the picture."""
    net, inputs = model(family), collate(samples(family))
    family_of = foveate.families.family_of(net)
    spans = family_of.spans(net, inputs)
    with torch.no_grad():
        same = family_of.encode_at(net, inputs, spans, [[c.grid for c in s.crops] for s in spans])
        tokens = family_of.encode(net, inputs, spans, ())
        for span, parts, hidden_states in zip(spans, same, tokens.hidden, strict=True):
            for crop, part in zip(span.crops, parts, strict=True):
                # Others were cut from their crop, and lose its surroundings.
                if TINIES[family].whole_grid in (None, crop.grid):
                    close(part, hidden_states[crop.index])


@every_family_in_depth
@pytest.mark.parametrize("keep", [1.0, 10_000])
@pytest.mark.parametrize("entry", METHODS + VIDEO_METHODS, ids=method_id)
def test_a_budget_for_everything_is_bit_identical(family, keep, entry):
    net, inputs = model(family), collate(samples(family))
    plain = generate(net, inputs, max_new_tokens=3)
    with foveate.attach(net, make(entry, keep, family)) as handle:
        out = generate(net, inputs, max_new_tokens=3)
        assert torch.equal(net(**inputs).logits, model(family)(**inputs).logits)
    assert torch.equal(out.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
    assert all(span.is_identity for row in handle.selections for span in row)
    reduced = foveate.reduce(net, inputs, make(entry, keep, family))
    assert dict(reduced) == inputs
    assert reduced.compaction is None


@every_position_in_depth
@pytest.mark.parametrize("reducer", [Random(keep=9, seed=2), Uniform(keep=0.2), Pool(keep=6)], ids=lambda r: r.name)
def test_a_batch_gives_each_prompt_what_it_gets_alone(family, positions, reducer):
    net, rows = model(family), samples(family)
    inputs = collate(rows)
    assert (inputs["attention_mask"] == 0).any()
    with foveate.attach(net, reducer, positions=positions) as handle:
        together = generate(net, inputs)
        selections = handle.selections
        for i, row in enumerate(rows):
            alone = generate(net, collate([row]))
            (own,) = handle.selections
            assert [s.kept.tolist() for s in own] == [s.kept.tolist() for s in selections[i]]
            close(torch.stack(together.logits, 1)[i], torch.stack(alone.logits, 1)[0])
            assert torch.equal(answer_of(together, inputs)[i], alone.sequences[0, -TOKENS:])


@every_position_in_depth
def test_padding_side_does_not_matter(family, positions):
    net, rows = model(family), samples(family)
    with foveate.attach(net, Uniform(keep=9), positions=positions), torch.no_grad():
        left, right = net(**collate(rows, "left")), net(**collate(rows, "right"))
        for i, row in enumerate(rows):
            alone = net(**collate([row])).logits[0]
            close(left.logits[i, -len(alone) :], alone)
            close(right.logits[i, : len(alone)], alone)


@every_position_in_depth
def test_different_budgets_in_one_batch(family, positions):
    """Spans of different lengths after reduction: shorter rows are padded anew."""
    net = model(family)
    a, b, _ = VISUALS[family]
    inputs = collate([sample(3, a, 4, seed=1), sample(2, b, 3, a, 6, seed=2)])
    with foveate.attach(net, Random(keep=(13, 5)), positions=positions) as handle:
        out = generate(net, inputs)
    assert len({len(span) for row in handle.selections for span in row}) == 2
    check(net, inputs, out, handle.selections, positions)


@every_family
def test_budgets_by_kind_and_by_image(family):
    net, inputs = model(family), collate([samples(family)[1]])
    spans = foveate.families.family_of(net).spans(net, inputs)
    assert len(spans) == 2
    tenth = [max(1, round(0.1 * sum(map(len, s.crops)))) for s in spans]
    images = [s.kind == "image" for s in spans]
    for keep, wanted in (
        (7, [7, 7]),
        ([7, 4], [7, 4]),
        ({"image": 7, "video": 0.1}, [7 if image else share for image, share in zip(images, tenth, strict=True)]),
        ({"image": 0.1, "video": 7}, [share if image else 7 for image, share in zip(images, tenth, strict=True)]),
    ):
        assert [len(s) for s in foveate.reduce(net, inputs, Random(keep=keep)).selection] == wanted


@both_positions
def test_one_image_stays_whole_beside_a_reduced_one(positions):
    for family in ("llava", "llava_next"):
        net = model(family)
        a, b, _ = VISUALS[family]
        inputs = collate([sample(2, a, 3, b, 4, seed=2)])
        for reducer in (VisPruner(keep=[1.0, 7]), Pool(keep=[1.0, 7]), Downsample(keep=[1.0, 7])):
            with foveate.attach(net, reducer, positions=positions) as handle:
                out = generate(net, inputs)
            first, second = handle.selections[0]
            assert first.is_identity
            assert len(second) == (7 if reducer.stage == "before_llm" else len(second)) < second.length
            if reducer.stage == "pixels":
                with torch.no_grad():
                    reduced = foveate.reduce(net, inputs, reducer)
                (whole, _) = reduced["mm_encoder_outputs"]["image"].pooler_output
                close(whole, visual_features(net, inputs)["image"][: first.length])
                continue
            whole = extended(inputs, answer_of(out, inputs))
            logits = torch.stack([x[-TOKENS - 1 : -1] for x in rebuilt(net, whole, handle.selections, positions)])
            close(torch.stack(out.logits, 1), logits)


@both_positions
def test_no_attention_mask(positions):
    net, inputs = model("llava"), collate([sample(4, "image", 5, "image", 3, seed=1)])
    bare = {k: x for k, x in inputs.items() if k != "attention_mask"}
    with foveate.attach(net, VisPruner(keep=9), positions=positions) as handle:
        out, logits = generate(net, bare), net(**bare).logits
    check(net, inputs, out, handle.selections, positions)
    close(logits[:, -1], out.logits[0])


@both_positions
def test_own_position_ids(positions):
    net, inputs = model("llava"), collate(samples("llava"))
    full = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with foveate.attach(net, Uniform(keep=9), positions=positions), torch.no_grad():
        if positions == "compact":
            with pytest.raises(foveate.FoveateError, match="leave them out"):
                net(**inputs, position_ids=full)
        else:
            close(net(**inputs, position_ids=full).logits[:, -1], net(**inputs).logits[:, -1])


@every_position_in_depth
def test_beams(family, positions):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        out = generate(net, inputs, num_beams=3, num_return_sequences=2, max_new_tokens=5, output_scores=True)
    assert out.sequences.shape == (6, inputs["input_ids"].shape[1] + 5)
    prompts = inputs["input_ids"].repeat_interleave(2, 0)
    assert torch.equal(out.sequences[:, : prompts.shape[1]], prompts)

    def score(answers):
        logits = answer_logits(net, inputs, handle.selections, answers, positions)
        return logits.log_softmax(-1).gather(-1, answers[..., None]).sum((1, 2)) / 5

    for k in (0, 1):
        close(out.sequences_scores[k::2], score(answer_of(out, inputs)[k::2]))
    assert (out.sequences_scores[::2] > out.sequences_scores[1::2]).all()


@both_positions
def test_sampling_with_several_answers(positions):
    net, inputs = model("llava"), collate(samples("llava"))
    reducer = Uniform(keep=9)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 2}
    with foveate.attach(net, reducer, positions=positions) as handle:
        torch.manual_seed(7)
        out = generate(net, inputs, **options)
    torch.manual_seed(7)
    pure = generate(net, foveate.reduce(net, inputs, reducer, positions=positions), **options)
    assert torch.equal(answer_of(out, inputs), pure.sequences[:, -TOKENS:])
    for k in (0, 1):
        logits = answer_logits(net, inputs, handle.selections, answer_of(out, inputs)[k::2], positions)
        close(torch.stack(out.logits, 1)[k::2], logits)
    assert (out.sequences[0::2] != out.sequences[1::2]).any()


def joined(first, answers, then):
    """Return prompts made of earlier prompts, their answers and what follows."""
    rows = []
    for before, answer, after in zip(first, answers.tolist(), then, strict=True):
        row = {key: before.get(key, []) + after.get(key, []) for key in {**before, **after}}
        row["ids"] = before["ids"] + answer + after["ids"]
        rows.append(row)
    return rows


@every_position_in_depth
@pytest.mark.parametrize("new_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("only_new", [False, True], ids=["full-ids", "new-ids"])
def test_second_turn_on_the_same_cache(family, positions, new_image, only_new):
    net, first = model(family), samples(family)
    second = [sample(2, *([VISUALS[family][0]] if new_image else []), 4, seed=20 + i) for i in range(3)]
    inputs, cache = collate(first), TINIES[family].cache(net)
    with foveate.attach(net, Random(keep=9), positions=positions) as handle:
        one = generate(net, inputs, max_new_tokens=4, past_key_values=cache)
        before = handle.selections
        whole = collate(joined(first, answer_of(one, inputs), second))
        turn = {k: x for k, x in collate(second).items() if not k.endswith(("_ids", "attention_mask")) or "pixel" in k}
        turn |= {k: whole[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in whole}
        assert torch.equal(whole["input_ids"][:, : one.sequences.shape[1]], one.sequences)
        if only_new:
            turn["input_ids"] = turn["input_ids"][:, one.sequences.shape[1] - 1 :]
        two = generate(net, turn, past_key_values=cache)
        after = handle.selections if new_image else [[] for _ in before]
        # A third turn, of text.
        answer = answer_of(two, turn)
        third = [sample(3, seed=40 + i) for i in range(3)]
        longest = collate(joined(joined(first, answer_of(one, inputs), second), answer, third))
        three = generate(net, {k: longest[k] for k in ("input_ids", "attention_mask")}, past_key_values=cache)
    assert torch.equal(two.sequences[:, : turn["input_ids"].shape[1]], turn["input_ids"])
    selections = [a + b for a, b in zip(before, after, strict=True)]
    close(torch.stack(two.logits, 1), answer_logits(net, whole, selections, answer, positions))
    check(net, longest, three, selections, positions)


@both_positions
@pytest.mark.parametrize("only_new", [False, True], ids=["full-ids", "new-ids"])
def test_first_image_in_the_second_turn(positions, only_new):
    net, first, second = model("llava"), [sample(7), sample(7, seed=1)], [sample(2, "image", 3), sample(4, "image", 1)]
    inputs, cache = collate(first), DynamicCache()
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        one = generate(net, inputs, max_new_tokens=4, past_key_values=cache)
        whole = collate(joined(first, answer_of(one, inputs), second))
        turn = dict(whole)
        if only_new:
            turn["input_ids"] = turn["input_ids"][:, one.sequences.shape[1] - 1 :]
        two = generate(net, turn, past_key_values=cache)
    answer = answer_of(two, turn)
    close(torch.stack(two.logits, 1), answer_logits(net, whole, handle.selections, answer, positions))


@every_position_in_depth
@pytest.mark.parametrize("with_mask", [False, True], ids=["no-mask", "mask"])
def test_manual_decoding(family, positions, with_mask):
    rows = samples(family) if with_mask else samples(family)[1:2]
    net, inputs = model(family), collate(rows)
    step = dict(inputs)
    if not with_mask:
        del step["attention_mask"]
    logits, answer, cache = [], [], None
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle, torch.no_grad():
        for _ in range(6):
            out = net(**step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[:, -1])
            answer.append(out.logits[:, -1, 1:110].argmax(-1, keepdim=True) + 1)
            step = {"input_ids": answer[-1]}
            if with_mask:
                step["attention_mask"] = extended(inputs, torch.cat(answer, 1))["attention_mask"]
    expected = answer_logits(net, inputs, handle.selections, torch.cat(answer, 1), positions)
    close(torch.stack(logits, 1), expected)


@every_family
@torch.no_grad()
def test_gaps_between_positions_are_no_borders(family):
    """Without a mask and a cache, transformers would take them for borders of packed prompts."""
    net, inputs = model(family), collate([samples(family)[1]])
    bare = {k: x for k, x in inputs.items() if k != "attention_mask"}
    positions = TINIES[family].positions[0]
    with foveate.attach(net, Random(keep=9), positions=positions):
        close(net(**bare, use_cache=False).logits, net(**inputs, use_cache=False).logits)


@every_family
def test_inputs_without_an_image_pass_through(family):
    net, inputs = model(family), collate([sample(5, seed=1), sample(9, seed=2)])
    plain, logits = generate(net, inputs), net(**inputs).logits
    with foveate.attach(net, Random(keep=9)) as handle:
        out = generate(net, inputs)
        assert torch.equal(net(**inputs).logits, logits)
    assert torch.equal(out.sequences, plain.sequences)
    assert handle.selections == []


@every_position_in_depth
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_equals_the_oracle(family, positions, side):
    net, inputs = model(family), collate(samples(family), side, labels=True)
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle, torch.no_grad():
        loss = net(**inputs).loss
    plain = {k: x for k, x in inputs.items() if k != "labels"}
    masked = positions == "original" and TINIES[family].masks
    everything = hidden(net, plain, handle.selections) if masked else None
    alone = rebuilt(net, plain, handle.selections, positions)
    losses = []
    for i, columns in enumerate(visible_columns(inputs, handle.selections)):
        logits = everything[i, columns] if masked else alone[i]
        labels = inputs["labels"][i, columns]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] >= 0])
    close(loss, torch.cat(losses).mean())


class Recorder:
    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received.append(value.clone())

    def end(self):
        self.ended = True


def test_streamer_gets_the_whole_prompt():
    net, inputs = model("llava"), collate(samples("llava")[:1])
    streamer = Recorder()
    with foveate.attach(net, Uniform(keep=9)):
        out = net.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert torch.equal(streamer.received[0], inputs["input_ids"])
    assert torch.cat([x.flatten() for x in streamer.received]).tolist() == out[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("how", ["max_length", "config", "config-object", "default", "min_length"])
def test_limits_count_the_whole_prompt(how):
    net, inputs = model("llava"), collate(samples("llava"))
    length, kwargs = inputs["input_ids"].shape[1], {"do_sample": False}
    if how == "max_length":
        kwargs["max_length"] = length + 5
    elif how == "config":
        net.generation_config.max_length = length + 5
    elif how == "config-object":
        kwargs["generation_config"] = foveate_config = type(net.generation_config)(max_length=length + 5)
    elif how == "min_length":
        net.generation_config.eos_token_id = list(range(1, 120))  # would end at once
        kwargs |= {"max_new_tokens": 7, "min_length": length + 5}
    plain = net.generate(**inputs, **kwargs)
    before = net.generation_config.to_dict()
    with foveate.attach(net, Uniform(keep=9)):
        out = net.generate(**inputs, **kwargs)
    assert out.shape == plain.shape
    assert how in ("default", "min_length") or out.shape[1] == length + 5
    assert net.generation_config.to_dict() == before
    assert how != "config-object" or foveate_config.max_length == length + 5


@pytest.mark.parametrize("call", ["positional", "inputs", "keyword"])
def test_ways_to_pass_ids(call):
    net, inputs = model("llava"), collate(samples("llava"))
    ids, rest = inputs["input_ids"], {k: x for k, x in inputs.items() if k != "input_ids"}
    options = {"max_new_tokens": 3, "do_sample": False}
    with foveate.attach(net, Uniform(keep=9)) as handle:
        expected = net.generate(**inputs, **options)
        if call == "positional":
            out = net.generate(ids, **rest, **options)
            logits = net(ids, inputs["pixel_values"], inputs["attention_mask"]).logits
        else:
            out = net.generate(**{"inputs" if call == "inputs" else "input_ids": ids}, **rest, **options)
            logits = net(**inputs).logits
        assert len(handle.selections) == 3
    assert torch.equal(out, expected)
    assert logits.shape[1] < ids.shape[1]


def test_generating_inside_a_chain_of_methods():
    net, inputs = model("llava_next"), collate(samples("llava_next"))
    chain = Chain(Uniform(keep=0.5), VisPruner(keep=Budget(4, per="crop")))
    with foveate.attach(net, chain) as handle:
        out = generate(net, inputs)
    check(net, inputs, out, handle.selections, "compact")


@every_family
def test_features_are_the_models_own(family):
    """Projected alone or together with all others, kept tokens have the embeddings of the plain model."""
    net, inputs = model(family), collate(samples(family))
    features = visual_features(net, inputs)
    reduced = foveate.reduce(net, inputs, Random(keep=9), separators="keep")
    for kind, output in reduced["mm_encoder_outputs"].items():
        spans = [s for s in reduced.selection if s.kind == kind]
        parts = features[kind].split([s.length for s in spans])
        expected = [part[span.kept] for span, part in zip(spans, parts, strict=True)]
        got = torch.cat([x.reshape(-1, x.shape[-1]) for x in output.pooler_output])
        torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-5)


@both_positions
def test_a_prompt_without_image_in_the_batch(positions):
    net, inputs = model("llava"), collate([sample(9, seed=1), sample(3, "image", 4, seed=2), sample(80, seed=3)])
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        out = generate(net, inputs)
    assert [len(row) for row in handle.selections] == [0, 1, 0]
    check(net, inputs, out, handle.selections, positions)


@every_position_in_depth
@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_other_caches(family, positions, options):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        out = generate(net, inputs, **options)
    check(net, inputs, out, handle.selections, positions)


@both_positions
def test_second_turn_of_several_answers(positions):
    net, first = model("llava"), samples("llava")
    inputs, cache = collate(first), DynamicCache()
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        one = generate(net, inputs, do_sample=True, max_new_tokens=3, num_return_sequences=2, past_key_values=cache)
        twice = [row for row in first for _ in range(2)]
        whole = collate(joined(twice, answer_of(one, inputs), [sample(3, seed=20 + i) for i in range(6)]))
        selections = [row for row in handle.selections for _ in range(2)]
        turn = {key: whole[key] for key in ("input_ids", "attention_mask")}
        two = generate(net, turn, past_key_values=cache)
    check(net, whole, two, selections, positions)


def test_pixels_in_single_precision_for_a_model_in_half():
    net, inputs = model("llava", dtype=torch.bfloat16), collate(samples("llava"))
    with foveate.attach(net, Uniform(keep=9)):
        mixed = generate(net, inputs)
        same = generate(net, cast(inputs, torch.bfloat16))
    assert torch.equal(mixed.sequences, same.sequences)


def test_flat_pixels_of_llava_next():
    net = model("llava_next")
    row = sample(3, Visual("llava_next", (64, 64)), 2, Visual("llava_next", (60, 60)), 4)
    inputs = collate([row])
    flat = {**inputs, "pixel_values": torch.cat([x[0] for x in row["pixel_values"]])}
    reduced, other = (foveate.reduce(net, x, VisPruner(keep=9)) for x in (inputs, flat))
    assert [s.kept.tolist() for s in reduced.selection] == [s.kept.tolist() for s in other.selection]
    assert torch.equal(net(**reduced).logits, net(**other).logits)


@every_family
def test_attention_implementation_does_not_change_what_is_salient(family):
    inputs = collate(samples(family))
    by_sdpa, by_eager = (
        foveate.reduce(model(family, attention), inputs, FasterVLM(keep=0.2)).selection
        for attention in ("sdpa", "eager")
    )
    assert [s.kept.tolist() for s in by_sdpa] == [s.kept.tolist() for s in by_eager]


@pytest.mark.parametrize("new_image", [False, True], ids=["text", "image"])
def test_own_position_ids_in_the_second_turn(new_image):
    net, first = model("llava"), samples("llava")
    inputs, cache = collate(first), DynamicCache()
    with foveate.attach(net, Uniform(keep=9), positions="original"):
        one = generate(net, inputs, max_new_tokens=4, past_key_values=cache)
        second = [sample(2, *(["image"] if new_image else []), 4, seed=20 + i) for i in range(3)]
        whole = collate(joined(first, answer_of(one, inputs), second))
        turn = {k: x for k, x in collate(second).items() if k.startswith("pixel")}
        turn |= {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"]}
        positions = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        # The last answered token is not in the cache yet.
        start = one.sequences.shape[1] - 1
        new = {**turn, "input_ids": turn["input_ids"][:, start:]}
        with torch.no_grad():
            given = net(**new, position_ids=positions[:, start:], past_key_values=cache).logits[:, -1]
    # The same dialogue once more, with positions left to the library.
    with foveate.attach(net, Uniform(keep=9), positions="original"), torch.no_grad():
        cache = generate(net, inputs, max_new_tokens=4).past_key_values
        worked_out = net(**new, past_key_values=cache).logits[:, -1]
    close(given, worked_out)
    with foveate.attach(net, Uniform(keep=9), positions="compact"), torch.no_grad():
        cache = generate(net, inputs, max_new_tokens=4).past_key_values
        with pytest.raises(foveate.FoveateError, match="leave them out"):
            net(**new, position_ids=positions[:, start:], past_key_values=cache)
