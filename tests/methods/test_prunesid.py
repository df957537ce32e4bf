"""PruneSID against a plain version: one decomposition, then lists."""

import math

import pytest
import torch
from greedy_cases import SALIENCY64, cases, cosines, crop_batch, order, wave

from foveate.core.probes import Attention, Features
from foveate.methods import PruneSID
from foveate.methods.prunesid import _quotas


def components(features, number):
    """Return the group of each token, and how clear the choice was."""
    values = torch.tensor(features, dtype=torch.float64).sigmoid().T  # channels x tokens
    values = values - values.mean(dim=0)
    number = max(1, min(number, len(features), len(features[0]) - 1))
    _, variances, vectors = torch.linalg.svd(values, full_matrices=False)
    loadings = vectors[:number].T.abs().sort(dim=1, descending=True)
    gap = float((loadings.values[:, 0] - loadings.values[:, 1]).min()) if number > 1 else math.inf
    apart = float((variances[:number] - variances[1 : number + 1]).min()) if len(variances) > number else math.inf
    return loadings.indices[:, 0].tolist(), number, min(gap, apart)


def reference(features, saliency, count):
    """Return the kept tokens, the survivors and the quota of each group, and the smallest gap between decisions.

    The budget that the rule speaks of counts ``[CLS]``, too.
    """
    n = len(features)
    group, groups, gap = components(features, max(1, (count + 1) // 4))
    similarity = cosines(features, features)
    mean = math.fsum(similarity[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    limit = (count + 1) / 32 * mean
    gap = min([gap, *(abs(similarity[i][j] - limit) for i in range(n) for j in range(n) if i != j)])

    listed, survivors = [], []
    for g in range(groups):
        best_first = sorted((i for i in range(n) if group[i] == g), key=lambda i: -saliency[i])
        alive = []
        for i in best_first:
            if all(similarity[i][j] <= limit for j in alive):
                alive.append(i)
        alive = alive[:count]
        survivors.append(len(alive))
        listed.append(alive + [i for i in best_first if i not in alive])

    quotas = reference_quotas([len(x) for x in listed], survivors, count, 5 * math.ceil((count + 1) / 64))
    kept = [members[:q] for members, q in zip(listed, quotas, strict=True)]
    return sorted(i for part in kept for i in part), survivors, quotas, gap


def reference_quotas(sizes, survivors, count, limit):
    """Raise caps one by one, then share, then fill group by group."""
    caps, groups = [min(limit, s) for s in survivors], range(len(sizes))
    for full in (survivors, sizes):
        while sum(caps) < count and any(caps[g] < full[g] for g in groups):
            # As a level rises for all groups alike, it may end above the budget.
            level = min(caps[g] - (full is sizes) * survivors[g] for g in groups if caps[g] < full[g])
            caps = [c + (c < full[g] and c - (full is sizes) * survivors[g] == level) for g, c in enumerate(caps)]
    quotas, so_far, given = [], 0, 0
    for g in groups:
        so_far += survivors[g]
        share = math.floor((count - sum(s > 0 for s in sizes)) * so_far / sum(survivors) + 0.5) - given
        given += share
        quotas.append(min((sizes[g] > 0) + share, caps[g]))
    for g in sorted(groups, key=lambda g: -survivors[g]):
        quotas[g] += min(count - sum(quotas), caps[g] - quotas[g])
    return quotas


def pick(features, saliency, count):
    return sorted(order(PruneSID(keep=count), {Features(): features, Attention(): saliency}, count))


def test_random_inputs_give_the_reference_selection():
    compared = thinned = left_over = 0
    for n, count, dtype, generator in cases(90, seed=16, smallest=4, largest=60):
        # Tokens around a few directions, so that there is something to suppress.
        centres = torch.randn(1 + n // 4, 24, generator=generator)
        common = torch.rand(n, generator=generator) ** 2  # most tokens around the first ones
        features = centres[(common * len(centres)).long()]
        features = (0.5 + features + (n % 3) / 3 * torch.randn(n, 24, generator=generator)).to(dtype)
        saliency = torch.rand(n, generator=generator).to(dtype)
        kept, survivors, _, gap = reference(features.tolist(), saliency.tolist(), count)
        if gap < 1e-5:
            continue
        compared += 1
        thinned += sum(survivors) < n
        left_over += sum(survivors) < count
        assert pick(features, saliency, count) == kept, (n, count)
    assert compared > 60
    assert thinned > 30
    assert left_over > 15


def test_large_groups_are_capped():
    """All tokens resemble each other less than the limit allows: all survive, in groups of uneven sizes."""
    capped = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        features, saliency = torch.randn(90, 40, generator=generator) + 1.5, torch.rand(90, generator=generator)
        features[:30] += torch.randn(40, generator=generator)  # a large group
        kept, survivors, quotas, gap = reference(features.tolist(), saliency.tolist(), 48 + seed)
        assert sum(survivors) == 90
        assert gap > 1e-6
        assert max(quotas) <= 5
        capped += 1 + (48 + seed - len(quotas)) * max(survivors) / 90 > 5.5
        assert pick(features, saliency, 48 + seed) == kept
    assert capped >= 3


@pytest.mark.parametrize(("sizes", "survivors", "count", "quotas"), [
    ((30, 9, 8, 3), (30, 9, 8, 3), 16, (5, 5, 4, 2)),  # shares 8 3 3 2; the 3 left over fill the second group first
    ((30, 8, 9, 3), (30, 8, 9, 3), 16, (5, 4, 5, 2)),  # that with most survivors comes first, wherever it stands
    ((20, 10, 2), (20, 10, 2), 13, (6, 5, 2)),  # caps of 5 reach 12 only, and rise by one for all
    ((10, 6, 1), (8, 3, 1), 14, (9, 4, 1)),  # 12 survive; suppressed tokens fill the groups evenly
    ((4, 0, 3), (1, 0, 3), 4, (1, 0, 3)),  # a group without tokens
])  # fmt: skip
def test_quotas_by_hand(sizes, survivors, count, quotas):
    assert tuple(reference_quotas(sizes, survivors, count, 5)) == quotas
    assert _quotas(torch.tensor([sizes]), torch.tensor([survivors]), count, 5)[0].tolist() == list(quotas)


def test_quotas_equal_the_loop():
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        sizes = torch.randint(0, 12, (1 + int(torch.randint(0, 9, (), generator=generator)),), generator=generator)
        sizes[0] += 1
        survivors = (sizes * torch.rand(len(sizes), generator=generator)).ceil().long()
        least = int((sizes > 0).sum())
        count = int(torch.randint(least, int(sizes.sum()) + 1, (), generator=generator))
        quotas = reference_quotas(sizes.tolist(), survivors.tolist(), count, 3)
        assert sum(quotas) == count
        assert _quotas(sizes[None], survivors[None], count, 3)[0].tolist() == quotas


def test_quotas_of_a_wide_wave():
    """The shared fixture has 8 channels, and so at most 7 components; this one has 32."""
    features = wave(64, 32, 0.8, 1.3)
    kept, survivors, quotas, gap = reference(features, SALIENCY64, 16)
    assert gap > 1e-6
    assert len(quotas) == 4
    assert 8 < sum(survivors) < 64
    assert pick(features, SALIENCY64, 16) == kept


def test_directions_are_groups():
    """Tokens of a group are copies but for their strength: the most salient of each stays first."""
    generator = torch.Generator().manual_seed(17)
    directions = 4 * torch.randn(4, 64, generator=generator)
    features = directions.repeat_interleave(8, dim=0)
    features = features + 0.01 * torch.randn(32, 64, generator=generator)
    saliency = torch.rand(32, generator=generator)
    best = [int(saliency[8 * g : 8 * g + 8].argmax()) + 8 * g for g in range(4)]
    group, _, _ = components(features.tolist(), 4)
    assert [len(set(group[8 * g : 8 * g + 8])) for g in range(4)] == [1] * 4
    kept = pick(features, saliency, 16)
    assert set(best) <= set(kept)
    # Copies above a mean cosine near zero are suppressed: one survivor each, the others by turns.
    assert [sum(i // 8 == g for i in kept) for g in range(4)] == [4, 4, 4, 4]


def test_edges():
    saliency = torch.tensor([0.1, math.nan, 0.4, 0.2, 0.3])
    assert pick(torch.randn(5, 8), saliency, 1) == [2]
    assert pick(torch.zeros(5, 8), saliency, 4) == [0, 2, 3, 4]
    assert pick(torch.randn(1, 8).expand(5, 8), saliency, 2) == [2, 4]
    assert pick(torch.randn(5, 1), saliency, 3) == [2, 3, 4]
    assert len(set(pick(torch.full((40, 8), math.nan), torch.rand(40), 30))) == 30


def test_few_channels_and_large_budgets():
    for count in (20, 33, 63):
        features, saliency = torch.randn(64, 6), torch.rand(64)
        kept = pick(features, saliency, count)
        assert len(set(kept)) == count
        assert kept == reference(features.tolist(), saliency.tolist(), count)[0]


def test_batch_equals_loop_over_crops():
    features, saliency = torch.randn(5, 33, 16), torch.rand(5, 33)
    together = PruneSID(keep=17).pick(crop_batch({Features(): features, Attention(): saliency}), 17)
    assert together.sort(dim=1).values.tolist() == [pick(f, a, 17) for f, a in zip(features, saliency, strict=True)]
