"""VFlowOpt's stages inside the LLM, and the method as a whole, against the specification's numbers."""

import pytest
import torch
from layer_cases import layer_tokens

import foveate
from foveate.core.errors import BudgetError, FoveateError, UnknownNameError, UnsupportedModelError
from foveate.core.in_llm import of_encoder, tokens_per_layer
from foveate.core.probes import Prior
from foveate.fit.vflowopt import last_ratio, mean_share
from foveate.methods import VFlowOpt, VFlowOptAll, VFlowOptLlm
from foveate.methods.vflowopt import Judged
from foveate.methods.vflowopt_stages import RELEASED
from tiny import collate, deep_model, sample, samples

CUTS = (9, 18)


@pytest.mark.parametrize(
    ("budget", "counts", "share"),
    [("50%", (527, 395, 192), 0.5008), ("25%", (193, 190, 167), 0.2507), ("10%", (85, 85, 51), 0.1000)],
)
def test_released_strategies(budget, counts, share):
    reducer = VFlowOptAll.released(budget)
    before, inside = reducer.stages()
    assert round(729 * before.keep) == counts[0]
    assert tuple(inside.counts(28, [("image", counts[0])])) == counts[1:]
    assert inside.boundaries(28) == CUTS
    assert tokens_per_layer(reducer, 28, 729) == tuple([counts[0]] * 9 + [counts[1]] * 9 + [counts[2]] * 10)
    assert mean_share(28, CUTS, reducer.ratios) == pytest.approx(share, abs=5e-5)
    assert (before.t, before.a, inside.t) == (RELEASED[budget]["t"], RELEASED[budget]["a"], RELEASED[budget]["t"])


@pytest.mark.parametrize(
    ("share", "ratios", "expected"),
    [(0.5, (0.72332, 0.748748), 0.48300), (0.25, (0.265103, 0.983343), 0.86997), (0.1, (0.116615, 1.0), 0.60106)],
)
def test_last_ratio_of_a_budget(share, ratios, expected):
    found = last_ratio(28, CUTS, share, ratios)
    assert found == pytest.approx(expected, abs=5e-6)
    assert mean_share(28, CUTS, (*ratios, found)) == pytest.approx(share)


def test_last_ratio_is_at_most_one_and_there_may_be_none():
    assert last_ratio(28, CUTS, 0.9, (0.5, 0.5)) == 1.0
    assert last_ratio(28, CUTS, 0.25, (0.5, 0.9)) is None


def test_boundaries_at_other_depths():
    assert VFlowOptLlm(keep=8).boundaries(32) == (10, 21)
    assert VFlowOptLlm(keep=8).boundaries(4) == (1, 3)
    with pytest.raises(UnsupportedModelError, match=r"2 ratios for boundaries \(1,\) in an LLM of 2 layers"):
        VFlowOptLlm(ratios=(0.5, 0.5)).counts(2, [("image", 64)])


def test_halves_are_rounded_to_even():
    assert VFlowOptLlm(ratios=(0.5, 0.5)).counts(28, [("image", 5)]) == [3, 1]  # 2.5 and 1.5 go: 2 and 2


def test_the_least_important_of_those_left_go():
    prior = torch.tensor([0.3, 0.9, 0.1, 0.9, torch.inf, 0.2])
    chosen = VFlowOptLlm(keep=2).select(layer_tokens([6, 6], [4, 2], {Prior(): [prior, prior.flip(0)]}))
    assert [span.kept.tolist() for span in chosen] == [[0, 1, 3, 4], [1, 2]]


def test_a_plain_budget_is_met_on_average():
    for keep, tokens in ((0.25, 576), (64, 576), (0.9, 729), (1.0, 64)):
        layers = tokens_per_layer(VFlowOptAll(keep=keep), 28, tokens)
        wanted = keep if isinstance(keep, int) else keep * tokens
        assert sum(layers) / 28 == pytest.approx(wanted, rel=0.02)
        assert layers[0] == min(tokens, round(1.25 * wanted))
        assert list(layers) == sorted(layers, reverse=True)
    with pytest.raises(BudgetError, match="cannot come down"):
        VFlowOptLlm(keep=10).counts(28, [("image", 576)])


def importance(net, inputs, t):
    """Return the encoder's map for one image from the whole attention map of its layer."""
    tower = net.model.vision_tower
    maps = tower(inputs["pixel_values"], output_attentions=True).attentions[-2][0].mean(dim=0).double()
    got = maps.mean(dim=0)[1:]
    judges = (got > t * got.mean()).nonzero().flatten()
    return maps[1 + judges, 1:].mean(dim=0)


def test_the_map_of_the_encoder_decides_in_every_stage():
    net, inputs = deep_model("llava", "eager"), collate([sample(4, "image", 5)])
    order = importance(net, inputs, 1.1).argsort(descending=True).tolist()
    reducer = VFlowOptAll(ratios=(0.5, 0.5, 0.5), t=1.1)
    with foveate.attach(net, reducer) as handle, torch.no_grad():
        net(**inputs)
    left = {b: rows[0][0].kept.tolist() for b, rows in handle.layers.items()}
    assert left == {1: sorted(order[:16]), 3: sorted(order[:8])}


def test_recycled_tokens_stay_where_their_leader_is():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    reducer = VFlowOptAll(ratios=(0.5, 0.5, 0.5), t=1.1, a=2.5)
    before = foveate.reduce(net, inputs, reducer.stages()[0])
    assert any(span.merge is not None for span in before.selection)
    with foveate.attach(net, reducer) as handle, torch.no_grad():
        net(**inputs)
        for rows in handle.layers.values():
            for row, whole in zip(rows, before.selection.by_prompt(3), strict=True):
                for span, first in zip(row, whole, strict=True):
                    assert set(span.kept.tolist()) < set(first.kept.tolist())


def test_the_question_does_not_matter():
    net, found = deep_model("llava"), []
    picture = sample(4, "image", seed=5)
    for seed in (1, 2):
        row = {**picture, "ids": picture["ids"] + sample(6, seed=seed)["ids"]}
        with foveate.attach(net, VFlowOptAll(keep=16)) as handle, torch.no_grad():
            net(**collate([row]))
        found.append({b: [s.kept.tolist() for s in rows[0]] for b, rows in handle.layers.items()})
    assert found[0] == found[1]


def test_budgets_leave_no_traces():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    logits = []
    for keep in (0.3, 0.6, 0.3):
        with foveate.attach(net, VFlowOptAll(keep=keep)), torch.no_grad():
            logits.append(net(**inputs).logits)
    assert torch.equal(logits[0], logits[2])
    assert logits[0].shape != logits[1].shape


def test_everything_kept_is_bit_identical():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    plain = net.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for reducer in (VFlowOptAll(keep=1.0), VFlowOptAll(ratios=(1.0, 1.0, 1.0), t=1.0, a=2.5)):
        with foveate.attach(net, reducer):
            out = net.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


def test_a_budget_by_kind_can_judge_inside_the_llm():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, VFlowOptLlm(keep={"image": 0.4, "video": 0.2})) as handle, torch.no_grad():
        net(**inputs)
    assert len(handle.selections[0][0]) < 64


def test_it_survives_its_json(tmp_path):
    for reducer in (VFlowOptAll.released("25%"), VFlowOptAll(keep={"image": 0.25, "video": 64})):
        reducer.save(tmp_path / "x.json")
        assert foveate.load_reducer(tmp_path / "x.json") == reducer


def test_stages_share_the_map():
    before, inside = VFlowOptAll(keep=8, t=1.3, a=2.0, exact=False).stages()
    assert before.needs == of_encoder(inside) == (Judged(1.3),)
    assert isinstance(before, VFlowOpt)
    assert (before.a, before.exact) == (2.0, False)


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        (VFlowOptAll, {}, "either keep= or ratios=, not none"),
        (VFlowOptAll, {"keep": 8, "ratios": (0.5, 0.5, 0.5)}, "either keep= or ratios=, not both"),
        (VFlowOptAll, {"ratios": (0.5,)}, "one per boundary"),
        (VFlowOptAll, {"ratios": (0.5, 0.0, 0.5)}, r"shares in \(0, 1\]"),
        (VFlowOptAll, {"keep": 8, "layers": (2, 1)}, "layers of vflowopt_llm ascend"),
        (VFlowOptAll, {"keep": 8, "t": -1.0}, "t is"),
        (VFlowOptLlm, {}, "either keep= or ratios=, not none"),
        (VFlowOptLlm, {"ratios": (1.5,)}, r"shares in \(0, 1\]"),
    ],
)
def test_impossible_parameters_are_refused(method, config, message):
    with pytest.raises(FoveateError, match=message):
        method(**config)


def test_unknown_strategies_are_refused():
    with pytest.raises(UnknownNameError, match="released for 50%, 25%, 10%"):
        VFlowOptAll.released("33%")
