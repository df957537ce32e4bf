"""HoloV against the published algorithm, written out with lists, similarities included."""

import itertools
import math

import pytest
import torch
from greedy_cases import S16, S64, SALIENCY16, SALIENCY64, cases, cosines, crop_batch, order

from foveate.core.errors import FoveateError
from foveate.core.probes import Attention
from foveate.methods import HoloV


def chunks(n, regions):
    length, longer = divmod(n, regions)
    sizes = [length + (p < longer) for p in range(regions)]
    return [list(range(sum(sizes[:p]), sum(sizes[: p + 1]))) for p in range(regions)]


def published_scores(features, saliency, regions, alpha=0.09, eps=1e-6):
    """Return the score of each region as the official code computes it, for regions of two tokens or more."""
    scores, similarity = [], cosines(features, features)
    for chunk in chunks(len(saliency), regions):
        n = len(chunk)
        table = [[0.0 if i == j else similarity[i][j] for j in chunk] for i in chunk]
        means = [math.fsum(row) / (n - 1) for row in table]
        spread = [math.fsum((s - m) ** 2 for s in row) / (n - 1) for row, m in zip(table, means, strict=True)]
        attention = [1000 * saliency[i] for i in chunk]
        scale = (math.fsum(map(abs, attention)) / n) / (math.fsum(map(abs, spread)) / n + eps)
        scores.append(math.fsum(a + alpha * v * scale for a, v in zip(attention, spread, strict=True)) / n)
    return scores


def plain_scores(saliency, regions):
    return [math.fsum(saliency[i] for i in chunk) / len(chunk) for chunk in chunks(len(saliency), regions)]


def reference(scores, saliency, count):
    """Return the kept tokens region by region, the quotas, and the smallest gap between decisions."""
    parts = chunks(len(saliency), len(scores))
    total = math.fsum(scores)
    shares = [count * s / total if total else 0.0 for s in scores]
    quotas = [min(math.floor(s), len(p)) for s, p in zip(shares, parts, strict=True)]
    best_first = sorted(range(len(scores)), key=lambda p: -scores[p])
    while sum(quotas) < count:
        for p in best_first:
            if sum(quotas) < count and quotas[p] < len(parts[p]):
                quotas[p] += 1
    gaps = [abs(s - round(s)) for s in shares]
    gaps += [abs(shares[a] - shares[b]) for a, b in itertools.pairwise(best_first)]
    kept = [i for p, q in zip(parts, quotas, strict=True) for i in sorted(p, key=lambda i: -saliency[i])[:q]]
    return kept, quotas, min((g for g in gaps if g > 0), default=math.inf)


def pick(saliency, count, regions=16):
    return order(HoloV(keep=count, regions=regions), {Attention(): saliency}, count)


ROWS = [
    (
        S64, SALIENCY64, 16, 16, [0, 1, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 1],
        [5, 8, 10, 16, 18, 24, 27, 32, 35, 40, 43, 49, 51, 57, 59, 62],
    ),
    (
        S64, SALIENCY64, 16, 32, [1, 2, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 2],
        [2, 5, 7, 8, 10, 11, 13, 16, 18, 19, 21, 24, 26, 27, 29, 32, 33, 35, 38, 40, 41, 43, 46, 48, 49, 51, 54, 56, 57,
         59, 60, 62],
    ),
    (S16, SALIENCY16, 4, 6, [1, 2, 2, 1], [2, 5, 7, 8, 10, 13]),
    (S16, SALIENCY16, 4, 13, [3, 4, 4, 2], [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15]),
]  # fmt: skip


@pytest.mark.parametrize(("features", "saliency", "regions", "count", "quotas", "kept"), ROWS)
def test_published_picks(features, saliency, regions, count, quotas, kept):
    for scores in (published_scores(features, saliency, regions), plain_scores(saliency, regions)):
        expected, given, _ = reference(scores, saliency, count)
        assert given == quotas
        assert sorted(expected) == kept
    assert sorted(pick(saliency, count, regions)) == kept


def test_published_order_and_shares():
    scores = published_scores(S64, SALIENCY64, 16)
    shares = [16 * s / math.fsum(scores) for s in scores]
    assert shares == pytest.approx(
        [0.919, 0.979, 1.057, 0.854, 1.201, 0.757, 1.316, 0.699, 1.358, 0.702, 1.307, 0.765, 1.190, 0.862, 1.047,
         0.987], abs=6e-4,
    )  # fmt: skip
    expected, _, _ = reference(scores, SALIENCY64, 16)
    assert expected == [5, 10, 8, 16, 18, 24, 27, 35, 32, 43, 40, 51, 49, 57, 59, 62]
    assert reference(plain_scores(SALIENCY16, 4), SALIENCY16, 6)[0] == [2, 5, 7, 10, 8, 13]


def test_similarities_decide_nothing():
    generator = torch.Generator().manual_seed(3)
    for features in (S64, torch.randn(64, 8, generator=generator).tolist()):
        ratios = [
            a / (1000 * b)
            for a, b in zip(published_scores(features, SALIENCY64, 16), plain_scores(SALIENCY64, 16), strict=True)
        ]
        assert max(ratios) <= 1.09
        assert min(ratios) > 1.0899


@pytest.mark.parametrize("regions", [1, 4, 7, 16, 100])
def test_random_inputs_give_the_reference_selection(regions):
    compared = 0
    for n, count, dtype, generator in cases(80, seed=regions):
        saliency = torch.rand(n, generator=generator).to(dtype) ** (1 + n % 4)  # from even to peaked
        parts = min(regions, n)
        kept, _, gap = reference(plain_scores(saliency.tolist(), parts), saliency.tolist(), count)
        if gap < 1e-5:
            continue
        compared += 1
        assert sorted(pick(saliency, count, regions)) == sorted(kept), (n, count)
    assert compared > 60


def test_exact_ties_go_to_the_earlier_region_and_token():
    for n, count, dtype, generator in cases(60, seed=4):
        saliency = torch.randint(0, 3, (n,), generator=generator).to(dtype) * 4
        regions = max(p for p in (1, 2, 4) if n % p == 0 or p == 1)
        kept, _, _ = reference(plain_scores(saliency.tolist(), regions), saliency.tolist(), count)
        assert sorted(pick(saliency, count, regions)) == sorted(kept)


def test_a_flat_picture_is_kept_evenly():
    assert sorted(pick(torch.full((64,), 0.3), 16)) == list(range(0, 64, 4))
    assert sorted(pick(torch.zeros(64), 32)) == [i for i in range(64) if i % 4 < 2]
    # 37 tokens in 16 regions: the first five are longer; one place each, and a second one for the first four.
    starts = [3 * p if p < 5 else 15 + 2 * (p - 5) for p in range(16)]
    assert sorted(pick(torch.full((37,), 0.3), 20)) == sorted(starts + [s + 1 for s in starts[:4]])


def test_a_full_region_passes_its_places_on():
    saliency = torch.full((16,), 0.01)
    saliency[4:8] = 10.0
    # The second region of four deserves nearly all ten places; the others take turns.
    assert sorted(pick(saliency, 10, 4)) == [0, 1, 4, 5, 6, 7, 8, 9, 12, 13]


def test_regions_follow_from_the_budget_on_request():
    # 16 * 64 / (9 * 14) = 8.1: regions of eight tokens
    saliency = torch.full((64,), 0.3)
    assert sorted(pick(saliency, 14, None)) == sorted(pick(saliency, 14, 8)) != sorted(pick(saliency, 14, 16))
    assert len(pick(saliency, 63, None)) == 63


def test_what_is_no_number_comes_last():
    saliency = torch.rand(40)
    saliency[::3] = math.nan
    kept = pick(saliency, 12, 4)
    assert len(set(kept)) == 12
    assert all(i % 3 for i in kept)
    assert sorted(pick(torch.full((9,), math.nan), 3, 3)) == [0, 3, 6]


def test_batch_equals_loop_over_crops():
    saliency = torch.rand(5, 47)
    together = HoloV(keep=13).pick(crop_batch({Attention(): saliency}), 13).tolist()
    assert together == [pick(row, 13) for row in saliency]


def test_impossible_parameters_are_refused():
    with pytest.raises(FoveateError, match="regions"):
        HoloV(keep=8, regions=0)
