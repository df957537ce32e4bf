"""VFlowOpt's encoder stage against its rules written out with lists in float64."""

import math

import pytest
import torch
from merge_cases import applied, crop_batch, one
from torch._subclasses.fake_tensor import FakeTensorMode

from foveate.core.errors import FoveateError, InputError
from foveate.core.probes import Heads
from foveate.methods import VFlowOpt
from foveate.methods.vflowopt import Judged, _blocks
from tiny import visual_tokens

GRID = [0.9, 0.1, 0.2, 0.3, 0.2, 0.3, 0.8, 0.1, 0.05, 0.06, 0.4, 0.02, 0.07, 0.01, 0.03, 0.5]


def judged(maps, t, lead=0):
    """Return the importance of patches from a whole attention map ``[B, H, S, S]``, in plain steps."""
    a = maps.double().mean(dim=1)
    got = a.mean(dim=1)[:, lead:]
    rows = []
    for b in range(len(a)):
        mean = got[b].mean()
        ranked = sorted(range(got.shape[1]), key=lambda i: -float(got[b, i]))
        if t is None:
            judges = ranked[: max(1, round(0.03 * len(ranked)))]
        else:
            judges = [i for i in ranked if got[b, i] > t * mean] or ranked[:1]
        rows.append(a[b][[lead + i for i in judges], lead:].mean(dim=0))
    return torch.stack(rows)


def heads_of(attention):
    """Queries and keys whose attention is a given map of one head."""
    n = len(attention)
    return Heads(torch.tensor(attention).log()[None, None], torch.eye(n)[None, None], torch.zeros(1, 1, n, 1), 1.0)


@pytest.mark.parametrize(
    ("t", "expected"),
    [(1.0, [0.35, 0.10, 0.35, 0.20]), (1.3, [0.4, 0.1, 0.3, 0.2]), (2.0, [0.4, 0.1, 0.3, 0.2])],
)
def test_toy_of_the_judges(t, expected):
    heads = heads_of([[0.40, 0.10, 0.30, 0.20], [0.50, 0.10, 0.25, 0.15], [0.30, 0.10, 0.40, 0.20],
                      [0.60, 0.20, 0.10, 0.10]])  # fmt: skip
    assert Judged(t).read(heads)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("t", [None, 0.0, 0.5, 1.0, 1.4, 3.0, 1000.0])
@pytest.mark.parametrize("lead", [0, 1])
def test_judged_attention_equals_the_whole_map(t, lead):
    generator = torch.Generator().manual_seed(lead)
    for size in (1, 2, 9, 70, 201):
        query, key = (2 * torch.randn(2, 3, size + lead, 4, generator=generator) for _ in range(2))
        maps = (query @ key.mT * 0.5).softmax(dim=-1)
        got = Judged(t).read(Heads(query, key, key, 0.5, lead))
        torch.testing.assert_close(got.double(), judged(maps, t, lead), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("t", [None, 0.0, 0.5, 1.0, 1.4, 3.0, 1000.0])
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("square", [True, False], ids=["queries too", "keys only"])
def test_what_the_mask_hides_neither_judges_nor_is_judged(t, lead, square):
    """The encoders of Idefics3 hide the padding of a picture: the others are as if it were not there."""
    generator = torch.Generator().manual_seed(lead)
    for size in (2, 9, 70, 201):
        query, key = (2 * torch.randn(3, 3, size + lead, 4, generator=generator) for _ in range(2))
        shown = torch.rand(3, size + lead, generator=generator) < 0.7
        shown[:, : lead + 1] = True
        shown[0] = True
        key.transpose(1, 2)[~shown] = 9.0  # strong, if it were seen
        mask = shown[:, None, None] & shown[:, None, :, None] if square else shown[:, None, None]
        got = Judged(t).read(Heads(query, key, key, 0.5, lead, mask))
        for b, row in enumerate(shown):
            alone = [x[b : b + 1, :, row] for x in (query, key)]
            expected = judged((alone[0] @ alone[1].mT * 0.5).softmax(dim=-1), t, lead)[0]
            torch.testing.assert_close(got[b, row[lead:]].double(), expected, atol=1e-6, rtol=1e-4)
            assert not got[b, ~row[lead:]].any()


def test_only_rows_of_judges_are_computed_for_the_map():
    assert Judged(28.683).rows(729, 0) == 729 + 25
    assert Judged(0.0).rows(729, 0) == 2 * 729
    assert Judged().rows(577, 1) == 577 + 17


def reference(importance, grid, count, a, exact, x):
    """Return the places and the merged tokens."""
    n = len(importance)
    ranked = sorted(range(n), key=lambda i: -importance[i])
    recycled = 0 if a is None else min(int(n / a**2), count)
    tokens = {i: x[i] for i in ranked[: count - recycled]}
    source = ranked[count - recycled :]
    if a is not None and (recycled or not exact):
        blocks = {}
        for i in source:
            blocks.setdefault((math.floor(i // grid[1] / a), math.floor(i % grid[1] / a)), []).append(i)
        # Lists are in order of importance, and so are the blocks, by their leaders.
        groups = list(blocks.values())
        for group in groups[:recycled] if exact else groups:
            weights = [max(importance[i], 0) for i in group]
            if not sum(weights):
                weights = [1] * len(group)
            tokens[group[0]] = sum(w * x[i] for w, i in zip(weights, group, strict=True)) / sum(weights)
        rest = [i for i in source if i not in tokens]
        for i in rest[: count - len(tokens)] if exact else ():
            tokens[i] = x[i]
    return sorted(tokens), torch.stack([tokens[i] for i in sorted(tokens)])


def batch_of(importance, grid, t=None):
    return crop_batch(one({Judged(t): torch.as_tensor(importance)}), grid)


@pytest.mark.parametrize("exact", [True, False])
def test_toy_of_the_blocks(exact):
    x = torch.arange(16.0)[:, None]
    places, got = applied(VFlowOpt(keep=8, a=2.0, exact=exact).pick(batch_of(GRID, (4, 4)), 8), x)
    assert places == [0, 3, 5, 6, 10, 12, 14, 15]
    assert got.flatten().tolist() == pytest.approx([0, 3.333333, 4.0, 6, 10, 10.052632, 12.8, 15], abs=1e-5)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("a", [None, 0.7, 1.0, 1.6, 2.0, 3.3, 50.0])
def test_random_inputs_give_the_reference(exact, a):
    generator = torch.Generator().manual_seed(7)
    counts = set()
    for case in range(30):
        grid = [(8, 8), (5, 7), (1, 9), (6, 1), (2, 3)][case % 5]
        n = grid[0] * grid[1]
        count = int(torch.randint(1, n, (), generator=generator)) if case % 3 else min(n - 1, 1 + case % 4)
        dtype = torch.float16 if case % 2 else torch.float32
        importance = (torch.randint(-2, 12, (n,), generator=generator).clamp(min=-1) / 16).to(dtype)
        x = torch.randn(n, 4, generator=generator).double()
        places, got = applied(VFlowOpt(keep=count, a=a, exact=exact).pick(batch_of(importance, grid), count), x)
        expected, vectors = reference(importance.tolist(), grid, count, a, exact, x)
        assert places == expected
        torch.testing.assert_close(got, vectors, atol=1e-5, rtol=1e-5)
        assert len(places) == count or not exact
        counts.add(len(places) - count)
    assert exact or a in (None, 50.0) or len(counts) > 1


def test_blocks_have_real_sides():
    blocks, number = _blocks((3, 5), 1.6, torch.device("cpu"))
    assert number == 2 * 3
    assert blocks.tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert _blocks((27, 27), 11.757, torch.device("cpu"))[1] == 9


@pytest.mark.parametrize(("share", "count"), [(0.72332, 527), (0.265103, 193), (0.116615, 85)])
def test_published_counts(share, count):
    reducer = VFlowOpt(keep=share, t=28.683, a=11.757)
    (chosen,) = reducer.select(visual_tokens(reducer, [(0, [(27, 27)])]))
    assert len(chosen) == count
    inexact = VFlowOpt(keep=share, t=28.683, a=11.757, exact=False)
    (chosen,) = inexact.select(visual_tokens(inexact, [(0, [(27, 27)])]))
    assert len(chosen) == count - 5 + 9  # M = int(729 / 138.2), and all 9 blocks have a dropped token


def test_without_recycling_it_is_top_k():
    importance = torch.rand(40)
    groups = VFlowOpt(keep=9).pick(batch_of(importance, None), 9)  # and needs no grid
    x = torch.randn(40, 3)
    places, got = applied(groups, x)
    assert places == sorted(importance.topk(9).indices.tolist())
    assert torch.equal(got.float(), x[places])
    with pytest.raises(InputError, match="vflowopt needs the whole token grid"):
        VFlowOpt(keep=9, a=3.0).pick(batch_of(importance, None), 9)


@pytest.mark.parametrize("bad", ["nan", "zero", "equal"])
@pytest.mark.parametrize("exact", [True, False])
def test_degenerate_importance_gives_valid_groups(bad, exact):
    importance = torch.rand(35)
    importance[:] = {"nan": torch.nan, "zero": 0.0, "equal": 0.5}[bad]
    for count in (1, 6, 34):
        places, got = applied(VFlowOpt(keep=count, a=2.5, exact=exact).pick(batch_of(importance, (5, 7)), count),
                              torch.ones(35, 1))  # fmt: skip
        torch.testing.assert_close(got, torch.ones_like(got))  # every token is a mean
        assert len(places) == count or not exact


@pytest.mark.parametrize("a", [None, 2.5])
def test_nothing_waits_for_the_device(a):
    reducer = VFlowOpt(keep=9, a=a)
    with FakeTensorMode():
        groups = reducer.pick(crop_batch({Judged(): torch.empty(2, 35)}, (5, 7)), 9)
        map_ = Judged(2.0).read(Heads(*torch.empty(3, 2, 3, 36, 4), 0.5, 1))
    assert groups.kept.shape == (2, 9)
    assert map_.shape == (2, 35)


@pytest.mark.parametrize(
    ("config", "message"), [({"t": -1.0}, "t is"), ({"a": 0.0}, "a is"), ({"t": math.nan}, "t is")]
)
def test_impossible_parameters_are_refused(config, message):
    with pytest.raises(FoveateError, match=message):
        VFlowOpt(keep=8, **config)
