"""Adaptive budgets: the fewest tokens that hold a share of the saliency, alone, in chains and through models."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import answer_logits

import foveate
from foveate import Budget, Chain, VisPruner, load_reducer
from foveate.core.budget import Coverage, check
from foveate.core.coverage import SALIENCY, with_coverage
from foveate.core.errors import BudgetError
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.engines.pipeline import look
from foveate.families import family_of
from foveate.methods import Downsample, FasterVLM, Pool, Random, Uniform
from tiny import VISUALS, collate, model, sample, samples, visual_tokens

NOISE = 1e-9  # relative: what rounding may change

values = st.floats(0, 1, width=32)
crops = st.lists(st.lists(values, min_size=1, max_size=30), min_size=1, max_size=4)
shares = st.one_of(st.floats(0.001, 1.0), st.sampled_from([0.07, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]))
scopes = st.sampled_from(["image", "crop", "joint"])


def tokens_of(*images):
    """Make spans whose crops ``[[...], ...]`` have the given saliency."""
    spans, planes = [], []
    for i, image in enumerate(images):
        start, parts = 0, []
        for crop in image:
            parts.append(Crop(torch.arange(start, start + len(crop)), (1, len(crop))))
            planes.append(torch.tensor(crop))
            start += len(crop)
        spans.append(Span("image", i, 0, torch.arange(start), (1, 1, start), tuple(parts)))
    return VisualTokens(tuple(spans), {SALIENCY: planes}, torch.device("cpu"))


def counts(budget, *images):
    return [span.budget(budget) for span in with_coverage(tokens_of(*images), [budget]).spans]


def fewest(saliency, share):
    """Return how many tokens hold a share, and whether one more or less is a matter of rounding; exact arithmetic."""
    mass = sorted((Fraction(x) for x in saliency), reverse=True)
    wanted, held = Fraction(share) * sum(mass), Fraction(0)
    for k, x in enumerate(mass, start=1):
        held += x
        if held >= wanted * (1 - Fraction(NOISE)):
            return k, abs(held - wanted) <= 2 * Fraction(NOISE) * wanted and held != wanted
    raise AssertionError


@given(crops, shares, scopes)
def test_fewest_tokens_that_hold_the_share(image, share, per):
    (found,) = counts(Budget.coverage(share, per=per), image)
    groups = image if per == "crop" else [[x for crop in image for x in crop]]
    wanted = [fewest(group, share) for group in groups]
    if any(rounding for _, rounding in wanted):
        return
    if per == "image":
        order = sorted(range(len(groups[0])), key=lambda i: -groups[0][i])[: wanted[0][0]]
        ends = [0, *torch.tensor([len(crop) for crop in image]).cumsum(0).tolist()]
        assert found == [sum(a <= i < b for i in order) for a, b in itertools.pairwise(ends)]
    else:
        assert found == [k for k, _ in wanted]


@given(crops, shares, scopes, st.integers(1, 40), st.one_of(st.none(), st.integers(0, 40)))
def test_bounds(image, share, per, least, extra):
    most = None if extra is None else least + extra
    (free,) = counts(Budget.coverage(share, per=per), image)
    (found,) = counts(Budget.coverage(share, per=per, least=least, most=most), image)
    if per != "crop":
        free, found, sizes = [sum(free)], [sum(found)], [sum(map(len, image))]
    else:
        sizes = [len(crop) for crop in image]
    for a, b, size in zip(free, found, sizes, strict=True):
        assert b == min(max(a, least), math.inf if most is None else most, size)


@given(crops, scopes, shares, shares)
def test_a_larger_share_needs_no_fewer_tokens(image, per, one, other):
    (a,), (b,) = (counts(Budget.coverage(share, per=per), image) for share in sorted((one, other)))
    assert all(x <= y for x, y in zip(a, b, strict=True))


@given(st.lists(crops, min_size=1, max_size=3), shares, scopes)
def test_images_do_not_see_each_other(images, share, per):
    budget = Budget.coverage(share, per=per)
    assert counts(budget, *images) == [counts(budget, image)[0] for image in images]


@given(st.integers(1, 300), st.integers(1, 100))
def test_equal_saliency_is_a_ratio_rounded_up(size, percent):
    ((count,),) = counts(Budget.coverage(percent / 100), [[0.1] * size])
    assert count == -(-percent * size // 100)


@pytest.mark.parametrize(("saliency", "share", "count"), [
    ([0.5, 0.25, 0.125, 0.125], 0.5, 1),
    ([0.125, 0.25, 0.125, 0.5], 0.75, 2),
    ([0.125, 0.25, 0.125, 0.5], 0.76, 3),
    ([0.5, 0.5, 0.0, 0.0], 1.0, 2),
    ([0.0, 0.0, 0.0], 0.9, 1),
    ([math.nan, 1.0, 1.0], 1.0, 2),
    ([-1.0, 1.0], 1.0, 1),
    ([7.0], 0.1, 1),
])  # fmt: skip
def test_examples(saliency, share, count):
    assert counts(Budget.coverage(share), [saliency]) == [[count]]


def test_crops_share_an_image_by_what_is_salient():
    image = [[0.4, 0.3, 0.0], [0.2, 0.0], [0.05, 0.05]]
    assert counts(Budget.coverage(0.9), image) == [[2, 1, 0]]
    assert counts(Budget.coverage(0.9, per="joint"), image) == [[3]]
    assert counts(Budget.coverage(0.9, per="crop"), image) == [[2, 1, 2]]
    assert counts(Budget.coverage(0.9, least=5), image) == [[2, 1, 2]]
    assert counts(Budget.coverage(0.9, most=1), image) == [[1, 0, 0]]


def test_empty_crops():
    """Of a video, an earlier method may leave nothing of a frame."""
    image = [[0.4, 0.3], [], [0.3]]
    assert counts(Budget.coverage(0.9), image) == [[2, 0, 1]]
    assert counts(Budget.coverage(0.9, per="crop", least=2), image) == [[2, 0, 1]]
    assert counts(Budget.coverage(0.9, per="joint"), [[], []]) == [[0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 2}, "share of the saliency"),
        ({"share": 0.0}, r"\(0, 1\]"),
        ({"share": 1.5}, r"\(0, 1\]"),
        ({"share": math.nan}, "not nan"),
        ({"share": "0.9"}, "ratio"),
        ({"share": 0.9, "least": 0}, "1 <= least"),
        ({"share": 0.9, "least": 8, "most": 7}, "least=8, most=7"),
        ({"share": 0.9, "least": 1.5}, "whole numbers"),
        ({"share": 0.9, "most": True}, "whole numbers"),
        ({"share": 0.9, "per": "tile"}, "'image', 'crop' or 'joint'"),
    ],
)
def test_what_is_no_coverage_is_refused(arguments, message):
    with pytest.raises(BudgetError, match=message):
        Budget.coverage(**arguments)


KEEPS = [
    Budget.coverage(0.9),
    Budget.coverage(0.5, per="crop", least=3, most=9),
    [Budget.coverage(0.9, per="joint"), 8],
    {"image": Budget.coverage(0.8), "video": Budget(4, per="crop")},
]


@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_save_and_load(keep, tmp_path):
    check(keep)
    for reducer in (VisPruner(keep=keep), Chain(Random(keep=0.5), VisPruner(keep=keep))):
        reducer.save(tmp_path / "reducer.json")
        loaded = load_reducer(tmp_path / "reducer.json")
        assert loaded == reducer
        assert repr(loaded) == repr(reducer)
        assert loaded.coverages() == reducer.coverages() != ()
    assert VisPruner(keep=8).coverages() == ()


def test_without_an_engine_the_count_is_not_known():
    reducer = VisPruner(keep=Budget.coverage(0.9))
    tokens = visual_tokens(reducer, [(0, [(4, 4)])])
    assert not reducer.keeps_all(tokens.spans)
    with pytest.raises(BudgetError, match="use a count or a ratio"):
        reducer.select(tokens)


@pytest.mark.parametrize("cls", [FasterVLM, VisPruner, Pool, Uniform, Random])
@pytest.mark.parametrize("per", ["image", "crop"])
def test_methods_keep_as_many_as_the_share_needs(cls, per):
    budget = Budget.coverage(0.6, per=per)
    reducer = cls(keep=budget)
    plain = visual_tokens(FasterVLM(keep=1), [(0, [(6, 8), (8, 8), (8, 3)]), (1, [(8, 8)])])
    planes = {**plain.planes, **visual_tokens(reducer, [(0, [(6, 8), (8, 8), (8, 3)]), (1, [(8, 8)])]).planes}
    planes[SALIENCY] = plain.planes[SALIENCY]
    tokens = with_coverage(VisualTokens(plain.spans, planes, plain.device), [budget])
    for span, chosen in zip(tokens.spans, reducer.select(tokens), strict=True):
        wanted = span.budget(budget)
        kept = set(chosen.kept.tolist())
        assert [len(kept & set(crop.index.tolist())) for crop in span.crops] == wanted
        assert 0 < sum(wanted) < sum(map(len, span.crops))


@pytest.mark.parametrize("per", ["image", "crop", "joint"])
def test_fastervlm_holds_the_share(per):
    """The most attended tokens are those that make up the share: nothing is lost to the division among crops."""
    reducer = FasterVLM(keep=Budget.coverage(0.7, per=per))
    tokens = with_coverage(visual_tokens(reducer, [(0, [(6, 8), (8, 8), (8, 3)])]), reducer.coverages())
    (chosen,) = reducer.select(tokens)
    planes = zip(tokens.spans[0].crops, tokens.probe(SALIENCY), strict=True)
    parts = [(x.double(), x[torch.isin(crop.index, chosen.kept)].double()) for crop, x in planes]
    if per != "crop":
        parts = [tuple(map(torch.cat, zip(*parts, strict=True)))]
    for every, own in parts:
        assert own.sum() >= 0.7 * every.sum() > own.sum() - own.min()


def test_a_chain_covers_what_is_left():
    budget = Budget.coverage(0.8)
    chain = Chain(Uniform(keep=0.5), FasterVLM(keep=budget))
    tokens = visual_tokens(chain, [(0, [(8, 8)]), (1, [(6, 8), (8, 8)])])
    first = Uniform(keep=0.5).select(tokens)
    both = chain.select(with_coverage(tokens, chain.coverages()))
    for span, a, b in zip(tokens.after(first).spans, first, both, strict=True):
        assert set(b.kept.tolist()) < set(a.kept.tolist())
        assert span.covered == {}
    saliency = tokens.probe(SALIENCY)[0]
    (wanted,) = counts(budget, [saliency[first[0].kept].tolist()])
    assert len(both[0]) == wanted[0]


REDUCERS = [
    FasterVLM(keep=Budget.coverage(0.6)),
    VisPruner(keep=Budget.coverage(0.6, per="crop", least=5)),
    VisPruner(keep=Budget.coverage(0.7, per="joint", most=25)),
    Uniform(keep=Budget.coverage(0.5)),
    Chain(Uniform(keep=0.5), VisPruner(keep=Budget.coverage(0.6))),
    Chain(VisPruner(keep=Budget.coverage(0.8)), Random(keep=9)),
    VisPruner(keep=[Budget.coverage(0.6), Budget.coverage(0.3)]),
]
every_reducer = pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
families = pytest.mark.parametrize("family", ["llava", "llava_next"])


@families
@every_reducer
def test_models_keep_the_share(family, reducer):
    net, inputs = model(family), collate(samples(family))
    known = family_of(net)
    with torch.no_grad():
        tokens = look(net, known, inputs, known.spans(net, inputs), [reducer])
    reduced = foveate.reduce(net, inputs, reducer)
    if isinstance(reducer, Chain):
        expected = [len(chosen) for chosen in reducer.select(tokens)]
    else:
        expected = [sum(span.budget(reducer.keep)) for span in tokens.spans]
    assert [len(span) for span in reduced.selection] == expected
    if reducer.keep != 9 and "most" not in repr(reducer.keep):
        assert len(set(expected)) > 1  # it follows the image


@families
@pytest.mark.parametrize(("reducer", "positions"), [
    (REDUCERS[0], "compact"), (REDUCERS[1], "original"), (REDUCERS[4], "compact"), (REDUCERS[5], "original"),
], ids=str)  # fmt: skip
def test_generation_equals_the_oracle(family, reducer, positions):
    net, rows = model(family), samples(family)
    inputs = collate(rows)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with foveate.attach(net, reducer, positions=positions) as handle:
        out = net.generate(**inputs, **options)
        selections = handle.selections
        for i, row in enumerate(rows):
            alone = net.generate(**collate([row]), **options)
            assert [s.kept.tolist() for s in handle.selections[0]] == [s.kept.tolist() for s in selections[i]]
            assert torch.equal(alone.sequences[0, -4:], out.sequences[i, -4:])
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = answer_logits(net, inputs, selections, answer, positions)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_videos_follow_what_they_show():
    net, inputs = model("video_llava"), collate([sample(4, VISUALS["video_llava"][0], 5, seed=1)])
    budget = Budget.coverage(0.6)
    (span,) = foveate.reduce(net, inputs, FasterVLM(keep=budget)).selection
    (wider,) = foveate.reduce(net, inputs, FasterVLM(keep=Budget.coverage(0.9))).selection
    assert 0 < len(span) < len(wider) < span.length
    assert set(span.kept.tolist()) < set(wider.kept.tolist())


def test_pictures_cannot_be_shrunk_to_what_they_show():
    with pytest.raises(BudgetError, match="use a count or a ratio"):
        foveate.reduce(model("llava"), collate(samples("llava")), Downsample(keep=Budget.coverage(0.9)))


def test_an_adaptive_budget_is_a_value():
    assert Budget.coverage(0.9) == Coverage(0.9) != Budget(0.9)
    assert len({Budget.coverage(0.9), Coverage(0.9), Budget(0.9)}) == 2
