"""PruMerge and PruMerge+ against their rules written out with lists in float64."""

import math

import pytest
import torch
from greedy_cases import exact_features, wave
from merge_cases import applied, cosine, crop_batch, one, wave_keys

from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Keys
from foveate.methods import PruMerge, PruMergePlus
from foveate.methods.prumerge import _salient
from tiny import visual_tokens

ATTENTION, KEYS = PruMerge(keep=1).needs
SIXTEEN = [0.01, 0.02, 0.02, 0.03, 0.01, 0.30, 0.02, 0.03, 0.25, 0.02, 0.01, 0.03, 0.02, 0.20, 0.02, 0.01]


def sharp_attention():
    row = [math.exp(6 * math.sin(2.3 * j) * math.cos(0.37 * j)) for j in range(65)]
    return [x / math.fsum(row) for x in row[1:]]


SHARP, ORDER = sharp_attention(), [16, 42, 49, 23, 9, 0, 35, 58, 26, 61]
WAVE = torch.tensor(wave(64, 8, 0.8, 1.3)).double()
FLAT_KEYS = torch.tensor(wave_keys(64, 4, 6)).double().flatten(1)


def quartile(values, share):
    values = sorted(values)
    at = share * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def outliers(a):
    q1, q3 = quartile(a, 0.25), quartile(a, 0.75)
    ranked = sorted(range(len(a)), key=lambda i: -a[i])
    return ranked[: max(1, sum(x > q3 + 1.5 * (q3 - q1) for x in a))]


def reference(a, keys, x, centres, neighbours, extra=True):
    """Return the places and the merged tokens of given centres."""
    n, vectors = len(a), []
    for i in sorted(centres):
        near = sorted((j for j in range(n) if j != i), key=lambda j: -cosine(keys[i], keys[j]))[:neighbours]
        vectors.append(x[i] + sum((a[j] * x[j] for j in near), torch.zeros_like(x[i])))
    places = [min(i, n - len(centres) - extra + k) for k, i in enumerate(sorted(centres))]
    if extra:
        vectors.append(sum((a[j] * x[j] for j in range(n) if j not in centres), torch.zeros_like(x[0])))
        places.append(n - 1)
    return places, torch.stack(vectors)


def plus_centres(a, count):
    """Return the centres of PruMerge+ at a fixed number of them."""
    ranked = sorted(range(len(a)), key=lambda i: -a[i])
    salient = min(_salient(count + 1, len(a)), count)
    rest = sorted(ranked[salient:])
    return ranked[:salient] + [rest[k * len(rest) // (count - salient)] for k in range(count - salient)]


def planes(a, keys):
    return one({ATTENTION: torch.as_tensor(a), KEYS: torch.as_tensor(keys)})


def test_reads_the_layer_behind_with_all_heads_as_one():
    expected = (Attention(joint=True, layers=(0,)), Keys(joint=True, layers=(0,)))
    assert PruMerge(keep=9).needs == PruMergePlus(keep=9).needs == expected
    own = (Attention(joint=True, layers=(-1,)), Keys(joint=True, layers=(-1,)))
    assert PruMergePlus(keep=9, layer=-1).needs == own


def test_outliers_of_sixteen():
    assert quartile(SIXTEEN, 0.25) == pytest.approx(0.0175)
    assert quartile(SIXTEEN, 0.75) == pytest.approx(0.03)
    assert outliers(SIXTEEN) == [5, 8, 13]
    wanted = PruMerge(keep=9, adaptive=True)._wanted(torch.tensor([SIXTEEN, [0.1] * 16]))
    assert wanted.nonzero().tolist() == [[0, 5], [0, 8], [0, 13], [1, 0]]  # of equal ones the first


def test_sharp_attention():
    assert quartile(SHARP, 0.25) == pytest.approx(0.000114401, abs=1e-9)
    assert quartile(SHARP, 0.75) == pytest.approx(0.006428857, abs=1e-9)
    assert outliers(SHARP) == ORDER
    assert sorted(SHARP)[-11] == pytest.approx(0.011748, abs=1e-6)
    for reducer, count in ((PruMerge(keep=40, neighbours=4, adaptive=True), 40), (PruMerge(keep=11, neighbours=4), 11)):
        groups = reducer.pick(crop_batch(planes(SHARP, FLAT_KEYS)), count)
        places, got = applied(groups, WAVE)
        assert places == [*sorted(ORDER), 63]
        sixteen = got[places.index(16), :4].tolist()
        assert sixteen == pytest.approx([0.829316, 1.058809, 0.339407, -0.575702], abs=1e-6)
        assert got[-1, :4].tolist() == pytest.approx([0.008837, 0.011469, -0.009944, 0.004068], abs=1e-6)
        _, target, source, weight = groups.per_crop()[0]
        flows = target == sorted(ORDER).index(16)
        assert source[flows].tolist() == [16, 23, 9, 30, 2]
        assert weight[flows].tolist() == pytest.approx([1.0, SHARP[23], SHARP[9], SHARP[30], SHARP[2]])


def test_grid_of_the_adaptive_plus():
    wanted = PruMergePlus(keep=60, adaptive=True)._wanted(torch.tensor([SHARP]))
    centres = wanted[0].nonzero().flatten().tolist()
    assert centres == sorted({*ORDER, *range(0, 63, 2)})
    assert len(centres) - len(ORDER) == 27
    groups = PruMergePlus(keep=60, adaptive=True).pick(crop_batch(planes(SHARP, FLAT_KEYS)), 60)
    assert len(groups.per_crop()[0][0]) == 38
    # Of 34 tokens 4 are outliers, so that every second one is on the grid; of 64 tokens 14 are, and the official stride
    # would be 0 with a few more.
    two = torch.tensor([[0.5] * 30 + [1.0] * 4])
    found = PruMergePlus(keep=30, adaptive=True)._wanted(two).nonzero()[:, 1].tolist()
    assert found == sorted({30, 31, 32, 33, *range(0, 33, 2)})
    for outliers_of_64 in (14, 15):
        flat = torch.tensor([[0.0] * (63 - outliers_of_64) + [1.0] * outliers_of_64 + [0.0]])
        assert PruMergePlus(keep=60, adaptive=True)._wanted(flat)[0].tolist() == [True] * 63 + [False]


def test_presets():
    assert [_salient(t, 576) for t in (64, 128, 256)] == [13, 40, 95]
    assert [_salient(t, 576) for t in (1, 32, 96, 400)] == [
        1,
        6,
        round(96 * (13 / 64 + 40 / 128) / 2),
        round(400 * 95 / 256),
    ]


@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "plus"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_random_inputs_give_the_reference(plus, adaptive):
    generator, shorter = torch.Generator().manual_seed(3 * plus + adaptive), 0
    for case in range(60):
        n = int(torch.randint(2, 60, (), generator=generator))
        count = int(torch.randint(1, n, (), generator=generator)) if case % 4 else min(n - 1, 1 + case % 3)
        dtype = torch.float16 if case % 2 else torch.float32
        keys = exact_features(n, generator).to(dtype)
        # Multiples of a power of two, so that quartiles and their bound are exact.
        a = (torch.randint(0, 9, (n,), generator=generator) ** 2 / 256).to(dtype)
        x = torch.randn(n, 5, generator=generator).double()
        neighbours = (32, 3)[case % 2]
        reducer = (PruMergePlus if plus else PruMerge)(keep=count, neighbours=neighbours, adaptive=adaptive)
        places, got = applied(reducer.pick(crop_batch(planes(a, keys)), count), x)
        a, most = a.double().tolist(), max(1, count - 1)
        ranked = sorted(range(n), key=lambda i: -a[i])
        if adaptive:
            centres = outliers(a)
            if plus:
                stride = max(1, int(n // len(centres) / 3))
                centres = {*centres, *range(0, n - 1, stride)}
            centres = [i for i in ranked if i in centres][:most]
            shorter += len(centres) < most
        else:
            centres = plus_centres(a, most) if plus else ranked[:most]
        # Adaptive centres make room as if all of the budget were there.
        expected, vectors = reference(a, keys.tolist(), x, centres, neighbours, count > 1)
        assert len(places) == len(expected) <= count
        assert adaptive or places == expected
        torch.testing.assert_close(got, vectors, atol=1e-5, rtol=1e-5)
    assert not adaptive or shorter > 5


def test_all_attention_is_handed_on():
    a, keys = torch.rand(2, 50), torch.randn(2, 50, 6)
    groups = PruMerge(keep=12).pick(crop_batch({ATTENTION: a, KEYS: keys}), 12)
    for b in range(2):
        places, target, source, weight = groups.per_crop()[b]
        last = target == 11
        centres = source[:11]
        assert int(places[11]) == 49
        torch.testing.assert_close(weight[last].sum() + a[b, centres].sum(), a[b].sum())
        assert (weight[last][centres] == 0).all()


def test_no_attention_changes_nothing():
    x = torch.randn(30, 4)
    groups = PruMerge(keep=8).pick(crop_batch(planes(torch.zeros(30), torch.randn(30, 4))), 8)
    places, got = applied(groups, x)
    assert places == [*range(7), 29]
    assert torch.equal(got[:7].float(), x[:7])
    assert (got[7] == 0).all()


def test_small_crops_have_few_neighbours():
    groups = PruMerge(keep=3).pick(crop_batch(planes(torch.rand(5), torch.randn(5, 4))), 3)
    _, target, source, _ = groups.per_crop()[0]
    for k in range(2):
        assert sorted(source[target == k].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
def test_a_budget_of_one_is_a_centre(method):
    a, x = torch.rand(20), torch.randn(20, 3)
    places, got = applied(method(keep=1).pick(crop_batch(planes(a, torch.randn(20, 4))), 1), x)
    assert places == [int(a.argmax())]
    assert got.shape == (1, 3)


@pytest.mark.parametrize("bad", ["nan", "zero"])
@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("adaptive", [False, True])
def test_degenerate_inputs_give_valid_groups(bad, method, adaptive):
    a, keys = torch.rand(1, 21), torch.randn(1, 21, 4)
    if bad == "nan":
        a[0, ::2], keys[0, 3] = torch.nan, torch.nan
    else:
        a[:], keys[:] = 0.0, 0.0
    for count in (1, 5, 20):
        groups = method(keep=count, adaptive=adaptive).pick(crop_batch({ATTENTION: a, KEYS: keys}), count)
        places, got = applied(groups, torch.ones(21, 1))
        assert 1 <= len(places) <= count
        assert adaptive or len(places) == count
        assert got.isfinite().all()
        _, target, source, _ = groups.per_crop()[0]
        first = source[target == 0].tolist()
        assert len(set(first)) == len(first)  # a centre is no neighbour of its own


@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
def test_adaptive_counts_stay_below_the_budget(method):
    layout = [(0, [(8, 8)]), (0, [(6, 8), (8, 8)]), (1, [(8, 8)])]
    counts = {}
    for keep in (40, 6):
        reducer = method(keep=keep, adaptive=True)
        together = reducer.select(visual_tokens(reducer, layout))
        for i, span in enumerate(together):
            span.check()
            (alone,) = reducer.select(visual_tokens(reducer, layout, only=i))
            assert alone.kept.tolist() == span.kept.tolist()
        counts[keep] = [len(span) for span in together]
        assert max(counts[keep]) <= keep
    if method is PruMerge:
        assert len(set(counts[40])) > 1
        assert max(counts[40]) < 40


def test_impossible_parameters_are_refused():
    with pytest.raises(FoveateError, match="neighbours=0"):
        PruMergePlus(keep=8, neighbours=0)
    with pytest.raises(FoveateError, match="layer=1"):
        PruMerge(keep=8, layer=1)
