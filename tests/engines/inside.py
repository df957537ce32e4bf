"""What the tests of methods inside the LLM share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import foveate
from foveate.core.in_llm import InLlmReducer
from foveate.core.selection import Selection, SpanSelection
from foveate.registry import get_method
from tiny import (
    IN_LLM,
    IN_LLM_FAMILIES,
    TINIES,
    in_depth,
    method_id,
)

TOKENS = 9
DEPTH = 4
methods = pytest.mark.parametrize("inside", IN_LLM, ids=method_id)
each_method = pytest.mark.parametrize(
    "inside",
    [
        pytest.param(entry, marks=pytest.mark.slow if entry[0] in [name for name, _ in IN_LLM[:i]] else [])
        for i, entry in enumerate(IN_LLM)
    ],
    ids=method_id,
)
"""Further parameters of the same method only among the slow tests."""
every_family = pytest.mark.parametrize("family", IN_LLM_FAMILIES)
every_family_in_depth = pytest.mark.parametrize("family", [pytest.param(f, marks=in_depth(f)) for f in IN_LLM_FAMILIES])
one_family_in_depth = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "llava" else pytest.mark.slow) for f in IN_LLM_FAMILIES]
)
"""For what the layers of the LLM decide: the core families have the same, and oracles compare what differs."""


def make(inside):
    name, config = inside
    return get_method(name)(**config)


def positions_of(reducer, family):
    return "original" if foveate.families.all_families()[family].keeps_positions else reducer.positions


def generate(net, inputs, **kwargs):
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return net.generate(**inputs, **{**options, **kwargs})


def answer_of(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def answered(family, inputs, answer):
    """Return the inputs of prompts with their answers ``[B, T]`` behind them."""
    whole = {k: v for k, v in inputs.items() if not k.endswith("type_ids")}
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            further = answer if key == "input_ids" else torch.full_like(answer, key == "attention_mask")
            if key == "token_type_ids":
                further = torch.full_like(answer, TINIES[family].answer_type)
            whole[key] = torch.cat([inputs[key], further], dim=1)
    return whole


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
    merges = "embeddings"

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
