"""VisionZip and VisionDrop's stage 0 against the rule written out with lists in float64."""

import pytest
import torch
from greedy_cases import exact_features, wave, wave_saliency
from merge_cases import applied, cosine, crop_batch, mean_keys, one

from foveate import Budget
from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Keys
from foveate.methods import VisionDrop, VisionZip
from foveate.methods.visionzip import contextual_count, dominant_and_contextual
from tiny import visual_tokens


def reference(attention, keys, x, count, contextual, merge="add"):
    """Return the places and the tokens, and the assignment; `x` has one row more than `attention` with ``[CLS]``."""
    n, front = len(attention), len(x) - len(attention)
    ranked = sorted(range(n), key=lambda i: -attention[i])
    dominant = ranked[: count - contextual - front]
    rest = sorted(set(range(n)) - set(dominant))
    step = max(1, len(rest) // contextual) if contextual else 1
    anchors = rest[::step][:contextual]
    members = {a: [] for a in anchors}
    if contextual:
        for i in rest:
            if i not in members:
                members[max(anchors, key=lambda a: (cosine(keys[i], keys[a]), -a))].append(i)
    tokens = {i: x[i] for i in dominant}
    for a, own in members.items():
        mean = x[own].mean(dim=0) if own else torch.zeros_like(x[a])
        tokens[a] = x[a] + mean if merge == "add" else (x[a] + x[own].sum(dim=0)) / (1 + len(own))
    places, vectors = list(range(front)), list(x[n:])
    for i in sorted(tokens):
        places.append(max(i, len(places)))
        vectors.append(tokens[i])
    return places, torch.stack(vectors), members


def planes(attention, keys):
    return {Attention(): torch.as_tensor(attention), Keys(): torch.as_tensor(keys)}


def test_wave_of_16():
    attention, keys, x = wave_saliency(16), mean_keys(16, 4, 6), torch.tensor(wave(16, 8, 0.8, 1.3)).double()
    groups = VisionZip(keep=7, contextual_ratio=3 / 7).pick(crop_batch(one(planes(attention, keys))), 7)
    places, got = applied(groups, x)
    assert places == [0, 2, 5, 6, 10, 11, 13]  # dominant 2 5 10 13, contextual 0 6 11
    assert got[0, :4].tolist() == pytest.approx([0.903707, 0.758257, 0.268877, 0.205267], abs=1e-6)
    assert got[3, :4].tolist() == pytest.approx([-0.865437, -0.947907, -0.619605, -0.139266], abs=1e-6)
    assert got[5, :4].tolist() == pytest.approx([-1.015688, 1.456622, -0.661493, 0.235605], abs=1e-6)
    assert torch.equal(got[3], x[6])
    assert torch.equal(got[[1, 2, 4, 6]], x[[2, 5, 10, 13]])
    mean = VisionZip(keep=7, contextual_ratio=3 / 7, merge="mean").pick(crop_batch(one(planes(attention, keys))), 7)
    assert applied(mean, x)[1][0, :4].tolist() == pytest.approx([0.402639, 0.135977, -0.181150, 0.098655], abs=1e-6)
    members = reference(attention, keys, x, 7, 3)[2]
    assert members == {0: [1, 3, 7, 8, 9, 14, 15], 6: [], 11: [4, 12]}


def test_wave_of_64():
    attention, keys, x = wave_saliency(64), mean_keys(64, 4, 6), torch.tensor(wave(64, 8, 0.8, 1.3)).double()
    groups = VisionZip(keep=16, contextual_ratio=3 / 16).pick(crop_batch(one(planes(attention, keys))), 16)
    places, got = applied(groups, x)
    dominant = [2, 5, 13, 16, 21, 24, 32, 35, 43, 46, 51, 54, 62]
    assert places == sorted([*dominant, 0, 22, 42])
    expected = [-0.199414, -0.643705, -0.653252, -0.920260]
    assert got[places.index(22), :4].tolist() == pytest.approx(expected, abs=1e-6)
    members = reference(attention, keys, x, 16, 3)[2]
    assert members[22] == [1, 8, 15, 25, 29, 36, 39, 50, 53, 57, 60]
    assert members[0] == [3, 4, 7, 9, 10, 11, 14, 17, 18, 23, 30, 31, 37, 38, 44, 45, 52, 58, 59]
    assert len(members[42]) == 18
    by_slot = {p: set() for p in places}
    row, target, source, _ = groups.per_crop()[0]
    for t, s in zip(target.tolist(), source.tolist(), strict=True):
        by_slot[int(row[t])].add(s)
    assert by_slot == {p: {p, *members.get(p, [])} for p in places}


@pytest.mark.parametrize("merge", ["add", "mean"])
@pytest.mark.parametrize("cls", [False, True], ids=["patches", "cls"])
def test_random_inputs_give_the_reference(merge, cls):
    generator = torch.Generator().manual_seed(int(cls))
    for case in range(60):
        n = int(torch.randint(2, 50, (), generator=generator))
        count = int(torch.randint(1, n, (), generator=generator)) if case % 4 else min(n - 1, 1 + case % 3)
        contextual = contextual_count(count, (10 / 64, 0.0, 0.5, 1.0)[case % 4])
        dtype = torch.float16 if case % 2 else torch.float32
        # Exact cosines, so that ties are ties in any precision.
        keys = exact_features(n, generator).to(dtype)
        attention = (torch.randint(0, 6, (n,), generator=generator) / 8).to(dtype)
        x = torch.randn(n + cls, 5, generator=generator).double()
        batch = crop_batch(one(planes(attention, keys)), cls=cls)
        places, got = applied(dominant_and_contextual(batch, count, contextual, merge), x)
        expected, vectors, _ = reference(attention.tolist(), keys.tolist(), x, count, contextual, merge)
        assert places == expected
        torch.testing.assert_close(got, vectors, atol=1e-5, rtol=1e-5)


def test_cls_goes_first_and_counts():
    attention = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.1, 0.1])
    keys = torch.eye(6)
    x = torch.cat([torch.arange(6.0), torch.tensor([100.0])])[:, None]
    for count, places, values in (
        (1, [0], [100.0]),
        (4, [0, 1, 2, 3], [100.0, 0.0, 1.0, 2.0 + (3.0 + 4.0 + 5.0) / 3]),
        (3, [0, 1, 2], [100.0, 0.0, 1.0 + (2.0 + 3.0 + 4.0 + 5.0) / 4]),
    ):
        got, tokens = applied(VisionZip(keep=count).pick(crop_batch(one(planes(attention, keys)), cls=True), count), x)
        assert got == places
        assert tokens.flatten().tolist() == pytest.approx(values)


@pytest.mark.parametrize("method", [VisionZip, VisionDrop])
def test_without_contextual_tokens_it_is_top_k(method):
    attention = torch.rand(40)
    groups = method(keep=9, contextual_ratio=0.0).pick(crop_batch(one(planes(attention, torch.randn(40, 3)))), 9)
    x = torch.randn(40, 4)
    places, got = applied(groups, x)
    assert places == sorted(attention.topk(9).indices.tolist())
    assert torch.equal(got.float(), x[places])


@pytest.mark.parametrize("cls", [False, True])
def test_every_patch_counts_once(cls):
    batch = crop_batch(one(planes(torch.rand(40), torch.randn(40, 3))), cls=cls)
    for count in (1, 2, 11, 39):
        _, _, source, _ = VisionZip(keep=count).pick(batch, count).per_crop()[0]
        expected = range(40 + cls)
        # A single [CLS] token leaves the patches out; a single patch the others.
        assert sorted(source.tolist()) == list(expected) or count == 1
        assert len(source) == (1 if count == 1 else 40 + cls)


def test_contextual_counts():
    zip_ratio, drop_ratio = VisionZip(keep=1).contextual_ratio, VisionDrop(keep=1).contextual_ratio
    assert [contextual_count(t, zip_ratio) for t in (64, 128, 192, 32, 8, 2, 1)] == [10, 20, 30, 5, 1, 1, 0]
    assert [contextual_count(t, drop_ratio) for t in (48, 35, 26, 19, 2, 1)] == [7, 5, 4, 3, 1, 0]
    assert contextual_count(48, 0.125) == 6  # the published 42 + 6
    assert contextual_count(48, 1.0) == 47


def test_visiondrop_is_visionzip_with_another_share():
    attention, keys, x = torch.rand(64), torch.randn(64, 6), torch.randn(65, 4)
    batch = crop_batch(one(planes(attention, keys)), cls=True)
    one_way = applied(VisionDrop(keep=20).pick(batch, 20), x)
    other = applied(VisionZip(keep=20, contextual_ratio=0.14).pick(batch, 20), x)
    assert one_way[0] == other[0]
    assert torch.equal(one_way[1], other[1])
    assert VisionDrop(keep=20).needs == VisionZip(keep=20).needs


def test_toy_of_the_merge_rule():
    """Dominant {0, 1}; of the rest 2 3 4 5 the targets are 2 and 4, and 3 joins 4, 5 joins 2."""
    keys = torch.tensor([[0.0, 0], [0, 0], [1, 0.2], [0.1, 1], [1, 1], [0.9, 0.3]])
    x = torch.tensor([[9.0, 9], [8, 8], [0, 4], [3, 3], [5, 1], [1, 7]])
    batch = crop_batch(one(planes(torch.tensor([0.18, 0.27, 0.09, 0.16, 0.03, 0.03]), keys)))
    # 0 and 1 are dominant by fiat in the toy: their attention here makes them so.
    batch.planes[Attention()][0, :2] = 1.0
    places, got = applied(dominant_and_contextual(batch, 4, 2), x)
    assert places == [0, 1, 2, 4]
    assert got.tolist() == [[9, 9], [8, 8], [1, 11], [8, 4]]
    mean = applied(dominant_and_contextual(batch, 4, 2, "mean"), x)[1]
    assert mean[2:].tolist() == [[0.5, 5.5], [4, 2]]


@pytest.mark.parametrize("bad", ["nan", "zero", "equal"])
def test_degenerate_inputs_give_valid_groups(bad):
    attention, keys = torch.rand(1, 21), torch.randn(1, 21, 4)
    if bad == "nan":
        attention[0, ::2] = torch.nan
    else:
        attention[:], keys[:] = 0.5, float(bad == "equal")
    for count in (1, 5, 20):
        places, got = applied(VisionZip(keep=count).pick(crop_batch(planes(attention, keys)), count), torch.ones(21, 1))
        assert len(places) == count
        assert got.isfinite().all()
        if bad != "nan":
            assert set(places) >= set(range(count - contextual_count(count, 10 / 64)))  # ties to the lower index


def test_joint_budgets_have_no_cls():
    reducer = VisionZip(keep=Budget(20, per="joint"))
    (chosen,) = reducer.select(visual_tokens(reducer, [(0, [(6, 8), (8, 8)])]))
    chosen.check()
    assert len(chosen) == 20
    assert int(chosen.merge.source.max()) < chosen.length


def test_each_crop_has_its_own_cls():
    reducer = VisionZip(keep=Budget(5, per="crop"))
    (chosen,) = reducer.select(visual_tokens(reducer, [(0, [(6, 8), (8, 8)])]))
    chosen.check()
    m = chosen.merge
    rows = {int(s): int(chosen.kept[t]) for t, s in zip(m.target, m.source, strict=True) if s >= chosen.length}
    assert rows == {chosen.length: 0, chosen.length + 1: 49}  # the first place of either crop


@pytest.mark.parametrize("method", [VisionZip, VisionDrop])
@pytest.mark.parametrize(
    ("config", "message"), [({"contextual_ratio": 1.5}, "contextual_ratio"), ({"merge": "sum"}, "'add' or 'mean'")]
)
def test_impossible_parameters_are_refused(method, config, message):
    with pytest.raises(FoveateError, match=message):
        method(keep=8, **config)
