"""2409.01162-style pruning: the numbers of the specification, both stages, and the whole."""

from dataclasses import replace

import pytest
import torch
from layer_cases import layer_tokens

import foveate
from foveate import Budget, FoveateError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.probes import ClsSimilarity, LayerAttention
from foveate.core.ranking import cosine_matrix
from foveate.methods import FastV, TextInteraction, TextInteractionImage, TextInteractionLLM
from foveate.methods.text_interaction import knee
from tiny import collate, deep_model, model, samples, visual_tokens

SIMILARITY = torch.tensor([0.21, 0.62, 0.10, 0.55, 0.08, 0.18, 0.07, 0.12, 0.09, 0.15])


def tokens_with(reducer, *similarities, grids=None):
    grids = grids or [(1, len(x)) for x in similarities]
    tokens = visual_tokens(reducer, [(0, grids)])
    return replace(tokens, planes={**tokens.planes, ClsSimilarity(): list(similarities)})


def test_knee():
    curve = SIMILARITY.sort(descending=True).values
    y = (curve - curve[-1]) / (curve[0] - curve[-1])
    expected = [1, 0.872727, 0.254545, 0.2, 0.145455, 0.090909, 0.054545, 0.036364, 0.018182, 0]
    torch.testing.assert_close(y, torch.tensor(expected), atol=1e-6, rtol=0)
    gap = 1 - torch.linspace(0, 1, 10) - y
    expected = [0, 0.016162, 0.523232, 0.466667, 0.410101, 0.353535, 0.278788, 0.185859, 0.092929, 0]
    torch.testing.assert_close(gap, torch.tensor(expected), atol=1e-6, rtol=0)
    assert int(knee(curve)) == 2
    assert int(knee(curve, inclusive=True)) == 3


@pytest.mark.parametrize(
    "curve", [[0.5, 0.4, 0.3, 0.2, 0.1], [0.3] * 5, [0.9, 0.88, 0.86, 0.5, 0.1], [0.9, 0.1], [0.4]], ids=str
)
def test_no_knee(curve):
    assert int(knee(torch.tensor(curve))) == len(curve)


@pytest.mark.parametrize(("a", "b"), [(3.0, 0.0), (0.01, -4.0), (250.0, 17.0)])
def test_scale_and_offset_do_not_matter(a, b):
    for seed in range(20):
        curve = torch.rand(50, generator=torch.Generator().manual_seed(seed)).pow(4).sort(descending=True).values
        assert int(knee(curve)) == int(knee(a * curve.double() + b))


def test_heavier_tails_are_numbers():
    curve = SIMILARITY.sort(descending=True).values
    for share in torch.linspace(0, 1, 11):
        raised = torch.cat([curve[:2], curve[2:] + share * (curve[1] - curve[2:])])
        assert 1 <= int(knee(raised)) <= 10


def test_stage_one():
    reducer = TextInteractionImage(keep=0.6)
    assert reducer.select(tokens_with(reducer, SIMILARITY))[0].kept.tolist() == [1, 3]
    reducer = TextInteractionImage(keep=0.6, inclusive=True)
    assert reducer.select(tokens_with(reducer, SIMILARITY))[0].kept.tolist() == [0, 1, 3]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    (moved,) = TextInteractionImage(keep=0.6).select(tokens_with(reducer, SIMILARITY[order]))
    assert sorted(order[moved.kept].tolist()) == [1, 3]


def test_bounds():
    outlier = torch.cat([torch.tensor([9.0]), torch.linspace(0.2, 0.1, 99)])
    reducer = TextInteractionImage(keep=0.6)
    assert len(reducer.select(tokens_with(reducer, outlier))[0]) == 5
    assert len(reducer.select(tokens_with(reducer, torch.full((100,), 0.3)))[0]) == 60
    reducer = TextInteractionImage(keep=1.0, least=0.0)
    assert len(reducer.select(tokens_with(reducer, outlier))[0]) == 1
    assert len(reducer.select(tokens_with(reducer, torch.full((100,), 0.3)))[0]) == 100


def test_each_crop_has_its_own_knee():
    straight = torch.linspace(0.5, 0.1, 10)
    reducer = TextInteractionImage(keep=0.6)
    kept = reducer.select(tokens_with(reducer, SIMILARITY, straight))[0].kept
    assert kept.tolist() == [1, 3, *range(11, 17)]
    joint = TextInteractionImage(keep=Budget(0.6, per="joint"))
    kept = joint.select(tokens_with(joint, SIMILARITY, straight))[0].kept
    whole = torch.cat([SIMILARITY, straight])
    count = int(knee(whole.sort(descending=True).values))
    assert len(kept) == min(count, 12)


def test_a_fixed_number_of_the_most_similar():
    reducer = TextInteractionImage(keep=4, adaptive=False)
    assert reducer.select(tokens_with(reducer, SIMILARITY))[0].kept.tolist() == [0, 1, 3, 5]


def test_cosine():
    patches = torch.tensor([[1.0, 0], [0.8, 0.6], [0.6, 0.8], [0, 1], [-1, 0]])
    found = cosine_matrix(patches[None], torch.tensor([[[1.0, 0]]]))[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([1, 0.8, 0.6, 0, -1]))


@pytest.mark.parametrize("family", ["llava", "llava_next", "video_llava", "qwen2_5_vl", "internvl"])
def test_similarity_is_that_of_the_features_with_cls(family):
    from foveate.core.probes import ClsToken, Features
    from foveate.engines.pipeline import look
    from foveate.families import family_of

    net, inputs = model(family), collate(samples(family))
    fam = family_of(net)
    spans = fam.spans(net, inputs)
    tokens = look(net, fam, inputs, spans, [TextInteractionImage(keep=0.6)])
    encoded = fam.encode(net, inputs, spans, (Features(), ClsToken()))
    rows = iter(zip(tokens.probe(ClsSimilarity()), encoded.probe(Features()), strict=True))
    for span, hidden in zip(spans, encoded.hidden, strict=True):
        for j, crop in enumerate(span.crops):
            found, features = next(rows)
            cls = hidden[len(span) + j] if encoded.cls else features.mean(dim=0)
            assert found.shape == (len(crop),)
            torch.testing.assert_close(found, torch.cosine_similarity(features, cls[None], dim=1))
    assert encoded.cls == (family in ("llava", "llava_next", "video_llava"))


def test_stage_two():
    rows = torch.tensor([[0.05, 0.20, 0.01, 0.04], [0.02, 0.10, 0.06, 0.02]])
    scores = rows.mean(dim=0)
    torch.testing.assert_close(scores, torch.tensor([0.035, 0.15, 0.035, 0.03]))
    reducer = TextInteractionLLM(keep=0.4)
    (count,) = reducer.counts(32, [("image", 4)])
    assert count == 2
    (chosen,) = reducer.select(layer_tokens([4], [count], {LayerAttention("text"): [scores]}))
    assert chosen.kept.tolist() == [0, 1]


def test_the_default_comes_to_the_share_of_the_abstract():
    received = tokens_per_layer(TextInteractionLLM(keep=0.4), 32, 288)
    assert sum(received) / 32 / 576 == pytest.approx(0.219, abs=0.002)


@pytest.mark.parametrize("keep", [192, 128, 64])
def test_budgets_are_means_over_the_layers(keep):
    first, second = TextInteraction(keep=keep).stages()
    assert (first.keep, first.adaptive) == (keep * 3 // 2, False)
    received = tokens_per_layer(second, 32, first.keep)
    assert received[:2] == (first.keep,) * 2
    assert sum(received) / 32 == pytest.approx(keep, abs=0.5)
    first, second = TextInteraction(keep=keep / 576).stages()
    assert sum(tokens_per_layer(second, 32, first.keep and round(first.keep * 576))) / 32 == pytest.approx(
        keep, abs=0.5
    )


def test_the_whole_is_its_stages():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    whole = TextInteraction(layer=1)
    with foveate.attach(net, whole) as handle, torch.no_grad():
        net(**inputs)
        rows, behind = handle.selections, handle.layers
    reduced = foveate.reduce(net, inputs, TextInteractionImage(keep=0.6))
    assert list(behind) == [1]
    for row, spans in zip(rows, reduced.selection.by_prompt(3), strict=True):
        first = sum(len(s) for s in spans)
        assert sum(len(s) for s in row) == -(-first * 4 // 10)
        for span, before in zip(row, spans, strict=True):
            assert set(span.kept.tolist()) <= set(before.kept.tolist())
    # What the second stage ranks by is FastV's attention of the text.
    with foveate.attach(net, FastV(keep=0.4, layer=1, query="text")) as handle, torch.no_grad():
        net(**dict(foveate.reduce(net, collate(samples("llava")[:1]), TextInteractionImage(keep=0.6))))
        assert handle.selections


def test_adaptive_prompts_alone_and_together():
    net, batch = deep_model("llava"), samples("llava")
    with foveate.attach(net, TextInteraction(layer=1)) as handle, torch.no_grad():
        net(**collate(batch))
        together = [[s.kept.tolist() for s in row] for row in handle.selections]
        for i, row in enumerate(batch):
            net(**collate([row]))
            assert [[s.kept.tolist() for s in row] for row in handle.selections] == together[i : i + 1]


def test_everything_kept_is_bit_identical():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with torch.no_grad():
        plain = net(**inputs).logits
        with foveate.attach(net, TextInteraction(keep=1.0)):
            assert torch.equal(net(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ratio": 1.5}, "share of the tokens"), ({"least": 0.7}, "least <= most"), ({"keep": [3, 4]}, "one budget"),
     ({"similarity": "dot"}, "'cosine' or 'attention'"), ({"layer": 0}, "in front of the cut"),
     ({"most": 1.5}, "ratio of 1.5")],
)  # fmt: skip
def test_bad_parameters(options, message):
    with pytest.raises(FoveateError, match=message):
        TextInteraction(**options)
