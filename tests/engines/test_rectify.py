"""A bias on attention to kept tokens: equal to the plain model with a mask of numbers, however the model is run."""

import math

import pytest
import torch
from oracle import answer_of, close, embeddings, every_family_in_depth, extended, generate
from torch.nn.functional import normalize

import foveate
from foveate.families import family_of
from foveate.methods import Random
from tiny import IMAGE, TINIES, VIDEO, collate, model, samples, tiny_of

STRENGTH = 0.7


def bias_of(net, inputs, selections, strength=STRENGTH):
    """Return the bias ``[B, L]`` of the columns of the full prompts, worked out token by token."""
    out = torch.zeros(inputs["input_ids"].shape)
    embeds, spans = embeddings(net, inputs), family_of(net).spans(net, inputs)
    embeds = embeds if embeds.dim() == 3 else embeds[:, :, 0]
    chosen = iter([c for row in selections for c in row])
    for span in spans:
        kept = set(next(chosen).kept.tolist())
        rows = normalize(embeds[span.sample, span.columns].float(), dim=-1)
        for crop in span.crops:
            index = crop.index.tolist()
            own = [i for i in index if i in kept]
            counts = dict.fromkeys(own, 1)
            for i in set(index) - kept:
                cosines = rows[own] @ rows[i]
                counts[own[int(cosines.argmax())]] += 1
            most = 1.5 * math.log(len(index) / len(own))
            for i, n in counts.items():
                out[span.sample, span.columns[i]] = strength * min(math.log(n), most)
    return out


@torch.no_grad()
def expected(net, inputs, selections, answer, bias):
    """Return the logits of an answer from the plain model on the full prompts, with a 4-D mask of numbers."""
    tiny = tiny_of(net)
    whole = extended(inputs, answer, tiny.answer_type)
    ids = whole["input_ids"]
    visible = whole["attention_mask"].bool()
    visual = (ids == IMAGE) | (ids == VIDEO)
    for i, spans in enumerate(selections):
        places, start = visual[i].nonzero().flatten(), 0
        visible[i, places] = False
        for span in spans:
            visible[i, places[start + span.kept]] = True
            start += span.length
    raised = torch.nn.functional.pad(bias, (0, answer.shape[1]))[:, None, None]
    mask = tiny.mask(net, whole, visible)
    mask = {kind: x + raised for kind, x in mask.items()} if isinstance(mask, dict) else mask + raised
    positions = tiny.position_ids(net, whole)
    logits = net(**{**whole, "attention_mask": mask, "position_ids": positions}).logits
    return logits[:, -answer.shape[1] - 1 : -1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family_in_depth
def test_bias_equals_a_mask_of_numbers(family, attention):
    if not TINIES[family].masks:
        pytest.skip("this language model takes no 4-D mask")
    net, inputs = model(family, attention), collate(samples(family))
    with foveate.attach(net, Random(keep=9, seed=2), positions="original", rectify=STRENGTH) as handle:
        out = generate(net, inputs)
    answer = answer_of(out, inputs)
    bias = bias_of(net, inputs, handle.selections)
    assert bias.max() > 0.5
    close(torch.stack(out.logits, 1), expected(net, inputs, handle.selections, answer, bias))
