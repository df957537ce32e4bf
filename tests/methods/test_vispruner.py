"""VisPruner against the published loop, written out in float64 with lists."""

import itertools
import math

import pytest
import torch

from foveate import VisPruner
from foveate.core.crops import CropBatch
from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Features
from foveate.methods import FasterVLM

NEAR_COPY = 1e-6  # float32 decides as float64 does if scores lie further apart than this


def cosine(x, y):
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    norm = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
    return dot / norm if norm else 0.0


def reference(features, saliency, count, ratio=0.5, step=8, order="similarity"):
    """Return the kept indices, what each round dropped, and the smallest gap between two different scores."""
    rank = sorted(range(len(saliency)), key=lambda i: -saliency[i])
    important = int(count * ratio)
    kept, rest = rank[:important], rank[important:]
    rounds, gap = [], math.inf
    if important == count:
        return sorted(kept), rounds, gap
    while len(rest) > count - important:
        even, odd = rest[0::2], rest[1::2]
        scores = {a: max(cosine(features[a], features[b]) for b in odd) for a in even}
        by_score = sorted(even, key=lambda a: -scores[a])
        for a, b in itertools.pairwise(by_score):
            if scores[a] != scores[b]:
                gap = min(gap, scores[a] - scores[b])
        drop = min(len(rest) - (count - important), len(even), step or len(even))
        dropped, survivors = by_score[:drop], by_score[drop:]
        rounds.append(dropped)
        rest = survivors + odd if order == "similarity" else [i for i in rest if i not in dropped]
    return sorted(kept + rest), rounds, gap


def spatial_variant(features, saliency, count, ratio=0.5, step=8):
    """Return what a common wrong variant keeps: it lists the residual tokens by position before every round."""
    rank = sorted(range(len(saliency)), key=lambda i: -saliency[i])
    important = round(count * ratio)
    kept, rest = rank[:important], sorted(rank[important:])
    while len(rest) > count - important:
        even, odd = rest[0::2], rest[1::2]
        scores = {a: max(cosine(features[a], features[b]) for b in odd) for a in even}
        drop = min(step, len(rest) - (count - important), len(rest) // 2)
        dropped = sorted(even, key=lambda a: -scores[a])[:drop]
        rest = [i for i in rest if i not in dropped]
    return sorted(kept + rest)


def pick(reducer, features, saliency, count):
    """Run the method on stacked crops ``[B, N, C]`` and ``[B, N]``; return a sorted list per crop."""
    batch, size = saliency.shape
    crops = CropBatch(
        None, tuple(range(batch)), size, features.device, {Features(): features, Attention(): saliency}
    )  # fmt: skip
    return reducer.pick(crops, count)


def kept_of(reducer, features, saliency, count):
    features, saliency = torch.as_tensor(features)[None], torch.as_tensor(saliency)[None]
    return sorted(pick(reducer, features, saliency, count)[0].tolist())


def wave(n, c, s, p):
    return [[math.sin(s * (i + 1) * (j + 1)) + 0.3 * math.cos(p * (i + 1) + (j + 1)) for j in range(c)]
            for i in range(n)]  # fmt: skip


def wave_saliency(n):
    total = [0.0] * n
    for h in range(4):
        row = [math.exp(2 * math.sin(2.3 * j + 0.5 * h)) for j in range(n + 1)]
        for i in range(n):
            total[i] += row[i + 1] / math.fsum(row) / 4
    return total


FEATURES, SALIENCY = wave(64, 8, 0.8, 1.3), wave_saliency(64)
ALL_BUT_15 = [i for i in range(64) if i != 15]
ROWS = [
    (16, 0.5, 8, [2, 4, 5, 13, 15, 17, 18, 24, 32, 35, 36, 39, 41, 43, 54, 55]),
    (15, 0.5, 8, [2, 13, 21, 24, 28, 30, 32, 35, 37, 43, 49, 52, 54, 62, 63]),
    (16, 0.75, 8, [2, 5, 12, 13, 16, 21, 24, 27, 32, 35, 39, 43, 46, 49, 54, 62]),
    (16, 0.25, 8, [1, 3, 5, 13, 20, 24, 25, 32, 35, 39, 42, 43, 45, 50, 52, 54]),
    (16, 0.0, 8, [1, 4, 5, 16, 17, 18, 30, 32, 33, 35, 39, 42, 44, 45, 57, 61]),
    (16, 1.0, 8, [2, 5, 10, 13, 16, 21, 24, 27, 32, 35, 43, 46, 51, 54, 57, 62]),
    (8, 1.0, 8, [2, 5, 13, 24, 32, 35, 43, 54]),
    (16, 0.5, 4, [2, 3, 5, 13, 15, 24, 25, 32, 35, 39, 43, 46, 49, 51, 52, 54]),
    (16, 0.5, None, [2, 4, 5, 13, 15, 19, 24, 26, 27, 32, 35, 39, 43, 54, 55, 61]),
    (4, 0.5, 8, [7, 13, 29, 54]),
    (2, 0.5, 8, [18, 54]),
    (1, 0.5, 8, [39]),
    (63, 0.5, 8, ALL_BUT_15),
]


def test_fixture_is_the_published_one():
    assert FEATURES[0] == pytest.approx(
        [0.517473, 0.703330, 0.555223, 0.107938, -0.456845, -0.838341, -0.760680, -0.181118], abs=1e-6
    )
    assert math.fsum(x for row in FEATURES for x in row) == pytest.approx(6.494480005532, abs=1e-10)
    assert SALIENCY[:3] == pytest.approx([0.012526751, 0.002115464, 0.036969279], abs=1e-8)
    assert math.fsum(SALIENCY) == pytest.approx(0.972805482937, abs=1e-10)


@pytest.mark.parametrize(("count", "ratio", "step", "kept"), ROWS)
def test_wave_fixture(count, ratio, step, kept):
    assert reference(FEATURES, SALIENCY, count, ratio, step)[0] == kept
    assert kept_of(VisPruner(keep=count, important_ratio=ratio, step=step), FEATURES, SALIENCY, count) == kept


def test_reference_drops_what_the_published_loop_drops():
    _, rounds, _ = reference(FEATURES, SALIENCY, 16)
    assert rounds == [
        [63, 37, 47, 23, 58, 6, 62, 42], [14, 0, 38, 48, 59, 46, 45, 56], [11, 57, 51, 8, 12, 9, 44, 25],
        [33, 19, 28, 34, 16, 50, 61, 52], [31, 49, 27, 21, 40, 20, 22, 60], [7, 10, 26, 29, 1, 53, 3, 30],
    ]  # fmt: skip
    _, rounds, _ = reference(FEATURES, SALIENCY, 15)
    assert rounds == [
        [8, 45, 16, 0, 15, 19, 14, 55], [38, 9, 5, 29, 42, 4, 46, 10], [23, 59, 7, 58, 31, 36, 20, 44],
        [61, 48, 33, 53, 25, 50, 27, 60], [56, 26, 47, 3, 18, 22, 12, 17], [57, 41, 40, 11, 1, 39, 34, 6], [51],
    ]  # fmt: skip
    assert reference(RING, RING_SALIENCY, 6, step=2)[1] == [[9, 2], [1, 7], [8, 4]]
    assert reference(RING, RING_SALIENCY, 6, step=8)[1] == [[9, 2, 5, 8, 7], [0]]


def test_reversed_picture_gives_the_mirrored_selection():
    kept = kept_of(VisPruner(keep=16), FEATURES[::-1], SALIENCY[::-1], 16)
    assert kept == [8, 9, 20, 22, 24, 27, 28, 31, 39, 45, 46, 48, 50, 58, 59, 61]
    assert kept == sorted(63 - i for i in ROWS[0][3])


def test_spatial_parity_is_another_method():
    wrong = spatial_variant(FEATURES, SALIENCY, 16)
    assert wrong == [2, 5, 13, 17, 20, 24, 27, 32, 33, 35, 43, 44, 49, 53, 54, 63]
    assert kept_of(VisPruner(keep=16), FEATURES, SALIENCY, 16) != wrong


RING = [[math.cos(math.radians(d)), math.sin(math.radians(d))]
        for d in (0, 7, 40, 90, 96, 133, 180, 191, 222, 270, 283, 318)]  # fmt: skip
RING_SALIENCY = [0.10, 0.02, 0.03, 0.16, 0.04, 0.05, 0.14, 0.07, 0.01, 0.12, 0.06, 0.20]


@pytest.mark.parametrize(
    ("count", "ratio", "step", "kept"),
    [
        (6, 0.5, 2, [0, 3, 5, 6, 10, 11]),
        (6, 0.5, 8, [1, 3, 4, 6, 10, 11]),
        (4, 0.5, 2, [0, 3, 8, 11]),
        (5, 0.5, 2, [0, 3, 4, 8, 11]),
        (6, 0.25, 3, [1, 5, 6, 8, 10, 11]),
    ],
)
def test_ring_fixture(count, ratio, step, kept):
    assert reference(RING, RING_SALIENCY, count, ratio, step)[0] == kept
    assert kept_of(VisPruner(keep=count, important_ratio=ratio, step=step), RING, RING_SALIENCY, count) == kept


@pytest.mark.parametrize("order", ["similarity", "rank"])
@pytest.mark.parametrize("step", [None, 4, 8])
def test_random_inputs_give_the_reference_selection(order, step):
    generator = torch.Generator().manual_seed(11 if step is None else step)
    compared = 0
    for case in range(60):
        n = int(torch.randint(5, 66, (), generator=generator))
        count = int(torch.randint(1, n, (), generator=generator)) if case % 3 else min(n - 1, 1 + case % 5)
        ratio = (0.5, 0.0, 0.75, 0.29)[case % 4]
        features = torch.randn(n, 6, generator=generator)
        saliency = torch.rand(n, generator=generator)
        if case % 2:
            features, saliency = features.half(), saliency.half()
        kept, _, gap = reference(features.tolist(), saliency.tolist(), count, ratio, step, order)
        if gap < NEAR_COPY:
            continue
        reducer = VisPruner(keep=count, important_ratio=ratio, step=step, order=order)
        assert kept_of(reducer, features, saliency, count) == kept, (n, count, ratio)
        compared += 1
    assert compared >= 45


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("order", ["similarity", "rank"])
def test_exact_ties_go_to_the_earlier_token(order, dtype):
    """Vectors of 4 entries of 1 or -1 among 8 have exact cosines, and many of them are equal."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(30):
        n = int(torch.randint(6, 50, (), generator=generator))
        count = int(torch.randint(1, n, (), generator=generator))
        places = torch.rand(n, 8, generator=generator).argsort(dim=1)[:, :4]
        signs = torch.randint(0, 2, (n, 4), generator=generator) * 2.0 - 1
        features = torch.zeros(n, 8).scatter(1, places, signs)
        saliency = torch.randint(0, 4, (n,), generator=generator) / 4
        kept, _, _ = reference(features.tolist(), saliency.tolist(), count, order=order)
        assert kept_of(VisPruner(keep=count, order=order), features.to(dtype), saliency.to(dtype), count) == kept


@pytest.mark.parametrize("order", ["similarity", "rank"])
def test_batch_equals_loop_over_crops(order):
    features, saliency = torch.randn(5, 47, 6), torch.rand(5, 47)
    for count in (1, 9, 20, 46):
        reducer = VisPruner(keep=count, order=order)
        together = pick(reducer, features, saliency, count).sort(dim=1).values.tolist()
        assert together == [kept_of(reducer, f, a, count) for f, a in zip(features, saliency, strict=True)]


def test_the_two_orders_differ_after_the_first_round():
    by_rank = kept_of(VisPruner(keep=16, order="rank"), FEATURES, SALIENCY, 16)
    assert by_rank == reference(FEATURES, SALIENCY, 16, order="rank")[0]
    assert by_rank != ROWS[0][3]


@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_ratio_one_is_fastervlm_and_reads_no_features(count):
    reducer = VisPruner(keep=count, important_ratio=1.0)
    saliency = torch.rand(3, 40).half()  # half precision has ties
    crops = CropBatch(None, (0, 1, 2), 40, saliency.device, {Attention(): saliency})
    got = reducer.pick(crops, count).sort(dim=1).values.tolist()
    assert got == [sorted(sorted(range(40), key=lambda i, r=row: -r[i])[:count]) for row in saliency.tolist()]
    assert reducer.needs == FasterVLM(keep=count).needs == (Attention(),)


def test_salient_part_is_kept():
    kept = kept_of(VisPruner(keep=16, important_ratio=0.75), FEATURES, SALIENCY, 16)
    best = sorted(range(64), key=lambda i: -SALIENCY[i])[:12]
    assert set(best) <= set(kept)


def test_position_of_a_token_does_not_matter():
    for seed in range(5):
        shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).tolist()
        kept = kept_of(VisPruner(keep=16), [FEATURES[i] for i in shuffled], [SALIENCY[i] for i in shuffled], 16)
        assert sorted(shuffled[i] for i in kept) == ROWS[0][3]


@pytest.mark.parametrize("scale", [0.037, 3.7, 64.0])
def test_scale_of_features_does_not_matter(scale):
    features = torch.tensor(FEATURES)
    assert kept_of(VisPruner(keep=16), features * scale, SALIENCY, 16) == ROWS[0][3]
    each = torch.linspace(0.5, 3, 64)[:, None]
    assert kept_of(VisPruner(keep=16), features * each, SALIENCY, 16) == ROWS[0][3]


def test_of_an_exact_pair_the_even_one_goes_first():
    features = torch.eye(8)
    features[4] = features[1]  # ranks 4 (even) and 1 (odd)
    saliency = torch.linspace(1, 0.1, 8)
    for count, gone in ((7, {4}), (6, {4, 0})):
        kept = kept_of(VisPruner(keep=count, important_ratio=0.0, step=1), features, saliency, count)
        assert set(range(8)) - set(kept) == gone


def test_number_of_important_tokens_is_truncated_in_double_precision():
    features, saliency = torch.eye(200), torch.linspace(1, 0.1, 200)
    # 100 * 0.29 is 28.999...: 28 tokens by saliency. Orthogonal features never set a token apart, so that rounds drop
    # even ranks in order; token 28 heads the residual list and goes.
    kept = kept_of(VisPruner(keep=100, important_ratio=0.29), features, saliency, 100)
    assert set(range(28)) <= set(kept)
    assert 28 not in kept


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"important_ratio": 1.5}, "important_ratio"),
        ({"important_ratio": -0.1}, "important_ratio"),
        ({"step": 0}, "step"),
        ({"order": "index"}, "order"),
    ],
)
def test_impossible_parameters_are_refused(config, message):
    with pytest.raises(FoveateError, match=message):
        VisPruner(keep=8, **config)
