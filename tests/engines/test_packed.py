"""Packed rows: the second prompt of a row gets the logits that it gets alone."""

from __future__ import annotations

import pytest
import torch
from oracle import every_position

import foveate
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.families import family_of
from tiny import VISUALS, collate, model, sample

STOCK = {
    "gemma3": "stock joins the images of packed prompts",
    "lfm2_vl": "convolutions run across the borders",
    "qwen3_5": "recurrent layers run across the borders",
}
"""Families whose packed prompts stock transformers gets wrong itself, and why."""


def packed_row(family):
    net = model(family)
    a, b, _ = VISUALS[family]
    two = [sample(4, a, 5, seed=1), sample(2, b, 6, seed=2)]
    alone = [collate([one]) for one in two]
    row = collate([{key: two[0].get(key, []) + two[1].get(key, []) for key in dict.fromkeys([*two[0], *two[1]])}])
    del row["attention_mask"]
    positions = torch.cat([torch.arange(x["input_ids"].shape[1]) for x in alone])[None]
    if family_of(net).keeps_positions:
        axes = torch.cat([family_of(net).positions(net, x) for x in alone], dim=-1)
        positions = torch.cat([positions[None], axes])
    return net, alone[1], {**row, "position_ids": positions}


@every_position
@torch.no_grad()
def test_a_packed_prompt_gets_the_logits_that_it_gets_alone(family, positions):
    if family in STOCK:
        pytest.skip(STOCK[family])
    net, alone, row = packed_row(family)
    with foveate.attach(net, "uniform", keep=0.4, positions=positions):
        if family == "paligemma" and positions == "original":
            with pytest.raises(UnsupportedModelError, match="compact"):
                net(**row, use_cache=False)
            return
        want = net(**alone, use_cache=False).logits
        got = net(**row, use_cache=False).logits
    assert got.shape[1] < row["input_ids"].shape[1]
    assert torch.allclose(got[:, -want.shape[1] :], want, atol=1e-4)


@pytest.mark.parametrize(("method", "config"), [("fastv", {"keep": 5, "layer": 1}), ("cdpruner", {"keep": 5})])
def test_methods_that_read_a_whole_row_refuse_packed_prompts(method, config):
    net, _, row = packed_row("llava")
    with foveate.attach(net, method, **config), pytest.raises(InputError, match="packs several prompts"):
        net(**row, use_cache=False)


@torch.no_grad()
def test_shift_labels_have_the_loss_of_labels():
    for family in ("llava", "internvl", "qwen2_5_vl"):
        net = model(family)
        batch = collate([sample(4, VISUALS[family][0], 5, seed=1)], labels=True)
        labels = batch.pop("labels")
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        with foveate.attach(net, "uniform", keep=0.4):
            want = net(**batch, labels=labels)
            got = net(**batch, labels=labels, shift_labels=shifted)
        assert torch.allclose(got.loss, want.loss, atol=1e-5)


@torch.no_grad()
def test_logits_to_keep_names_columns_of_the_full_prompt():
    for family in ("llava", "internvl", "qwen2_5_vl"):
        net = model(family)
        batch = collate([sample(4, VISUALS[family][0], 5, seed=1)])
        last = batch["input_ids"].shape[1] - 1
        with foveate.attach(net, "uniform", keep=0.4):
            want = net(**batch).logits
            got = net(**batch, logits_to_keep=torch.tensor([1, last - 2, last])).logits
        assert torch.allclose(got, want[:, [1, -3, -1]], atol=1e-5)


@torch.no_grad()
def test_the_borders_of_packed_prompts_move_with_their_columns():
    net, alone, row = packed_row("llava")
    second, length = alone["input_ids"].shape[1], row["input_ids"].shape[1]
    borders = torch.tensor([0, length - second, length], dtype=torch.int32)
    packed = {**row, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 99, "max_length_k": 99}
    out = foveate.reduce(net, packed, "uniform", keep=0.4, positions="compact")
    width = foveate.reduce(net, alone, "uniform", keep=0.4)["input_ids"].shape[1]
    whole = out["input_ids"].shape[1]
    assert out["cu_seq_lens_q"].tolist() == [0, whole - width, whole]
    assert out["max_length_k"] == max(width, whole - width)


@torch.no_grad()
def test_position_ids_that_generate_throws_away_are_refused(monkeypatch):
    net = model("llava")
    batch = collate([sample(4, VISUALS["llava"][0], 5, seed=1)])
    prepare = net.prepare_inputs_for_generation

    def without(*args, **kwargs):
        return {**prepare(*args, **kwargs), "position_ids": None}

    monkeypatch.setattr(net, "prepare_inputs_for_generation", without)
    refused = pytest.raises(UnsupportedModelError, match="throws position_ids away")
    with foveate.attach(net, "uniform", keep=0.4, positions="original"), refused:
        net.generate(**batch, max_new_tokens=2)
