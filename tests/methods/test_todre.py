"""Stage 1 of ToDRE against the plain loop in float64."""

import math

import pytest
import torch
from greedy_cases import agreement, cases, choose, cosines, crop_batch, exact_features, order

from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Embeddings
from foveate.methods import ToDRE

TOY = [(1, 0), (0.9, 0.1), (0, 1), (-1, 0.2), (0.7, 0.7), (-0.6, -0.8)]


def reference(features, saliency, count, criterion="max_sum"):
    """Return the picks, the closeness of every token to the earlier ones at each pick, and by how much it was ahead."""
    similarity = cosines(features, features)
    join = math.fsum if criterion == "max_sum" else max
    pivot, gap = choose(dict(enumerate(saliency)))
    picks, trace, gaps = [pivot], [], [gap]
    while len(picks) < count:
        closeness = {i: join(similarity[i][j] for j in picks) for i in range(len(features)) if i not in picks}
        pick, gap = choose({i: -c for i, c in closeness.items()})
        picks.append(pick)
        trace.append(closeness)
        gaps.append(gap)
    return picks, trace, gaps


def pick(features, saliency, count, criterion="max_sum"):
    planes = {Embeddings(): features, Attention(): saliency}
    return order(ToDRE(keep=count, criterion=criterion), planes, count)


def test_toy():
    saliency, features = [1.0, 0, 0, 0, 0, 0], torch.tensor(TOY)
    picks, trace, _ = reference(TOY, saliency, 4)
    assert picks == pick(features, saliency, 4) == [0, 3, 5, 4]
    assert trace == [
        pytest.approx({1: 0.993884, 2: 0.0, 3: -0.980581, 4: 0.707107, 5: -0.6}, abs=1e-6),
        pytest.approx({1: 0.040958, 2: 0.196116, 4: 0.152407, 5: -0.168545}, abs=1e-6),
        pytest.approx({1: -0.643718, 2: -0.603884, 4: -0.837543}, abs=1e-6),
    ]
    picks, _, _ = reference(TOY, saliency, 4, "k_center")
    assert picks == pick(features, saliency, 4, "k_center") == [0, 3, 2, 5]


@pytest.mark.parametrize("criterion", ["max_sum", "k_center"])
def test_random_inputs_give_the_reference_picks(criterion):
    shares = []
    for n, count, dtype, generator in cases(60, seed=9):
        features = torch.randn(n, 6, generator=generator).to(dtype)
        saliency = torch.rand(n, generator=generator).to(dtype)
        expected, _, gaps = reference(features.tolist(), saliency.tolist(), count, criterion)
        shares.append(agreement(pick(features, saliency, count, criterion), expected, gaps))
    assert sum(shares) / len(shares) > 0.9


@pytest.mark.parametrize("criterion", ["max_sum", "k_center"])
def test_exact_ties_go_to_the_earlier_token(criterion):
    for n, count, dtype, generator in cases(60, seed=10):
        features, saliency = exact_features(n, generator), torch.randint(0, 3, (n,), generator=generator) / 4
        expected, _, gaps = reference(features.tolist(), saliency.tolist(), count, criterion)
        assert agreement(pick(features.to(dtype), saliency.to(dtype), count, criterion), expected, gaps) == 1


@pytest.mark.parametrize("criterion", ["max_sum", "k_center"])
def test_matrix_path_equals_products_on_demand(criterion):
    generator = torch.Generator().manual_seed(11)
    features, saliency = torch.randn(60, 16, generator=generator), torch.rand(60, generator=generator)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    picks = [int(saliency.argmax())]
    closeness = unit @ unit[picks[0]]
    for _ in range(19):
        closeness[picks] = torch.inf
        picks.append(int(closeness.argmin()))
        row = unit @ unit[picks[-1]]
        closeness = closeness + row if criterion == "max_sum" else torch.maximum(closeness, row)
    assert pick(features, saliency, 20, criterion) == picks


@pytest.mark.parametrize("criterion", ["max_sum", "k_center"])
def test_position_of_a_token_does_not_matter(criterion):
    generator = torch.Generator().manual_seed(12)
    features, saliency = torch.randn(40, 8, generator=generator), torch.rand(40, generator=generator)
    shuffled = torch.randperm(40, generator=generator)
    there = pick(features[shuffled], saliency[shuffled], 12, criterion)
    assert [int(shuffled[i]) for i in there] == pick(features, saliency, 12, criterion)


def test_max_sum_takes_copies_at_the_far_end_and_k_center_does_not():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    saliency = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert pick(features, saliency, 2) == [0, 1]
    assert pick(features, saliency, 3) == [0, 1, 2]  # all sums are zero now: the lower index
    assert pick(features, saliency, 3, "k_center") == [0, 1, 3]


@pytest.mark.parametrize("criterion", ["max_sum", "k_center"])
def test_edges(criterion):
    features, saliency = torch.zeros(6, 4), torch.full((6,), math.nan)
    assert pick(features, saliency, 5, criterion) == [0, 1, 2, 3, 4]
    saliency = torch.tensor([0.1, math.nan, 0.3, 0.2, 0.3, 0.0])
    assert pick(torch.eye(6), saliency, 1, criterion) == [2]


def test_batch_equals_loop_over_crops():
    features, saliency = torch.randn(5, 33, 6), torch.rand(5, 33)
    together = ToDRE(keep=9).pick(crop_batch({Embeddings(): features, Attention(): saliency}), 9).tolist()
    assert together == [pick(f, a, 9) for f, a in zip(features, saliency, strict=True)]


def test_the_question_does_not_matter():
    assert not ToDRE(keep=8).query_aware
    assert ToDRE(keep=8).needs == (Embeddings(), Attention())


def test_unknown_criteria_are_refused():
    with pytest.raises(FoveateError, match="criterion"):
        ToDRE(keep=8, criterion="max_min")
