"""SparseVLM: the numbers of the specification, and plain loops beside the code."""

import pytest
import torch
from layer_cases import layer_tokens

from foveate.core.clustering import density_peaks, dpc_knn
from foveate.core.errors import BudgetError, FoveateError, UnsupportedModelError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.probes import LayerAttention, LayerStates
from foveate.methods import SparseVLM, SparseVLMPlus
from foveate.methods.sparsevlm import gravity, priority_scores
from foveate.registry import load_reducer

JUDGES, STATES, HEADS = LayerAttention("judges"), LayerStates(), LayerAttention("judges", over="nothing")
IMAGE = [("image", 576)]


def received(reducer, depth=32, images=IMAGE):
    """Mean number of tokens that the layers receive."""
    return sum(tokens_per_layer(reducer, depth, sum(n for _, n in images))) / depth


def at_boundary(planes, counts, **fields):
    return layer_tokens([len(x) for x in next(iter(planes.values()))], counts, planes, **fields)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.tensor(b).double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("keep", "counts", "out", "into"),
    [(192, (309, 204, 113), 192.03, 206.5), (128, (312, 117, 39), 128.6, 145.4), (96, (249, 55, 27), 96.94, 114.1),
     (64, (82, 32, 18), 64.81, 82.25)],
)  # fmt: skip
def test_official_lists(keep, counts, out, into):
    reducer = SparseVLM(keep=keep)
    assert tuple(reducer.boundaries(32)) == (3, 7, 16)
    assert reducer.counts(32, IMAGE) == counts
    assert reducer.mean(32, 576, counts) == pytest.approx(out, abs=0.05)
    assert received(reducer) == pytest.approx(into, abs=0.05)


@pytest.mark.parametrize(
    ("keep", "counts", "out", "into"),
    [(192, (300, 200, 118), 192.44, 206.75), (128, (238, 108, 60), 128.0, 144.1), (96, (246, 54, 28), 96.81, 113.9),
     (64, (66, 34, 20), 64.44, 81.8)],
)  # fmt: skip
def test_official_lists_of_plus(keep, counts, out, into):
    reducer = SparseVLMPlus(keep=keep)
    assert reducer.counts(32, IMAGE) == counts
    assert reducer.mean(32, 576, counts) == pytest.approx(out, abs=0.05)
    assert received(reducer) == pytest.approx(into, abs=0.05)


def test_the_mean_of_192_is_exact():
    assert SparseVLM(keep=192).mean(32, 576, (309, 204, 113)) == 6145 / 32 == 192.03125


def test_recycled_numbers():
    reducer = SparseVLM(keep=192)
    assert [reducer._clustered(n) for n in (276, 109, 94)] == [83, 33, 29]
    assert [reducer.recycled(n) for n in (276, 109, 94)] == [9, 4, 3]
    assert [reducer.recycled(n) for n in (0, 1, 2)] == [0, 1, 1]


def test_lists_scale_with_the_number_of_tokens():
    assert SparseVLMPlus(keep=1 / 3).counts(32, [("image", 1152)]) == (600, 400, 236)
    assert SparseVLMPlus(keep=192).counts(32, IMAGE * 2) == (600, 400, 236)
    assert SparseVLM(keep=1 / 9).counts(32, [("image", 288)])[0] == 33 + SparseVLM(keep=1).recycled(288 - 33)


@pytest.mark.parametrize("method", [SparseVLM, SparseVLMPlus])
@pytest.mark.parametrize("depth", [4, 24, 28, 32, 40])
@pytest.mark.parametrize("keep", [66, 96, 160, 250, 400, 575])
def test_other_budgets_and_depths_meet_the_mean(method, depth, keep):
    reducer = method(keep=keep)
    counts = reducer.counts(depth, IMAGE)
    assert sorted(counts, reverse=True) == list(counts)
    listed = depth == 32 and keep in reducer.lists
    assert reducer.mean(depth, 576, counts) == pytest.approx(keep, abs=1.0 if listed else 0.8)
    assert len(reducer.boundaries(depth)) == 3


@pytest.mark.parametrize("method", [SparseVLM, SparseVLMPlus])
@pytest.mark.parametrize("depth", [4, 28, 32])
@pytest.mark.parametrize("equivalent", [150, 192, 0.5])
def test_equivalent_tokens_are_what_layers_receive(method, depth, equivalent):
    reducer = method(equivalent=equivalent)
    wanted = equivalent if isinstance(equivalent, int) else 288
    if depth == 4 and equivalent == 150:
        with pytest.raises(BudgetError, match="no less than"):
            method(equivalent=100).counts(depth, IMAGE)
    assert received(reducer, depth) == pytest.approx(wanted, abs=0.8)


def test_without_recycling_the_mean_is_met_all_the_same():
    reducer = SparseVLM(keep=64, recycle=0.0)
    counts = reducer.counts(32, IMAGE)
    assert counts != SparseVLM.lists[64]
    assert reducer.mean(32, 576, counts) == pytest.approx(64, abs=0.5)


@pytest.mark.parametrize("method", [SparseVLM, SparseVLMPlus])
def test_budgets_that_cannot_be_met(method):
    with pytest.raises(BudgetError, match="no less than"):
        method(keep=20).counts(32, IMAGE)
    assert method(keep=600).counts(32, IMAGE) == (576, 576, 576)
    with pytest.raises(UnsupportedModelError, match="three layers"):
        method(keep=64).boundaries(3)


def test_a_budget_is_needed():
    with pytest.raises(FoveateError, match="needs a budget"):
        SparseVLM()


def test_recycle_is_a_share():
    with pytest.raises(FoveateError, match="from 0 to 1"):
        SparseVLM(keep=64, recycle=1.5)


def test_versions_by_name():
    assert load_reducer("sparsevlm", keep=64) == SparseVLM(keep=64)
    assert load_reducer("sparsevlm+", keep=64) == SparseVLMPlus(keep=64)
    assert (SparseVLM.positions, SparseVLMPlus.positions) == ("compact", "original")


def test_raters():
    visual = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    text = torch.tensor([[2.0, 0], [0, 0], [0, 1], [-1, -1]])
    relevance = (visual @ text.T).softmax(dim=1).mean(dim=0)
    close(relevance, [0.537053, 0.129350, 0.292907, 0.040691])
    for reducer in (SparseVLM(keep=64), SparseVLMPlus(keep=64)):
        assert reducer.judges(visual, text).tolist() == [True, False, True, False]
        assert reducer.judges(visual, torch.zeros(3, 2)).tolist() == [True] * 3  # no one stands out: all
        assert reducer.judges(visual, text[:1]).tolist() == [True]
        # Large norms, as those of tokens of templates, overflow half precision only.
        assert reducer.judges((visual * 300).half(), (text * 300).half()).tolist() == [True, False, True, False]


SEEN = torch.tensor([
    [0.10, 0.05, 0.02, 0.20, 0.03, 0.01], [0.01, 0.01, 0.30, 0.01, 0.01, 0.01],
    [0.04, 0.06, 0.05, 0.02, 0.08, 0.02], [0.02, 0.02, 0.20, 0.02, 0.02, 0.02],
])  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "scores", "kept"),
    [((0, 2), [0.07, 0.055, 0.035, 0.11, 0.055, 0.015], [0, 3]),
     ((0, 1, 2, 3), [0.0425, 0.035, 0.1425, 0.0625, 0.035, 0.015], [2, 3])],
)  # fmt: skip
def test_scores(rows, scores, kept):
    found = SEEN[list(rows)].mean(dim=0)
    close(found, scores)
    chosen = SparseVLM(keep=2, recycle=0.0).select(at_boundary({JUDGES: [found], STATES: [torch.eye(6)]}, [2]))
    assert chosen[0].kept.tolist() == kept
    torch.testing.assert_close(chosen[0].apply(torch.eye(6)), torch.eye(6)[kept])


def test_recycling_merges_the_best_of_the_dropped():
    scores, states = SEEN[[0, 2]].mean(dim=0), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    chosen = SparseVLM(keep=2).select(at_boundary({JUDGES: [scores], STATES: [states]}, [3]))[0]
    chosen.check()
    # Kept in order, the cluster last.
    torch.testing.assert_close(chosen.apply(states), torch.stack([states[0], states[3], states[[1, 4]].mean(dim=0)]))
    assert chosen.kept.tolist() == [0, 3, 5]


def test_clusters_lie_behind_all_that_is_kept():
    size, count = 40, 12
    generator = torch.Generator().manual_seed(1)
    states, scores = torch.randn(size, 8, generator=generator), torch.arange(float(size))
    reducer = SparseVLM(keep=8)
    chosen = reducer.select(at_boundary({JUDGES: [scores], STATES: [states]}, [count]))[0]
    kept = next(k for k in range(count, 0, -1) if k + reducer.recycled(size - k) <= count)
    again, clusters = int(0.3 * (size - kept)) + 1, count - kept
    assert (kept, clusters) == (11, 1)
    best = torch.arange(size - kept, size)
    merged = states[size - kept - again : size - kept].mean(dim=0, keepdim=True)
    torch.testing.assert_close(chosen.apply(states), torch.cat([states[best], merged]))


def test_several_clusters_and_prompts_equal_the_plain_way():
    generator, reducer, size, kept = torch.Generator().manual_seed(2), SparseVLM(keep=64), 200, 71
    states = [torch.randn(size, 6, generator=generator) for _ in range(3)]
    scores = [torch.rand(size, generator=generator) for _ in range(3)]
    count = kept + reducer.recycled(size - kept)
    chosen = reducer.select(at_boundary({JUDGES: scores, STATES: states}, [count] * 3))
    for picked, x, score in zip(chosen, states, scores, strict=True):
        order = score.argsort(descending=True).tolist()
        again = sorted(order[kept : kept + int(0.3 * (size - kept)) + 1])
        clusters = plain_clusters(x[again].double(), len(again) // 10 + 1)
        expected = [x[sorted(order[:kept])], *(x[[again[i] for i in c]].mean(dim=0, keepdim=True) for c in clusters)]
        torch.testing.assert_close(picked.apply(x), torch.cat(expected))
    again = reducer.select(at_boundary({JUDGES: scores, STATES: states}, [count] * 3))
    assert chosen.to_dict() == again.to_dict()


def plain_clusters(points, number):
    distance = [[float((a - b).norm()) / points.shape[1] ** 0.5 for b in points] for a in points]
    density = [-sum(d * d for d in sorted(row)[:number]) / number for row in distance]
    rank = sorted(range(len(points)), key=lambda i: (-density[i], i))
    gap = {i: min((distance[i][j] for j in rank[:place]), default=max(map(max, distance)))
           for place, i in enumerate(rank)}  # fmt: skip
    score = {i: float(torch.tensor(density[i]).exp()) * gap[i] for i in range(len(points))}
    centres = sorted(range(len(points)), key=lambda i: -score[i])[:number]
    members = [[] for _ in centres]
    for i in range(len(points)):
        own = centres.index(i) if i in centres else min(range(number), key=lambda c: distance[i][centres[c]])
        members[own].append(i)
    return members


POINTS = torch.tensor([[0.0, 0], [1, 0], [0, 2], [10, 0], [10, 1], [13, 0], [4, 0.5]])


def test_density_peaks():
    density, gap = density_peaks(POINTS, 2, itself=True)
    close(density, [0.434598, 0.367879, 0.223130, 0.188876, 0.159880, 0.042144, 0.014264])
    close(gap, [9.300538, 0.707107, 1.414214, 6.363961, 0.707107, 2.121320, 2.150581])
    close(density * gap, [4.041997, 0.260130, 0.315554, 1.201997, 0.113052, 0.089401, 0.030676])
    labels, centres = dpc_knn(POINTS, 3, 2, itself=True)
    assert centres.tolist() == [0, 3, 2]
    assert labels.tolist() == [0, 0, 2, 1, 1, 1, 0]
    close(
        torch.stack([POINTS[labels == c].mean(dim=0) for c in range(3)]), [[1.6667, 0.1667], [11, 0.3333], [0, 2]], 1e-4
    )


def test_of_equal_densities_the_first_is_the_highest():
    density, gap = density_peaks(POINTS, 1, itself=True)
    close(density[[0, 1, 3, 4]], [0.778801] * 4)
    _, centres = dpc_knn(POINTS, 2, 1, itself=True)
    assert centres.tolist() == [0, 3]  # not two neighbours
    assert gap[1] == gap[4] == pytest.approx(0.707107)


def test_gravity():
    frequencies = torch.tensor([1.0, 0.01])
    close(gravity(torch.tensor([6]), torch.arange(6, -1, -1), frequencies)[:, 0],
          [2, 1.540252, 0.583653, 0.009558, 0.345556, 1.282412, 1.958371])  # fmt: skip
    attention = torch.tensor([0.08, 0.06, 0.09, 0.10])[:, None, None]
    pull = gravity(torch.tensor([6]), torch.arange(1, 5), frequencies)
    close(priority_scores(attention, torch.tensor([True]), pull), [0.062382, 0.173633, 9.416652, 0.171335], 2e-3)
    close(attention[:, 0].double() / pull, [[0.062382], [0.173633], [9.416652], [0.171335]])
    tokens = at_boundary({HEADS: [attention]}, [2], rows=(torch.tensor([6]),), places=(torch.arange(1, 5),),
                          judging=(torch.tensor([True]),), frequencies=frequencies)  # fmt: skip
    assert SparseVLMPlus(keep=2).select(tokens)[0].kept.tolist() == [1, 2]  # at 2 and 3; without gravity at 3 and 4


def test_gravity_is_bounded_where_it_changes_its_sign():
    frequencies = 10000.0 ** -(torch.arange(64) / 64)
    places = torch.tensor([0, 100, 600, 1000, 1706, 1707, 2000])
    values = gravity(torch.zeros(1, dtype=torch.long), places, frequencies)[:, 0]
    close(values[[0, 1, 2, 3, 6]], [11.31, 5.40, 2.35, 1.80, 0.33], 0.01)
    assert values[4] > 0 >= values[5]
    far = torch.arange(5000, 5004)
    attention = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
    tokens = at_boundary({HEADS: [attention]}, [2], rows=(torch.tensor([12202]),), places=(far,),
                          judging=(torch.tensor([True]),), frequencies=frequencies)  # fmt: skip
    assert (gravity(torch.tensor([12202]), far, frequencies) < 0).all()
    assert SparseVLMPlus(keep=2).select(tokens)[0].kept.tolist() == [2, 3]


def test_priority_heads():
    heads = torch.tensor([
        [[0.1, 0.2, 0.1], [0.1, 0.1, 0.1]], [[0.3, 0.05, 0.1], [0.2, 0.05, 0.2]],
        [[0.05, 0.05, 0.05], [0.1, 0.0, 0.1]], [[0.1, 0.3, 0.2], [0.05, 0.1, 0.1]],
    ])  # fmt: skip
    close(heads.sum(dim=(1, 2)), [0.7, 0.9, 0.35, 0.85])
    close(heads.mean(dim=(0, 1)), [0.125, 0.10625, 0.11875])
    attention, all_rows = heads.permute(2, 0, 1), torch.tensor([True, True])
    close(priority_scores(attention, all_rows, torch.ones(3, 2)), [0.1625, 0.125, 0.15])
    # A row that does not rate changes nothing.
    more = torch.cat([attention, 5 * torch.ones(3, 4, 1)], dim=2)
    close(priority_scores(more, torch.tensor([True, True, False]), torch.ones(3, 3)), [0.1625, 0.125, 0.15])
