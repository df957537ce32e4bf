"""Packed rows: the second prompt of a row gets the logits that it gets alone."""

from __future__ import annotations

import pytest
import torch
from oracle import every_position

import foveate
from foveate.core.errors import InputError
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
        want = net(**alone, use_cache=False).logits
        got = net(**row, use_cache=False).logits
    assert got.shape[1] < row["input_ids"].shape[1]
    assert torch.allclose(got[:, -want.shape[1] :], want, atol=1e-4)


@pytest.mark.parametrize(("method", "config"), [("fastv", {"keep": 5, "layer": 1}), ("cdpruner", {"keep": 5})])
def test_methods_that_read_a_whole_row_refuse_packed_prompts(method, config):
    net, _, row = packed_row("llava")
    with foveate.attach(net, method, **config), pytest.raises(InputError, match="packs several prompts"):
        net(**row, use_cache=False)
