"""Decoding goes on as if the dropped tokens were hidden: by hand, and in later turns on the same cache."""

import pytest
import torch
from oracle import (
    answer_logits,
    answer_of,
    both_positions,
    check,
    close,
    every_family,
    every_position_in_depth,
    extended,
    generate,
)
from transformers import DynamicCache

import foveate
from foveate.core.errors import InputError
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.engines.transformers.caches import cache_of
from foveate.methods import FastV, Random, Uniform
from tiny import (
    TINIES,
    VISUALS,
    collate,
    deep_model,
    model,
    sample,
    samples,
)


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
        one = generate(net, inputs, max_new_tokens=4, **{CACHE: cache})
        before = handle.selections
        whole = collate(joined(first, answer_of(one, inputs), second))
        turn = {k: x for k, x in collate(second).items() if not k.endswith(("_ids", "attention_mask")) or "pixel" in k}
        turn |= {k: whole[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in whole}
        assert torch.equal(whole["input_ids"][:, : one.sequences.shape[1]], one.sequences)
        if only_new:
            turn["input_ids"] = turn["input_ids"][:, one.sequences.shape[1] - 1 :]
        two = generate(net, turn, **{CACHE: cache})
        after = handle.selections if new_image else [[] for _ in before]
        # A third turn, of text.
        answer = answer_of(two, turn)
        third = [sample(3, seed=40 + i) for i in range(3)]
        longest = collate(joined(joined(first, answer_of(one, inputs), second), answer, third))
        three = generate(net, {k: longest[k] for k in ("input_ids", "attention_mask")}, **{CACHE: cache})
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
        one = generate(net, inputs, max_new_tokens=4, **{CACHE: cache})
        whole = collate(joined(first, answer_of(one, inputs), second))
        turn = dict(whole)
        if only_new:
            turn["input_ids"] = turn["input_ids"][:, one.sequences.shape[1] - 1 :]
        two = generate(net, turn, **{CACHE: cache})
    answer = answer_of(two, turn)
    close(torch.stack(two.logits, 1), answer_logits(net, whole, handle.selections, answer, positions))


@both_positions
def test_second_turn_of_several_answers(positions):
    net, first = model("llava"), samples("llava")
    inputs, cache = collate(first), DynamicCache()
    with foveate.attach(net, Uniform(keep=9), positions=positions) as handle:
        one = generate(net, inputs, do_sample=True, max_new_tokens=3, num_return_sequences=2, **{CACHE: cache})
        twice = [row for row in first for _ in range(2)]
        whole = collate(joined(twice, answer_of(one, inputs), [sample(3, seed=20 + i) for i in range(6)]))
        selections = [row for row in handle.selections for _ in range(2)]
        turn = {key: whole[key] for key in ("input_ids", "attention_mask")}
        two = generate(net, turn, **{CACHE: cache})
    check(net, whole, two, selections, positions)


@pytest.mark.parametrize("new_image", [False, True], ids=["text", "image"])
def test_own_position_ids_in_the_second_turn(new_image):
    net, first = model("llava"), samples("llava")
    inputs, cache = collate(first), DynamicCache()
    with foveate.attach(net, Uniform(keep=9), positions="original"):
        one = generate(net, inputs, max_new_tokens=4, **{CACHE: cache})
        second = [sample(2, *(["image"] if new_image else []), 4, seed=20 + i) for i in range(3)]
        whole = collate(joined(first, answer_of(one, inputs), second))
        turn = {k: x for k, x in collate(second).items() if k.startswith("pixel")}
        turn |= {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"]}
        positions = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        # The last answered token is not in the cache yet.
        start = one.sequences.shape[1] - 1
        new = {**turn, "input_ids": turn["input_ids"][:, start:]}
        with torch.no_grad():
            given = net(**new, position_ids=positions[:, start:], **{CACHE: cache}).logits[:, -1]
    # The same dialogue once more, with positions left to the library.
    with foveate.attach(net, Uniform(keep=9), positions="original"), torch.no_grad():
        cache = cache_of(generate(net, inputs, max_new_tokens=4))
        worked_out = net(**new, **{CACHE: cache}).logits[:, -1]
    close(given, worked_out)
    with foveate.attach(net, Uniform(keep=9), positions="compact"), torch.no_grad():
        cache = cache_of(generate(net, inputs, max_new_tokens=4))
        with pytest.raises(foveate.FoveateError, match="leave them out"):
            net(**new, position_ids=positions[:, start:], **{CACHE: cache})


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
            out = net(**step, **{CACHE: cache}, use_cache=True)
            cache = cache_of(out)
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


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("positions", [None, "original"])
@pytest.mark.parametrize("cut", ["reset", "turn", "answer"])
def test_caches_that_were_emptied_or_cropped(family, positions, cut):
    net, cache = model(family), DynamicCache()
    inputs = collate([sample(4, VISUALS[family][0], 9)])
    texts = [collate([sample(7, seed=60 + i)])["input_ids"] for i in range(2)]

    def turn(before, text):
        ids = torch.cat([before, text], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with foveate.attach(net, Random(keep=9), positions=positions):
        one = generate(net, inputs, max_new_tokens=4, **{CACHE: cache})
        held = cache.get_seq_length()
        first = generate(net, turn(one.sequences, texts[0]), **{CACHE: cache})
        if cut == "reset":
            cache.reset()
            again = generate(net, turn(texts[1], texts[0]), **{CACHE: cache})
            expected = generate(net, turn(texts[1], texts[0]))
        elif cut == "turn":  # the same question once more, then another
            for text in texts:
                cache.crop(-(cache.get_seq_length() - held))
                again = generate(net, turn(one.sequences, text), **{CACHE: cache})
                fresh = DynamicCache()
                other = generate(net, inputs, max_new_tokens=4, **{CACHE: fresh})
                expected = generate(net, turn(other.sequences, text), **{CACHE: fresh})
                close(torch.stack(again.logits), torch.stack(expected.logits))
        else:  # the answer once more, from within the text of the prompt on
            cache.crop(-(cache.get_seq_length() - held + 3 + 5))
            again = generate(net, {k: inputs[k] for k in ("input_ids", "attention_mask")}, **{CACHE: cache})
            expected = generate(net, inputs)
        close(torch.stack(again.logits), torch.stack(expected.logits))
        assert first.sequences.shape[0] == 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_cache_cropped_by_the_last_token_of_the_prompt(family):
    net, cache, inputs = model(family), DynamicCache(), collate([sample(4, VISUALS[family][0], 9)])
    with foveate.attach(net, Random(keep=9)):
        expected = generate(net, inputs)
        generate(net, inputs, max_new_tokens=1, **{CACHE: cache})
        cache.crop(-1)
        again = generate(net, {k: inputs[k] for k in ("input_ids", "attention_mask")}, **{CACHE: cache})
    close(torch.stack(again.logits), torch.stack(expected.logits))


def test_a_cache_cropped_into_an_image_is_refused():
    net, cache, inputs = model("llava"), DynamicCache(), collate([sample(4, "image", 9), sample(9, "image", 2)])
    ids = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with foveate.attach(net, Random(keep=9)):
        generate(net, inputs, max_new_tokens=2, **{CACHE: cache})
        cache.crop(-8)
        with pytest.raises(InputError, match="cropped to where an image is"):
            generate(net, ids, **{CACHE: cache})
    net = deep_model("llava")
    with foveate.attach(net, FastV(keep=9, layer=1)):
        cache = DynamicCache()
        generate(net, inputs, max_new_tokens=2, **{CACHE: cache})
        cache.crop(-8)
        with pytest.raises(InputError, match="cropped to where an image is"):
            net(input_ids=ids["input_ids"][:, -1:], **{CACHE: cache})


@both_positions
def test_an_image_that_stays_whole_behind_one_that_was_reduced(positions):
    net, cache, first, second = model("llava"), DynamicCache(), [sample(4, "image", 9)], [sample(2, "image", 4, seed=5)]
    inputs = collate(first)
    with foveate.attach(net, Random(keep=9), positions=positions) as handle:
        one = generate(net, inputs, max_new_tokens=4, **{CACHE: cache})
        (before,) = handle.selections
    whole = collate(joined(first, answer_of(one, inputs), second))
    turn = {**whole, "pixel_values": collate(second)["pixel_values"]}
    with foveate.attach(net, Uniform(keep=1000), positions=positions) as handle:
        two = generate(net, turn, **{CACHE: cache})
        (after,) = handle.selections
    assert after[0].is_identity
    expected = answer_logits(net, whole, [before + after], answer_of(two, turn), positions)
    close(torch.stack(two.logits, 1), expected)


def test_a_turn_goes_on_alike_when_the_one_before_returned_ids_alone():
    net, inputs, found = model("llava"), collate(samples("llava")), []
    rest = torch.arange(15).reshape(3, 5) + 20
    for full in (True, False):
        cache = DynamicCache()
        with foveate.attach(net, Uniform(keep=9)):
            one = net.generate(
                **inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=full, **{CACHE: cache}
            )
            turn = {"input_ids": torch.cat([one.sequences if full else one, rest], dim=1)}
            turn["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 9), value=1)
            found.append(torch.stack(generate(net, turn, **{CACHE: cache}).logits))
    close(found[0], found[1])


@torch.no_grad()
def test_ids_without_a_mask_that_are_as_long_as_the_cache_are_new():
    net, inputs = model("llava"), collate([sample(4, "image", 9)])
    new = collate([sample(4, "image", 9, seed=5)])
    masked, bare = ({**x, "attention_mask": mask} for x, mask in ((new, torch.ones(1, 154)), (new, None)))
    found = []
    for turn in (masked, bare):
        with foveate.attach(net, Uniform(keep=9)):
            cache = cache_of(net(**inputs, use_cache=True))
            found.append(net(**turn, **{CACHE: cache}).logits)
    assert new["input_ids"].shape[1] == inputs["input_ids"].shape[1] == 77
    close(found[0], found[1])


@torch.no_grad()
def test_one_row_of_own_position_ids_stands_for_all_prompts():
    net, inputs = model("llava"), collate([sample(4, "image", 9), sample(4, "image", 9, seed=1)])
    new = {"input_ids": torch.cat([collate([sample(5, seed=i)])["input_ids"] for i in (2, 3)])}
    new["attention_mask"] = torch.ones(2, 82, dtype=torch.long)
    found = []
    for rows in (1, 2):
        with foveate.attach(net, Uniform(keep=9), positions="original"):
            cache = cache_of(net(**inputs, use_cache=True))
            own = torch.arange(77, 82).expand(rows, -1)
            found.append(net(**new, position_ids=own, **{CACHE: cache}).logits)
    close(found[0], found[1])
