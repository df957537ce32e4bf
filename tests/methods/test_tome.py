"""ToMe: matching, schedule, and the whole tower against plain steps in float64."""

import pytest
import torch
from greedy_cases import exact_features, wave
from merge_cases import cosine, mean_keys
from tower_cases import log_size, reference

import foveate
from foveate import Budget, Chain
from foveate.core.encoder import Inside, merged
from foveate.core.errors import BudgetError, FoveateError, InputError, UnsupportedModelError
from foveate.core.probes import Keys
from foveate.cost import anatomy_of, work_of
from foveate.cost.prefill import encoder_rows
from foveate.families import family_of
from foveate.families.llava import Llava
from foveate.methods import ToMe, Uniform
from foveate.methods.tome import bipartite_matching
from tiny import VISUALS, collate, embedded_rows, model, sample, samples

FAMILIES = ["llava", "llava_next", "video_llava"]


def match(keys, pairs, lead):
    """Return, in the order of the output, the tokens that each new one is made of."""
    n = len(keys)
    even = [i for i in range(n) if (lead + i) % 2 == 0]
    odd = [i for i in range(n) if (lead + i) % 2]
    best = {a: max(odd, key=lambda b: (cosine(keys[a], keys[b]), -b)) for a in even}
    ranked = sorted(even, key=lambda a: -cosine(keys[a], keys[best[a]]))
    staying = sorted(ranked[pairs:]) if lead else ranked[pairs:]
    return [[a] for a in staying] + [[b, *(a for a in ranked[:pairs] if best[a] == b)] for b in odd]


def groups_of(into, count):
    return [[i for i, k in enumerate(into) if k == new] for new in range(count)]


def step(keys, count, lead=0, sizes=None, reducer=None):
    inside = Inside.start(len(keys), keys.shape[1], lead, keys.device)
    inside.planes[Keys()] = keys
    return (reducer or ToMe(keep=1)).step(inside, count)[0]


def test_toy_without_protection():
    keys, x = torch.tensor([mean_keys(16, 4, 6)]), torch.tensor([wave(16, 8, 0.8, 1.3)])
    into = step(keys, 13)
    assert groups_of(into[0].tolist(), 13) == [
        [8], [4], [0], [14], [10], [1], [3], [2 + 3, 12], [7], [2, 9], [11], [6, 13], [15],
    ]  # fmt: skip
    out, sizes = merged(x, into, torch.ones(1, 16), 13)
    assert sizes[0].tolist() == [1.0] * 7 + [2.0, 1.0, 2.0, 1.0, 2.0, 1.0]
    for place, expected in (
        (7, [-0.946353, 0.387479, 0.421131]),
        (9, [0.880898, -0.616865, -0.077245]),
        (11, [-0.781424, -0.639945, -0.006374]),
    ):
        assert out[0, place, :3].tolist() == pytest.approx(expected, abs=1e-6)


def test_toy_with_protection():
    keys = torch.tensor([mean_keys(16, 4, 6)])[:, 1:]  # token 0 is [CLS]
    into = groups_of(step(keys, 12, lead=1)[0].tolist(), 12)
    assert [[i + 1 for i in group] for group in into[:4]] == [[4], [8], [10], [14]]
    assert sorted([i + 1 for i in group] for group in into if len(group) > 1) == [[2, 9], [5, 12], [6, 13]]


@pytest.mark.parametrize("lead", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_matching_equals_the_reference(lead, dtype):
    generator = torch.Generator().manual_seed(lead)
    for _ in range(40):
        n = int(torch.randint(2, 40, (), generator=generator))
        pairs = int(torch.randint(1, n // 2 + 1, (), generator=generator))
        keys = exact_features(n, generator).to(dtype)
        into = bipartite_matching(keys[None], pairs, lead)[0].tolist()
        expected = match(keys.tolist(), pairs, lead)
        assert groups_of(into, n - pairs) == [sorted(group) for group in expected]


def test_schedule_hits_the_budget():
    assert ToMe(keep=1).schedule(576, 64, 23) == [576 - 23 * i if i <= 6 else 576 - 22 * i - 6 for i in range(1, 24)]
    for size, count, layers in ((576, 128, 23), (576, 1, 23), (64, 63, 2), (64, 13, 5), (7, 2, 12)):
        left = ToMe(keep=1).schedule(size, count, layers)
        removed = [a - b for a, b in zip([size, *left], left, strict=False)]
        assert left[-1] == count
        assert max(removed) - min(removed) <= 1
        assert removed == sorted(removed, reverse=True)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 20, 21, 40])
@pytest.mark.parametrize("lead", [0, 1])
def test_more_pairs_than_one_matching_has(count, lead):
    keys = torch.randn(3, 41, 6)
    into = step(keys, count, lead)
    x = torch.randn(3, 41, 4)
    out, sizes = merged(x, into, torch.ones(3, 41), count)
    assert sizes.shape == (3, count)
    assert sizes.min() >= 1
    torch.testing.assert_close(sizes.sum(dim=1), torch.full((3,), 41.0))
    torch.testing.assert_close((out * sizes[..., None]).sum(dim=1), x.sum(dim=1), atol=1e-4, rtol=1e-4)
    for b in range(3):
        assert torch.equal(step(keys[b : b + 1], count, lead)[0], into[b])


@pytest.mark.parametrize("bad", ["nan", "zero", "equal"])
def test_degenerate_keys_give_valid_tokens(bad):
    keys = torch.full((1, 21, 4), {"nan": torch.nan, "zero": 0.0, "equal": 0.5}[bad])
    for count in (1, 5, 20):
        assert sorted(set(step(keys, count)[0].tolist())) == list(range(count))


def test_sizes_are_kept_over_layers():
    inside, x = Inside.start(2, 33, 1, torch.device("cpu")), torch.randn(2, 34, 4)
    start, reducer = x, ToMe(keep=5)
    for left in reducer.schedule(33, 5, 4):
        inside.planes[Keys()] = torch.randn(2, inside.sizes.shape[1], 6)
        inside, x = inside.step(reducer, x, left)
        assert inside.sizes.shape == (2, left)
        assert torch.equal(inside.sizes.sum(dim=1), torch.full((2,), 33.0))
        assert torch.equal(x[:, :1], start[:, :1])
    for b in range(2):
        for token in range(5):
            own = inside.member[b] == token
            torch.testing.assert_close(x[b, 1 + token], start[b, 1:][own].mean(dim=0), atol=1e-5, rtol=1e-5)
            assert int(inside.places[b, token]) == int(own.nonzero()[0])
            assert (inside.homes[b][own] == inside.places[b, token]).all()


def merging(proportional):
    def act_for(lead, size, count):
        layers = 2

        def act(layer, tokens, query, key, value):
            target = size - sum((size - count) // layers + (i < (size - count) % layers) for i in range(layer + 1))
            keys = key.mean(dim=0)[lead:].tolist()
            while len(tokens) > target:
                groups = match(keys, min(len(tokens) - target, len(tokens) // 2), lead)
                weights = [[len(tokens[i]["patches"]) for i in group] for group in groups]
                keys = [
                    [sum(w * keys[i][c] for w, i in zip(ws, g, strict=True)) / sum(ws) for c in range(len(keys[0]))]
                    for ws, g in zip(weights, groups, strict=True)
                ]
                tokens = [
                    {
                        "x": sum(w * tokens[i]["x"] for w, i in zip(ws, g, strict=True)) / sum(ws),
                        "patches": [p for i in g for p in tokens[i]["patches"]],
                    }
                    for ws, g in zip(weights, groups, strict=True)
                ]
            return [{**t, "bias": log_size(t) * proportional} for t in tokens]

        return act

    return act_for


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [Budget(40, per="crop"), Budget(9, per="crop"), 27], ids=str)
@pytest.mark.parametrize("proportional", [True, False], ids=["proportional", "plain"])
def test_the_tower_equals_plain_steps(family, keep, proportional):
    net, inputs = model(family), collate(samples(family))
    reduced = foveate.reduce(net, inputs, ToMe(keep=keep, proportional=proportional))
    expected = reference(net, inputs, merging(proportional), "attention", keep)
    for chosen, embeds, (kept, patches, rows) in zip(reduced.selection, embedded_rows(reduced), expected, strict=True):
        chosen.check()
        assert chosen.kept.tolist() == kept
        torch.testing.assert_close(embeds.double(), rows, atol=1e-4, rtol=1e-4)
        if chosen.merge is None:  # every crop keeps all of its tokens
            assert all(len(p) == 1 for p in patches)
            continue
        groups = groups_of(chosen.merge.target.tolist(), len(kept))
        assert [sorted(chosen.merge.source[g].tolist()) for g in groups] == patches
        torch.testing.assert_close(
            chosen.merge.weight, 1 / torch.tensor([len(g) for g in groups])[chosen.merge.target].float()
        )


def test_sizes_matter_to_attention():
    net, inputs = model("llava"), collate(samples("llava"))
    one, other = (embedded_rows(foveate.reduce(net, inputs, ToMe(keep=20, proportional=p)))[0] for p in (True, False))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations_agree(attention):
    inputs = collate(samples("llava"))
    net, plain = model("llava", attention), model("llava")
    one, other = (foveate.reduce(n, inputs, ToMe(keep=20)) for n in (net, plain))
    assert [s.kept.tolist() for s in one.selection] == [s.kept.tolist() for s in other.selection]
    for a, b in zip(embedded_rows(one), embedded_rows(other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert net.model.vision_tower.config._attn_implementation == attention


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_image_beside_a_reduced_one(family):
    net = model(family)
    a, b, _ = VISUALS[family]
    inputs = collate([sample(2, a, 3, b, 4, seed=2)])
    keep = {"video": 1.0, "image": 7} if family == "video_llava" else [1.0, 7]
    reduced = foveate.reduce(net, inputs, ToMe(keep=keep))
    plain = foveate.reduce(net, inputs, Uniform(keep=keep))
    whole = [i for i, s in enumerate(reduced.selection) if s.is_identity]
    assert len(whole) == 1
    assert [len(s) for s in reduced.selection] == [len(s) for s in plain.selection]
    torch.testing.assert_close(embedded_rows(reduced)[whole[0]], embedded_rows(plain)[whole[0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("separators", ["keep", "nonempty"])
@pytest.mark.parametrize("family", ["llava_next", "video_llava"])
def test_separators(family, separators):
    net, inputs = model(family), collate(samples(family))
    reduced = foveate.reduce(net, inputs, ToMe(keep=9), separators=separators)
    for span, chosen in zip(family_of(net).spans(net, inputs), reduced.selection, strict=True):
        chosen.check()
        kept = set(chosen.kept.tolist()) & set(span.separators().tolist())
        assert len(chosen) == 9 + len(kept)
        assert kept or family == "video_llava"
    assert all(x.isfinite().all() for x in embedded_rows(reduced))
    if family == "llava_next":
        rows = torch.isin(chosen.kept, span.separators())
        newline = net.model.image_newline
        torch.testing.assert_close(embedded_rows(reduced)[-1][rows], newline.expand(int(rows.sum()), -1))


def test_later_layers_have_fewer_tokens():
    net, inputs, seen = model("llava"), collate(samples("llava")), []
    for layer in net.model.vision_tower.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    foveate.reduce(net, inputs, ToMe(keep=20))
    assert seen == [1 + 42, 1 + 20]
    assert ToMe(keep=20).lengths(64, 20, 2) == [(64, 42), (42, 20)]
    assert ToMe(keep=64).lengths(64, 64, 2) == [(64, 64), (64, 64)]


def test_lengths_count_padding():
    net, inputs = model("llava_next"), collate([sample(4, VISUALS["llava_next"][0], 5, seed=1)])
    family = family_of(net)
    spans = family.spans(net, inputs)
    crops, anatomy = spans[0].crops, anatomy_of(net.config, type(net))
    rows = encoder_rows(anatomy, work_of(anatomy, inputs, spans), ToMe(keep=Budget(8, per="crop")))
    assert any(len(crop) < 64 for crop in crops)
    assert [row[-1] for row in rows] == [
        (64 - len(c) + -(-(len(c) + 8) // 2) - (len(c) - 8) % 2, 64 - len(c) + 8) for c in crops
    ]


def test_gradients_reach_the_tower():
    net, inputs = model("llava"), collate(samples("llava"))
    reduced = foveate.reduce(net, inputs, ToMe(keep=20))
    sum(x.sum() for x in embedded_rows(reduced)).backward()
    assert net.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_what_it_cannot_do_is_said(monkeypatch):
    net, inputs = model("llava"), collate(samples("llava"))
    with pytest.raises(InputError, match="per 'image' or per 'crop'"):
        foveate.reduce(net, inputs, ToMe(keep=Budget(9, per="joint")))
    with pytest.raises(BudgetError, match="use a count or a ratio"):
        foveate.reduce(net, inputs, ToMe(keep=Budget.coverage(0.9)))
    with pytest.raises(FoveateError, match="inside the LLM only"):
        Chain(ToMe(keep=9), Uniform(keep=4))
    with pytest.raises(UnsupportedModelError, match="reads 2 layers at once"):
        foveate.reduce(net, {**inputs, "vision_feature_layer": [-2, -1]}, ToMe(keep=9))
    with pytest.raises(InputError, match="look for it alone"):
        foveate.engines.pipeline.look(net, family_of(net), inputs, (), [ToMe(keep=9), Uniform(keep=9)])
    net.model.vision_tower.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="proportional=False"):
        foveate.reduce(net, inputs, ToMe(keep=9))
    monkeypatch.setattr(Llava, "reduces_inside", False)
    with pytest.raises(UnsupportedModelError, match=r"tome needs a CLIP-like vision encoder, .*visionzip"):
        foveate.attach(net, ToMe(keep=9))


def test_layers_of_another_make_are_refused():
    net, inputs = model("llava"), collate(samples("llava"))
    net.model.vision_tower.encoder.layers[0].layer_scale = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="layer_scale"):
        foveate.reduce(net, inputs, ToMe(keep=9))
