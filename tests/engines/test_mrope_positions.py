"""Positions along three axes: prompts, decoding and later turns on compacted caches."""

import pytest
import torch
from oracle import answer_logits, hidden, visible_columns
from transformers import AutoConfig, AutoModelForImageTextToText

import foveate
from foveate.core.errors import InputError
from foveate.core.selection import SpanSelection
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.engines.transformers.caches import cache_of
from foveate.families import family_of
from foveate.methods import Random, Uniform, VisPruner
from tiny import IMAGE, TINIES, VIDEO, Visual, collate, model, sample, samples
from tiny_families.mrope import STAMP, films

NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl"]
OF_VIDEOS = NAMES[:5]
QWEN = NAMES[:4]
every_name = pytest.mark.parametrize("name", NAMES)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OF_VIDEOS)
def test_videos_equal_the_oracle(name):
    net, inputs = model(name), collate(films(name))
    with foveate.attach(net, VisPruner(keep=8)) as handle:
        out = net.generate(**inputs, **GREEDY)
    assert [len(s) for row in handle.selections for s in row] == [8, 8, 8]
    assert all(s.kind == "video" for row in handle.selections for s in row)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    close(torch.stack(out.logits, 1), answer_logits(net, inputs, handle.selections, answer, "original"))
    # Nothing but visual tokens went, timestamps between frames included.
    ids = inputs["input_ids"]
    for i, columns in enumerate(visible_columns(inputs, handle.selections)):
        gone = sorted(set(range(ids.shape[1])) - set(columns))
        assert {int(x) for x in ids[i, gone]} <= {0, IMAGE, VIDEO}
        assert int((ids[i, columns] == STAMP).sum()) == int((ids[i] == STAMP).sum())
    # All kept, the library's positions and the model's own agree.
    whole = foveate.reduce(net, inputs, Random(keep=[10_000, 10_000]))
    assert whole.compaction is None
    with torch.no_grad():
        everything = [[SpanSelection(s.length, torch.arange(s.length)) for s in r] for r in handle.selections]
        close(net(**inputs).logits[:, -1], hidden(net, inputs, everything)[:, -1])


def test_a_clock_of_the_video_moves_its_frames():
    net, film = model("qwen2_5_vl"), Visual("qwen2_5_vl", ("video", 3, 2, 4))
    inputs = collate([sample(3, film, 4)])
    reduced = foveate.reduce(net, inputs, Uniform(keep=6))
    times = reduced["position_ids"][0, 0]
    assert times[4:-5].unique().tolist() == [4, 7, 10]  # 4 positions per second, 0.75 seconds per step
    plain = foveate.reduce(net, {k: x for k, x in inputs.items() if k != "second_per_grid_ts"}, Uniform(keep=6))
    assert plain["position_ids"][0, 0, 4:-5].unique().tolist() == [4, 8, 12]
    assert "second_per_grid_ts" not in reduced


@every_name
def test_own_position_ids(name):
    net, inputs = model(name), collate(samples(name))
    full = TINIES[name].position_ids(net, inputs)
    counted = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with foveate.attach(net, Uniform(keep=9)), torch.no_grad():
        expected = net(**inputs).logits[:, -1]
        assert torch.equal(net(**inputs, position_ids=full).logits[:, -1], expected)
        assert torch.equal(net(**inputs, position_ids=torch.cat([counted[None], full])).logits[:, -1], expected)
        flat = net(**inputs, position_ids=counted).logits[:, -1]
    assert (flat - expected).abs().max() > 1e-3
    kept = foveate.reduce(net, {**inputs, "position_ids": counted}, Uniform(keep=9))
    close(net(**kept).logits[:, -1], flat)


@every_name
@pytest.mark.parametrize("use_cache", [True, False])
def test_one_prompt_without_a_mask(name, use_cache):
    """Gaps between positions are no borders of packed prompts."""
    net, rows = model(name), samples(name)[:1]
    inputs = collate(rows)
    bare = {k: x for k, x in inputs.items() if k != "attention_mask"}
    with foveate.attach(net, Uniform(keep=9)), torch.no_grad():
        expected = net(**inputs).logits
        close(net(**bare, use_cache=use_cache).logits, expected)
        first = net.generate(**bare, **GREEDY, use_cache=use_cache)
        padded = net.generate(**collate(samples(name)), **GREEDY)
    close(torch.stack(first.logits, 1)[0], torch.stack(padded.logits, 1)[0])


@every_name
def test_the_models_own_state_stays_its_own(name):
    """`rope_deltas` is written by runs of the plain model alone."""
    net, inputs = model(name), collate(samples(name))
    marker = net.model.rope_deltas = torch.full((3, 1), 7)
    with foveate.attach(net, Uniform(keep=9)), torch.no_grad():
        out = net.generate(**inputs, **GREEDY)
        step = net(**inputs)
        net(input_ids=out.sequences[:, -1:], **{CACHE: cache_of(step)})
        foveate.reduce(net, inputs, VisPruner(keep=3))
        assert net.model.rope_deltas is marker
        net.generate(**inputs, **GREEDY)
    assert net.model.rope_deltas is marker
    net.generate(**inputs, **GREEDY)
    assert net.model.rope_deltas is not marker


def turn_of(name, rows, first_columns, only_new):
    whole = collate(rows)
    turn = {k: x for k, x in whole.items() if k != "mm_token_type_ids"}
    if only_new:
        turn["input_ids"] = turn["input_ids"][:, first_columns - 1 :]
    return whole, turn


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("only_new", [False, True], ids=["full-ids", "new-ids"])
@pytest.mark.parametrize("stale", [False, True])
def test_first_image_in_the_second_turn(name, only_new, stale):
    net, picture = model(name), Visual(name, ("image", 1, 4, 3))
    first, second = [sample(7), sample(5, seed=1)], [sample(2, picture, 3, seed=3), sample(1, picture, 4, seed=4)]
    if stale:  # a conversation before, of the plain model
        net.generate(**collate(samples(name)[:2]), **GREEDY)
    cache = TINIES[name].cache(net)
    with foveate.attach(net, Uniform(keep=5)) as handle:
        one = net.generate(**collate(first), **GREEDY, **{CACHE: cache})
        answers = one.sequences[:, collate(first)["input_ids"].shape[1] :].tolist()
        rows = [
            {**after, "ids": before["ids"] + answer + after["ids"]}
            for before, answer, after in zip(first, answers, second, strict=True)
        ]
        whole, turn = turn_of(name, rows, one.sequences.shape[1], only_new)
        two = net.generate(**turn, **GREEDY, **{CACHE: cache})
    answer = two.sequences[:, turn["input_ids"].shape[1] :]
    close(torch.stack(two.logits, 1), answer_logits(net, whole, handle.selections, answer, "original"))


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_second_image_behind_one_that_stayed_whole(name, by_hand):
    net, picture = model(name), Visual(name, ("image", 1, 4, 3))
    first, second = sample(2, Visual(name, ("image", 1, 2, 5)), 4, seed=1), sample(2, picture, 3, seed=3)
    cache = TINIES[name].cache(net)
    with foveate.attach(net, Uniform(keep=[11, 5])) as handle, torch.no_grad():
        inputs = collate([first])
        if by_hand:
            net(**inputs, **{CACHE: cache})
            answer = []
        else:
            out = net.generate(**inputs, **GREEDY, **{CACHE: cache})
            answer = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        (whole_one,) = handle.selections[0]
        assert whole_one.is_identity
    with foveate.attach(net, Uniform(keep=5)) as handle, torch.no_grad():
        row = {**second, "ids": first["ids"] + answer + second["ids"]}
        turn = collate([row])
        new = {k: x for k, x in turn.items() if k != "mm_token_type_ids"}
        if by_hand:
            new["input_ids"] = turn["input_ids"][:, len(first["ids"]) :]
            logits = net(**new, **{CACHE: cache}).logits[:, -1:]
            token = logits[:, -1].argmax(-1, keepdim=True)
        else:
            two = net.generate(**new, **GREEDY, **{CACHE: cache})
            token = two.sequences[:, turn["input_ids"].shape[1] :]
            logits = torch.stack(two.logits, 1)
        both = [[whole_one, *handle.selections[0]]]
    joined = {key: first.get(key, []) + second.get(key, []) for key in {**first, **second}}
    whole = collate([{**joined, "ids": row["ids"]}])
    close(logits, answer_logits(net, whole, both, token, "original"))


@pytest.mark.parametrize("name", QWEN)
def test_second_turn_of_several_answers(name):
    net, first = model(name), samples(name)
    inputs, cache = collate(first), TINIES[name].cache(net)
    with foveate.attach(net, Uniform(keep=9)) as handle:
        one = net.generate(**inputs, **{**GREEDY, "do_sample": True}, num_return_sequences=2, **{CACHE: cache})
        twice = [row for row in first for _ in range(2)]
        answers = one.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        more = [sample(3, seed=20 + i)["ids"] for i in range(6)]
        rows = [{**row, "ids": row["ids"] + a + m} for row, a, m in zip(twice, answers, more, strict=True)]
        selections = [row for row in handle.selections for _ in range(2)]
        whole = collate(rows)
        two = net.generate(
            input_ids=whole["input_ids"], attention_mask=whole["attention_mask"], **GREEDY, **{CACHE: cache}
        )
    answer = two.sequences[:, whole["input_ids"].shape[1] :]
    close(torch.stack(two.logits, 1), answer_logits(net, whole, selections, answer, "original"))


@pytest.mark.parametrize("name", QWEN)
def test_conversations_in_turns(name):
    """Each cache goes on at its own position, whichever ran last."""
    net = model(name)
    prompts = [collate([row]) for row in samples(name)]
    alone, mixed = [], []
    with foveate.attach(net, Uniform(keep=9)), torch.no_grad():
        for prompt in prompts:
            out = net(**prompt)
            token = out.logits[:, -1:].argmax(-1)
            alone.append(net(input_ids=token, **{CACHE: cache_of(out)}).logits)
        outs = [net(**prompt) for prompt in prompts]
        for out in reversed(outs):
            token = out.logits[:, -1:].argmax(-1)
            mixed.insert(0, net(input_ids=token, **{CACHE: cache_of(out)}).logits)
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTING = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
SHARED = {
    "qwen3_vl_moe": ("qwen3_vl", {"num_experts": 4, **EXPERTS}),
    "qwen3_5_moe": ("qwen3_5", {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS}),
    "glm4v_moe": ("glm4v", {**ROUTING, **EXPERTS}),
    "glm46v": ("glm4v", {}),
}


@pytest.mark.parametrize("model_type", SHARED)
def test_relatives_that_share_the_classes(model_type, monkeypatch):
    base, changes = SHARED[model_type]

    class Relative(type(TINIES[base])):
        def build(self):
            values = TINIES[base].original.config.to_dict()
            del values["model_type"]
            for part in ("vision_config", "text_config"):
                del values[part]["model_type"]
            values["text_config"] |= changes
            values["text_config"]["rope_parameters"]["partial_rotary_factor"] = 1.0
            return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **values))

    monkeypatch.setitem(TINIES, model_type, Relative())
    net, inputs = model(model_type), collate(samples(base))
    assert family_of(net).name == base
    with foveate.attach(net, VisPruner(keep=9)) as handle:
        out = net.generate(**inputs, **GREEDY)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    close(torch.stack(out.logits, 1), answer_logits(net, inputs, handle.selections, answer, "original"))


def test_compact_positions_are_refused():
    net, inputs = model("qwen2_vl"), collate(samples("qwen2_vl"))
    with pytest.raises(InputError, match="several axes: use positions='original'"):
        foveate.reduce(net, inputs, Uniform(keep=9), positions="compact")


@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_a_first_image_is_numbered_behind_text_whatever_ran_in_between(name):
    """The model remembers where the batch that ran last goes on, which says nothing about one of another size."""
    net, found = model(name), []
    text, row = sample(7), sample(2, Visual(name, ("image", 1, 4, 3)), 3, seed=3)
    for between in (False, True):
        cache = TINIES[name].cache(net)
        net(**collate([text]), **{CACHE: cache})
        if between:
            net(**collate(samples(name)[:2]))
        with foveate.attach(net, Uniform(keep=5)):
            turn = collate([{**row, "ids": text["ids"] + row["ids"]}])
            turn.pop("mm_token_type_ids", None)
            found.append(net(**{**turn, "input_ids": turn["input_ids"][:, 7:]}, **{CACHE: cache}).logits)
    close(found[0], found[1])
