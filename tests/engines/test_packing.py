"""Packed rows: each prompt of one gets what it gets alone, or the row is refused."""

import pytest
import torch
import transformers

import foveate
from callers import packed
from foveate.core.errors import InputError
from foveate.engines.transformers.packing import packed_prompts
from foveate.methods import FastV
from tiny import FAMILIES, TINIES, collate, deep_model, in_depth, make, model, samples

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
UNPACKED = {"gemma3", "lfm2_vl", "qwen3_5"} | ({"paligemma"} if VERSION < (5, 24) else set())
"""Families of which the stock model lets packed prompts see each other."""
families = [pytest.param(name, marks=in_depth(name)) for name in FAMILIES]
METHODS = [("vispruner", {}), ("visionzip", {}), ("uniform", {}), ("divprune", {})]


def ends(inputs, reduced):
    """Return the last column of each prompt in compact rows."""
    number = packed_prompts(inputs)
    own = reduced.compaction.apply(number, -1)[0]
    return [int((own == i).nonzero().max()) for i in range(int(number.max()) + 1)]


@pytest.mark.parametrize("family", families)
def test_what_stock_models_do(family):
    net = model(family)
    inputs, alone = packed(family, net)
    logits = net(**inputs, use_cache=False).logits[:, -1]
    apart = torch.allclose(logits, net(**alone[1]).logits[:, -1], atol=1e-4)
    assert apart == (family not in UNPACKED) or (family == "gemma3" and VERSION < (5, 24))


@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("entry", METHODS, ids=lambda e: e[0])
@pytest.mark.parametrize("positions", [None, "original", "compact"])
@torch.no_grad()
def test_each_prompt_gets_what_it_gets_alone(family, entry, positions):
    net = model(family)
    inputs, alone = packed(family, net)
    reducer = make(entry, 0.3, family)
    fixed = foveate.families.family_of(net)
    if positions == "compact" and fixed.keeps_positions:
        pytest.skip("M-RoPE keeps the original positions")
    call = lambda x: foveate.reduce(net, x, reducer, positions=positions)  # noqa: E731
    if family in UNPACKED:
        with pytest.raises(InputError, match="see each other"):
            call(inputs)
        return
    if fixed.two_way and positions == "original":
        with pytest.raises(InputError, match="positions='compact'"):
            call(inputs)
        return
    reduced = call(inputs)
    logits = net(**reduced, use_cache=False).logits[0]
    for end, one in zip(ends(inputs, reduced), alone, strict=True):
        torch.testing.assert_close(logits[end], net(**call(one)).logits[0, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_bounds_and_labels_follow(family):
    net = model(family)
    inputs, alone = packed(family, net)
    lengths = [one["input_ids"].shape[1] for one in alone]
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    labels = torch.where(inputs["input_ids"] < 110, inputs["input_ids"], -100)
    labels[0, [0, lengths[0]]] = -100
    extra = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    reduced = foveate.reduce(net, {**inputs, **extra, "labels": labels}, "random", keep=0.3)
    found = [end + 1 for end in ends(inputs, reduced)]
    assert reduced["cu_seq_lens_q"].tolist() == reduced["cu_seq_lens_k"].tolist() == [0, *found]
    assert reduced["cu_seq_lens_q"].dtype == torch.int32
    assert reduced["max_length_q"] == reduced["max_length_k"] == max(found[0], found[1] - found[0])
    assert "attention_mask" not in reduced
    kept = labels[0][reduced.compaction.columns[0]]
    assert torch.equal(reduced["labels"][0], kept)


@torch.no_grad()
def test_rows_that_become_of_different_lengths():
    net = model("llava")
    first, alone = packed("llava", net)
    row = samples("llava")[1]
    second = {key: value for key, value in collate([row]).items() if key != "attention_mask"}
    size = first["input_ids"].shape[1] - second["input_ids"].shape[1]
    ids = torch.cat([second["input_ids"], torch.full((1, size), 5)], dim=1)
    positions = torch.cat([torch.arange(ids.shape[1] - size), torch.arange(size)])[None]
    inputs = {
        "input_ids": torch.cat([first["input_ids"], ids]),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
        "position_ids": torch.cat([first["position_ids"], positions]),
    }
    ours = foveate.reduce(net, inputs, "uniform", keep=9)
    logits, own = net(**ours, use_cache=False).logits, ours.compaction.apply(packed_prompts(inputs), -1)
    for i, number, one in ((0, 0, alone[0]), (0, 1, alone[1]), (1, 0, collate([row]))):
        end = int((own[i] == number).nonzero().max())
        expected = net(**foveate.reduce(net, one, "uniform", keep=9)).logits[0, -1]
        torch.testing.assert_close(logits[i, end], expected, atol=1e-4, rtol=0)


def test_inside_the_llm_they_are_refused():
    net = deep_model("llava")
    inputs, _ = packed("llava", net)
    for reducer in (FastV(keep=9, layer=1), foveate.Chain(foveate.VisPruner(keep=16), FastV(keep=9, layer=1))):
        with foveate.attach(net, reducer), pytest.raises(InputError, match="packed row"):
            net(**inputs, use_cache=False)


def test_methods_that_read_the_question_refuse_them():
    net = model("llava")
    inputs, _ = packed("llava", net)
    for name in ("cdpruner", "mmtok", "fsr", "gaze_query"):
        with pytest.raises(InputError, match=f"{name} reads the question"):
            foveate.reduce(net, inputs, name, keep=9)


def test_flash_attention_is_refused_where_it_needs_a_mask():
    net = model("llava")
    inputs, _ = packed("llava", net)
    net.config.text_config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(InputError, match="positions='compact'"):
        foveate.reduce(net, inputs, "random", keep=9, positions="original")


def test_single_prompts_are_not_taken_for_packed_ones():
    net = model("llava")
    _, (one, _) = packed("llava", net)
    assert packed_prompts({**one, "position_ids": TINIES["llava"].position_ids(net, one)}) is None
    plain = {key: value for key, value in one.items() if key != "attention_mask"}
    assert packed_prompts({**plain, "position_ids": torch.arange(one["input_ids"].shape[1])[None]}) is None
    assert packed_prompts(plain) is None
