"""A bias on attention to kept tokens: equal to the plain model with a mask of numbers, however the model is run."""

import math

import inside
import pytest
import torch
from layered import layered_answer
from oracle import answer_of, close, embeddings, every_family_in_depth, generate
from torch.nn.functional import normalize, pad

import foveate
from foveate import Chain
from foveate.families import family_of
from foveate.methods import FastV, PyramidDrop, Random, VisPruner
from tiny import TINIES, collate, deep_model, model, samples

STRENGTH = 0.7


def planes(net, inputs, stages, strength=STRENGTH):
    """Return by layer the bias ``[B, L]`` of the columns of full prompts, worked out token by token.

    `stages` says what is left of each span in front of which layer. What is dropped before the LLM counts with its crop,
    what is dropped inside it with its image.
    """
    embeds, spans = embeddings(net, inputs), family_of(net).spans(net, inputs)
    embeds = normalize((embeds if embeds.dim() == 3 else embeds[:, :, 0]).float(), dim=-1)
    counts = {(s.sample, int(c)): 1.0 for s in spans for c in s.columns}
    ends = [int(mask.nonzero().max()) for mask in inputs["attention_mask"]]
    found = {}
    for layer, selections in stages:
        chosen, kept = iter([c for row in selections for c in row]), {}
        for span in spans:
            kept[id(span)] = {int(span.columns[i]) for i in next(chosen).kept.tolist()}
        groups = []
        for row, end in enumerate(ends):
            own = [s for s in spans if s.sample == row]
            parts = [[int(s.columns[i]) for i in c.index] for s in own for c in s.crops] if layer == 0 else None
            if parts is None:
                parts = [[c for c in s.columns.tolist() if (row, c) in counts and c != end] for s in own]
            left = set().union(*(kept[id(s)] for s in own)) if own else set()
            if layer and any(not left & {*part} for part in parts):
                parts = [sum(parts, [])]
            groups += [(row, part, [c for c in part if c in left]) for part in parts]
        plane, now = torch.zeros(inputs["input_ids"].shape), {}
        for row, part, left in groups:
            own = {c: counts[row, c] for c in left}
            for column in {*part} - {*left}:
                home = left[int((embeds[row, left] @ embeds[row, column]).argmax())]
                own[home] += counts[row, column]
            total = sum(counts[row, c] for c in part)
            for column, n in own.items():
                plane[row, column] = strength * min(math.log(n), 1.5 * math.log(total / len(left)))
                now[row, column] = n
        if layer == 0:
            counts = now
        found[layer] = plane
    return found


def stages_of(handle):
    """Return what was left before the LLM, if something was dropped there, and in front of its layers."""
    before = handle._results.last._before()
    return [(0, before)] * bool(before) + sorted(handle.layers.items())


def expected(net, inputs, stages, answer, raised):
    """Return the logits of an answer from the plain model, whose masks hold numbers."""
    raised = {layer: pad(plane, (0, answer.shape[1])) for layer, plane in raised.items()}
    return layered_answer(net, inputs, dict(stages), answer, "original", raised)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family_in_depth
def test_bias_equals_a_mask_of_numbers(family, attention):
    if not TINIES[family].masks:
        pytest.skip("this language model takes no 4-D mask")
    net, inputs = model(family, attention), collate(samples(family))
    with foveate.attach(net, Random(keep=9, seed=2), positions="original", rectify=STRENGTH) as handle:
        out = generate(net, inputs)
        stages = stages_of(handle)
    raised = planes(net, inputs, stages)
    assert raised[0].max() > 0.5
    close(torch.stack(out.logits, 1), expected(net, inputs, stages, answer_of(out, inputs), raised))


INSIDE = [
    FastV(layer=2, keep=5),
    Chain(VisPruner(keep=11), FastV(layer=2, keep=5)),
    PyramidDrop(keep=0.6),
    Chain(Random(keep=12, seed=2), PyramidDrop(keep=0.6)),
]


@pytest.mark.parametrize("method", INSIDE, ids=lambda m: "-".join(part.name for part in m.stages()))
@inside.every_family_in_depth
def test_counts_from_what_is_left_at_each_cut(family, method):
    if lacking := foveate.families.all_families()[family].lacks(method):
        pytest.skip(f"needs {lacking}")
    net, inputs = deep_model(family), collate(samples(family))
    with foveate.attach(net, method, positions="original", rectify=STRENGTH) as handle:
        out = generate(net, inputs)
        stages = stages_of(handle)
    raised = planes(net, inputs, stages)
    assert all(plane.max() > 0.1 for plane in raised.values())
    close(torch.stack(out.logits, 1), expected(net, inputs, stages, answer_of(out, inputs), raised))
