"""Greedy methods on many tokens: a few are looked at for each pick, and the picks are those of the plain rule."""

import pytest
import torch
from greedy_cases import crop_batch

from foveate.bench import loops
from foveate.bench.memory import MemoryMeter
from foveate.core import ranking
from foveate.core.probes import Attention, Embeddings, Features, Query
from foveate.methods import SCOPE, CDPruner, Gaze, GazeQuery, MMTok, determinants

METHODS = [SCOPE, MMTok, CDPruner, Gaze, GazeQuery]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def crops(method, size, seed=0, batch=1, width=48, kinds=24):
    """Make crops whose tokens gather around a few centres, some of them copies of others."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, width, generator=generator)
    planes = {}
    for probe in method.needs:
        if isinstance(probe, Attention):
            saliency = torch.rand(batch, size, generator=generator)
            planes[probe] = saliency[..., None] if probe.stacked else saliency
        elif not isinstance(probe, Query):
            own = centres[torch.randint(kinds, (batch, size), generator=generator)]
            planes[probe] = own + 0.7 * torch.randn(batch, size, width, generator=generator)
            planes[probe][:, 1::50] = planes[probe][:, ::50][:, : len(range(1, size, 50))]
    words = torch.randn(batch, 5, width, generator=generator) if Query() in method.needs else None
    return crop_batch(planes, words)


def looking_at_all(method, batch, count, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "_LAZY_FROM", 10**9)
        patch.setattr(determinants, "FROM", 10**9)
        return method(keep=count).pick(batch, count)


@pytest.mark.parametrize("size", [256, 600, 1300])
@pytest.mark.parametrize("method", [SCOPE, MMTok], ids=lambda m: m.name)
def test_coverage_added_up_for_a_few_tokens_gives_the_same_picks(method, size, monkeypatch):
    for seed in range(3):
        batch = crops(method, size, seed, batch=2)
        got = method(keep=size // 9).pick(batch, size // 9)
        assert torch.equal(got, looking_at_all(method, batch, size // 9, monkeypatch))


@pytest.mark.parametrize("size", [1025, 1600])
@pytest.mark.parametrize("method", [CDPruner, Gaze, GazeQuery], ids=lambda m: m.name)
def test_determinants_without_a_kernel_give_the_same_picks(method, size, monkeypatch):
    for seed in range(3):
        batch = crops(method, size, seed, batch=2)
        # Above the width, so that the tokens are spanned by those picked before.
        count = 90 if method is CDPruner else size // 9
        got = method(keep=count).pick(batch, count)
        expected = looking_at_all(method, batch, count, monkeypatch)
        if method is CDPruner:
            assert torch.equal(got, expected)
        else:  # the form for fewer tokens is in float32
            shared = [len(set(a) & set(b)) for a, b in zip(got.tolist(), expected.tolist(), strict=True)]
            assert min(shared) >= 0.99 * count


@every_method
def test_few_tokens_are_looked_at(method, monkeypatch):
    looked = []
    for kind, name in ((ranking.Lazy, "scores"), (determinants.LazyDeterminant, "_update")):
        for owner in (kind, *kind.__subclasses__()):
            if name in vars(owner):
                plain = vars(owner)[name]
                monkeypatch.setattr(owner, name, lambda self, x, plain=plain: looked.append(len(x)) or plain(self, x))
    method(keep=144).pick(crops(method, 1300), 144)
    assert 0 < sum(looked) < 0.2 * 1300 * 144


@every_method
def test_equal_tokens_go_by_index(method):
    """Nothing tells them from each other, so that no bound does."""
    batch = crops(method, 1100)
    constant = {p: torch.full_like(x, 0.7) for p, x in batch.planes.items()}
    picks = method(keep=40).pick(crop_batch(constant, batch.query), 40)
    assert picks.tolist() == [list(range(40))]


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_tokens_that_are_no_numbers_break_nothing(method, value, monkeypatch):
    batch = crops(method, 1100)
    for x in batch.planes.values():
        x[:, [3, 4, 700]] = value
    picks = method(keep=60).pick(batch, 60)
    assert len(set(picks[0].tolist())) == 60
    assert torch.equal(picks, looking_at_all(method, batch, 60, monkeypatch))


def test_picks_are_those_of_the_plain_loops():
    """Ties within noise are not those of a plain loop: MMTok's are a share of 5e-5."""
    least = {SCOPE: 0.97, MMTok: 0.9, CDPruner: 1.0}
    for size, count in ((300, 33), (1200, 133)):
        generator = torch.Generator().manual_seed(size)
        x, y = torch.randn(2, size, 700, generator=generator).double()
        words, saliency = torch.randn(4, 700, generator=generator).double(), torch.rand(size, generator=generator)
        planes = {Features(): x[None], Embeddings(): y[None], Attention(): saliency[None]}
        batch = crop_batch(planes, words[None])
        expected = {
            SCOPE: loops.scope(x, saliency.double(), count),
            MMTok: loops.mmtok(y, x, words, count),
            CDPruner: loops.cdpruner(y, words, count),
        }
        for method, picks in expected.items():
            shared = set(method(keep=count).pick(batch, count)[0].tolist()) & set(picks.tolist())
            assert len(shared) >= least[method] * count, method.name


@pytest.mark.slow
@every_method
def test_memory_of_a_4k_screenshot(method):
    batch = crops(method, 9216, width=1024)
    meter = MemoryMeter(torch.device("cpu"))
    try:
        method(keep=1024).pick(batch, 1024)
        meter.stop("select")
        assert meter.peaks()["select"] < 700 * 2**20
    finally:
        meter.close()
