"""What every method owes its callers, over one table of methods."""

from dataclasses import replace

import pytest
import torch

from foveate import Budget, Chain, VisPruner
from foveate.core.errors import InputError
from foveate.core.grids import cells
from foveate.core.probes import ClsSimilarity, LayerProbe, Members
from foveate.methods import Downsample, FasterVLM, Pool, Random, Uniform
from tiny import FEATURES, METHODS, make, method_id, visual_tokens

GRIDS = [(8, 8), (5, 7), (8, 1), (1, 6)]
LAYOUT = [(0, [(8, 8)]), (0, [(6, 8), (8, 8), (8, 3)]), (1, [(8, 8)]), (2, [(6, 8), (6, 8)])]
ONE_EACH = [(0, [(8, 8)]), (1, [(6, 8), (8, 8), (8, 3)]), (2, [(8, 8)]), (3, [(6, 8), (6, 8)])]

every_method = pytest.mark.parametrize("entry", METHODS, ids=method_id)
per_token = pytest.mark.parametrize("entry", [m for m in METHODS if m[0] != "downsample"], ids=method_id)
JOINT = (
    "random", "fastervlm", "vispruner", "vtc_cls", "holov", "mmr", "todre", "prunesid", "agilepruner", "fsr",
    "divprune", "cdpruner", "scope", "mmtok", "tops", "dart", "gprune", "codebook", "text_interaction_image",
)  # fmt: skip
"""Methods that know no grid."""
WITHOUT_PLACES = (
    "fastervlm", "vispruner", "vtc_cls", "mmr", "todre", "agilepruner", "fsr", "divprune", "cdpruner", "scope",
    "mmtok", "tops", "dart", "gprune", "codebook", "text_interaction_image",
)  # fmt: skip
"""Methods that choose the same tokens wherever these are: ties apart, which random values do not have."""


def lists(selection):
    return [span.kept.tolist() for span in selection]


@every_method
@pytest.mark.parametrize(
    ("keep", "grid"),
    [(1, (8, 8)), (17, (8, 8)), (3, (5, 7)), (0.9, (5, 7)), (0.25, (8, 1)), (3, (1, 6))],
    ids=str,
)
def test_count_is_exact_and_indices_ascend(entry, keep, grid):
    reducer = make(entry, keep)
    tokens = visual_tokens(reducer, [(0, [grid])])
    (span,) = reducer.select(tokens)
    span.check()
    wanted = Budget(keep).count(grid[0] * grid[1])
    if entry[0] == "downsample":
        assert 1 <= len(span) <= wanted
    else:
        assert len(span) == wanted
    assert span.kept.max() < grid[0] * grid[1]  # never the separator
    assert (span.length, span.sample, span.kind) == (grid[0] * grid[1] + 1, 0, "image")


@every_method
@pytest.mark.parametrize("keep", [64, 1000, 1.0])
def test_a_budget_that_covers_everything_changes_nothing(entry, keep):
    reducer = make(entry, keep)
    tokens = visual_tokens(reducer, [(0, [(8, 8)])])
    assert reducer.keeps_all(tokens.spans)
    (span,) = reducer.select(tokens)
    assert span.kept.tolist() == list(range(64))
    x = torch.randn(65, 4)
    assert torch.equal(span.apply(x), x[:64])
    assert not make(entry, 63).keeps_all(tokens.spans)


@every_method
@pytest.mark.parametrize("keep", [11, 0.5, Budget(5, per="crop")], ids=str)
def test_batch_equals_each_prompt_alone(entry, keep):
    reducer = make(entry, keep)
    together = reducer.select(visual_tokens(reducer, ONE_EACH))
    assert [span.sample for span in together] == [0, 1, 2, 3]
    for i, span in enumerate(together):
        (alone,) = reducer.select(visual_tokens(reducer, ONE_EACH, only=i))
        assert span.kept.tolist() == alone.kept.tolist()
        assert (span.merge is None) == (alone.merge is None)
        if span.merge is not None:
            x = torch.randn(span.length + span.extra, 3)
            assert torch.equal(span.apply(x), alone.apply(x))


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_its_values_in_single(entry, dtype):
    reducer = make(entry, 13)
    half = visual_tokens(reducer, LAYOUT, dtype=dtype)
    single = visual_tokens(reducer, LAYOUT, dtype=dtype)
    for plane in single.planes.values():
        plane[:] = [x.float() if x.is_floating_point() else x for x in plane]
    assert lists(reducer.select(half)) == lists(reducer.select(single))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@every_method
def test_gpu_equals_cpu(entry):
    reducer = make(entry, 13)
    tokens = visual_tokens(reducer, LAYOUT)
    expected = lists(reducer.select(tokens))
    planes = {probe: [x.cuda() for x in plane] for probe, plane in tokens.planes.items()}
    queries = tokens.queries and tuple(x.cuda() for x in tokens.queries)
    moved = replace(tokens, planes=planes, queries=queries, device=torch.device("cuda"))
    assert lists(reducer.select(moved)) == expected


def changed(tokens, change, probes=(FEATURES, LayerProbe, ClsSimilarity)):
    """Return tokens whose probes of some kinds are changed."""
    planes = {
        probe: [change(x) if isinstance(probe, probes) and not isinstance(probe, Members) else x for x in plane]
        for probe, plane in tokens.planes.items()
    }
    return replace(tokens, planes=planes)


@every_method
@pytest.mark.parametrize(
    ("value", "keep"), [(0.0, 1), (0.0, 63), (0.7, 13), (float("nan"), 13), (float("inf"), 13)], ids=str
)
def test_equal_and_impossible_values_break_nothing(entry, value, keep):
    reducer = make(entry, keep)
    tokens = changed(visual_tokens(reducer, LAYOUT[:1]), lambda x: torch.full_like(x, value))
    (first,), (second,) = reducer.select(tokens), reducer.select(tokens)
    first.check()
    assert len(first) == keep or entry[0] == "downsample"
    assert torch.equal(first.kept, second.kept)


# PruneSID takes sigmoids of the features, as its paper does.
@pytest.mark.parametrize("entry", [m for m in METHODS if m[0] != "prunesid"], ids=method_id)
@pytest.mark.parametrize("scale", [2**-6, 4.0])
def test_scale_of_features_does_not_matter(entry, scale):
    reducer = make(entry, 13)
    tokens = visual_tokens(reducer, LAYOUT)
    scaled = changed(tokens, lambda x: x * scale, FEATURES)
    assert lists(reducer.select(scaled)) == lists(reducer.select(tokens))


@pytest.mark.parametrize("entry", [m for m in METHODS if m[0] in WITHOUT_PLACES], ids=method_id)
def test_places_of_tokens_do_not_matter(entry):
    reducer = make(entry, 13)
    for seed in range(5):
        tokens = visual_tokens(reducer, LAYOUT[:1], seed=seed)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        (chosen,) = reducer.select(tokens)
        (shuffled,) = reducer.select(changed(tokens, lambda x, order=order: x[order]))
        assert sorted(order[shuffled.kept].tolist()) == chosen.kept.tolist()


@every_method
def test_selection_repeats(entry):
    reducer = make(entry, 13)
    assert lists(reducer.select(visual_tokens(reducer, LAYOUT))) == lists(
        reducer.select(visual_tokens(reducer, LAYOUT))
    )


@per_token
@pytest.mark.parametrize(
    ("keep", "per_crop"),
    [
        (Budget(6, per="crop"), [6, 6, 6]),
        (Budget(0.25, per="crop"), [12, 16, 6]),
        (Budget(17), [6, 8, 3]),
        (Budget(0.5), [24, 32, 12]),
    ],
    ids=str,
)
def test_crops_share_the_budget(entry, keep, per_crop):
    reducer = make(entry, keep)
    tokens = visual_tokens(reducer, [(0, [(6, 8), (8, 8), (8, 3)])])
    (chosen,) = reducer.select(tokens)
    kept = set(chosen.kept.tolist())
    assert [len(kept & set(crop.index.tolist())) for crop in tokens.spans[0].crops] == per_crop


@pytest.mark.parametrize("entry", [m for m in METHODS if m[0] in JOINT], ids=method_id)
def test_joint_budget_lets_crops_compete(entry):
    reducer = make(entry, Budget(20, per="joint"))
    tokens = visual_tokens(reducer, [(0, [(6, 8), (8, 8)])])
    (chosen,) = reducer.select(tokens)
    assert len(chosen) == 20
    # The same values as one crop of 112 tokens.
    flat = visual_tokens(reducer, [(0, [(14, 8)])])
    for probe, plane in flat.planes.items():
        plane[:] = [torch.cat(tokens.planes[probe])]
    (whole,) = reducer.select(flat)
    candidates = torch.cat([crop.index for crop in tokens.spans[0].crops])
    assert chosen.kept.tolist() == candidates[whole.kept].tolist()


@every_method
def test_methods_say_whether_they_read_the_grid(entry):
    reducer = make(entry, 13)
    tokens = visual_tokens(reducer, [(0, [(8, 8)])])
    (span,) = tokens.spans
    tokens = replace(tokens, spans=(replace(span, crops=(replace(span.crops[0], grid=None),)),))
    if reducer.reads_grid:
        with pytest.raises(InputError, match="a model whose family knows"):
            reducer.select(tokens)
    else:
        assert len(reducer.select(tokens)[0]) == 13


@pytest.mark.parametrize("reducer", [Uniform(keep=Budget(8, per="joint")), Pool(keep=Budget(8, per="joint"))], ids=str)
def test_grid_methods_refuse_joint_budgets_over_crops(reducer):
    with pytest.raises(InputError, match="per 'image' or per 'crop'"):
        reducer.select(visual_tokens(reducer, [(0, [(6, 8), (8, 8)])]))


def test_downsample_refuses_joint_budgets():
    reducer = Downsample(keep=Budget(8, per="joint"))
    with pytest.raises(InputError, match="per 'image' or per 'crop'"):
        reducer.select(visual_tokens(reducer, [(0, [(6, 8), (8, 8)])]))


@every_method
def test_one_budget_per_image(entry):
    reducer = make(entry, [5, 1.0])
    tokens = visual_tokens(reducer, [(0, [(8, 8)]), (0, [(6, 8)])])
    first, second = reducer.select(tokens)
    assert len(first) <= 5
    assert second.kept.tolist() == list(range(48))
    assert second.merge is None
    assert not reducer.keeps_all(tokens.spans)


def test_random_depends_on_the_seed_and_on_nothing_else():
    def draw(seed, layout, only=None):
        reducer = Random(keep=9, seed=seed)
        return lists(reducer.select(visual_tokens(reducer, layout, seed=seed, only=only)))

    assert draw(0, ONE_EACH) == draw(0, ONE_EACH)
    assert draw(0, ONE_EACH) != draw(1, ONE_EACH)
    first, second = draw(0, [(0, [(8, 8)]), (0, [(8, 8)])])
    assert first != second  # two images of one prompt
    assert draw(0, [(0, [(8, 8)]), (1, [(8, 8)])]) == [first, first]  # two prompts


def test_random_is_fair():
    counts = torch.zeros(16)
    for seed in range(600):
        reducer = Random(keep=4, seed=seed)
        (span,) = reducer.select(visual_tokens(reducer, [(0, [(4, 4)])]))
        counts[span.kept] += 1
    # 150 expected, standard deviation 10.6.
    assert counts.min() > 100
    assert counts.max() < 200


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (5, 7), (8, 1), (16, 1), (1, 9), (3, 20), (20, 3)], ids=str)
def test_cells_cover_the_grid_around_their_centres(grid):
    h, w = grid
    for count in range(1, h * w + 1):
        parts = cells(grid, count)
        middles = [cell.middle for cell in parts]
        assert len(parts) == len(set(middles)) == count
        assert middles == sorted(middles)
        assert {(r, c) for cell in parts for r in cell.rows for c in cell.columns} == {
            (r, c) for r in range(h) for c in range(w)
        }
        for cell in parts:
            assert cell.middle // w in cell.rows
            assert cell.middle % w in cell.columns


def test_uniform_takes_one_token_per_block():
    reducer = Uniform(keep=16)
    (span,) = reducer.select(visual_tokens(reducer, [(0, [(8, 8)])]))
    blocks = {(int(i) // 8 // 2, int(i) % 8 // 2) for i in span.kept}
    assert len(blocks) == 16


@pytest.mark.parametrize("keep", [4, 13, 29, 64, 150])
def test_uniform_leaves_no_hole(keep):
    reducer = Uniform(keep=keep)
    (span,) = reducer.select(visual_tokens(reducer, [(0, [(24, 24)])]))
    kept = torch.stack([span.kept // 24, span.kept % 24], dim=1).double()
    every = torch.cartesian_prod(torch.arange(24), torch.arange(24)).double()
    furthest = torch.cdist(every, kept, p=float("inf")).amin(dim=1).max()
    assert furthest <= 24 / keep**0.5


@pytest.mark.parametrize(("grid", "count", "shape"), [((8, 8), 16, (4, 4)), ((8, 8), 4, (2, 2)), ((6, 4), 6, (3, 2))])
def test_pool_is_adaptive_average_pooling(grid, count, shape):
    reducer = Pool(keep=count)
    (span,) = reducer.select(visual_tokens(reducer, [(0, [grid])]))
    x = torch.randn(grid[0] * grid[1] + 1, 5)
    picture = x[:-1].T.reshape(1, 5, *grid)
    expected = torch.nn.functional.adaptive_avg_pool2d(picture, shape).flatten(2)[0].T
    torch.testing.assert_close(span.apply(x), expected)


@pytest.mark.parametrize("keep", [1, 5, 12, 40])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pool_weights_sum_to_one(grid, keep):
    reducer = Pool(keep=min(keep, grid[0] * grid[1] - 1))
    (span,) = reducer.select(visual_tokens(reducer, [(0, [grid])]))
    ones = torch.ones(span.length, 1)
    torch.testing.assert_close(span.apply(ones), ones[: len(span)])
    assert set(span.merge.source.tolist()) == set(range(grid[0] * grid[1]))  # every token counts


@pytest.mark.parametrize(("grid", "count"), [((8, 8), 32), ((24, 24), 32), ((6, 8), 11), ((8, 2), 5), ((24, 24), 575)])
def test_downsample_keeps_the_shape(grid, count):
    reducer = Downsample(keep=count)
    tokens = visual_tokens(reducer, [(0, [grid])])
    ((size, anchors),) = reducer.plan(tokens.spans[0])
    assert size[0] * size[1] == len(anchors) == len(set(anchors.tolist())) <= count
    # No grid of a similar shape has more tokens.
    best = max(h * w for h in range(1, grid[0] + 1) for w in range(1, grid[1] + 1)
               if h * w <= count and 1 / 1.5 <= h * grid[1] / (w * grid[0]) <= 1.5)  # fmt: skip
    assert size[0] * size[1] == best


def test_chain_selects_among_what_is_left():
    chain = Chain(Uniform(keep=0.5), VisPruner(keep=8))
    tokens = visual_tokens(chain, ONE_EACH)
    first, both = Uniform(keep=0.5).select(tokens), chain.select(tokens)
    for a, b in zip(first, both, strict=True):
        assert len(b) == 8
        assert set(b.kept.tolist()) < set(a.kept.tolist())
    # The second method sees the values of the survivors, and nothing else.
    flat = visual_tokens(chain, [(0, [(1, 32)])])
    for probe, plane in flat.planes.items():
        plane[:] = [tokens.planes[probe][0][first[0].kept]]
    (inner,) = VisPruner(keep=8).select(flat)
    assert both[0].kept.tolist() == first[0].kept[inner.kept].tolist()


def test_chain_of_a_thinned_grid_and_a_grid_method():
    chain = Chain(FasterVLM(keep=30), Uniform(keep=8))
    with pytest.raises(InputError, match="uniform"):
        chain.select(visual_tokens(chain, [(0, [(8, 8)])]))
    covered = Chain(FasterVLM(keep=30), Pool(keep=40))
    (span,) = covered.select(visual_tokens(covered, [(0, [(8, 8)])]))
    assert len(span) == 30


def test_fastervlm_keeps_the_highest():
    reducer = FasterVLM(keep=10)
    tokens = visual_tokens(reducer, LAYOUT[:1])
    (span,) = reducer.select(tokens)
    values = tokens.probe(reducer.needs[0])[0]
    assert values[span.kept].min() > values[[i for i in range(64) if i not in span.kept]].max()
