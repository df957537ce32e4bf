"""What the methods that pick token by token have in common."""

import pytest
import torch
from greedy_cases import crop_batch

from foveate.core.probes import Attention, Query
from foveate.core.ranking import cosine_matrix
from foveate.methods import DART, SCOPE, TOPS, CDPruner, DivPrune, GPrune, MMTok

METHODS = [DivPrune, CDPruner, SCOPE, MMTok, TOPS, DART, GPrune]

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def make_planes(method, batch, n, width=16, seed=0, dtype=torch.float32):
    """Make random planes ``[B, N, ...]``, and the words if the method reads them."""
    generator = torch.Generator().manual_seed(seed)
    planes = {}
    for probe in method.needs:
        if isinstance(probe, Attention):
            planes[probe] = torch.rand(batch, n, generator=generator).to(dtype)
        elif not isinstance(probe, Query):
            planes[probe] = torch.randn(batch, n, width, generator=generator).to(dtype)
    words = torch.randn(batch, 5, width, generator=generator).to(dtype) if method.query_aware else None
    return planes, words


def only(i, planes, words):
    return {p: x[i : i + 1] for p, x in planes.items()}, None if words is None else words[i : i + 1]


def pick(method, planes, words, count):
    return method(keep=count).pick(crop_batch(planes, words), count)


def kept(method, planes, words, count):
    return pick(method, planes, words, count).sort(dim=1).values.tolist()


@every_method
@pytest.mark.parametrize(("n", "count"), [(2, 1), (37, 1), (37, 12), (37, 36), (64, 20)])
def test_batch_equals_loop_over_crops(method, n, count):
    planes, words = make_planes(method, 5, n)
    alone = [kept(method, *only(i, planes, words), count)[0] for i in range(5)]
    assert kept(method, planes, words, count) == alone


@every_method
def test_position_of_a_token_does_not_matter(method):
    for seed in range(10):
        planes, words = make_planes(method, 1, 41, seed=seed)
        expected = kept(method, planes, words, 11)[0]
        order = torch.randperm(41, generator=torch.Generator().manual_seed(seed))
        shuffled = kept(method, {p: x[:, order] for p, x in planes.items()}, words, 11)[0]
        assert sorted(order[shuffled].tolist()) == expected


@every_method
@pytest.mark.parametrize("scale", [0.037, 3.7, 64.0])
def test_scale_does_not_matter(method, scale):
    planes, words = make_planes(method, 2, 41)
    scaled = {p: x * scale for p, x in planes.items()}
    assert kept(method, scaled, None if words is None else words * 3, 11) == kept(method, planes, words, 11)


@pytest.mark.parametrize("method", [DivPrune, CDPruner, SCOPE, MMTok, TOPS], ids=lambda m: m.name)
def test_norms_do_not_matter(method):
    planes, words = make_planes(method, 2, 41)
    each = torch.linspace(0.5, 3, 41)[:, None]
    stretched = {p: x if isinstance(p, Attention) else x * each for p, x in planes.items()}
    assert kept(method, stretched, words, 11) == kept(method, planes, words, 11)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_its_values_in_single(method, dtype):
    planes, words = make_planes(method, 3, 40, dtype=dtype)
    single = {p: x.float() for p, x in planes.items()}
    assert torch.equal(
        pick(method, planes, words, 17), pick(method, single, None if words is None else words.float(), 17)
    )


@every_method
@pytest.mark.parametrize("value", [0.0, 0.7, 1e-3, float("nan")])
@pytest.mark.parametrize("count", [1, 9, 26])
def test_equal_tokens_go_by_index(method, value, count):
    planes, words = make_planes(method, 2, 27, width=33)
    constant = {p: torch.full_like(x, value) for p, x in planes.items()}
    assert pick(method, constant, words, count).tolist() == [list(range(count))] * 2


@every_method
def test_copies_of_a_picture_of_few_colours(method):
    """The kept tokens of an image with many copies are distinct, and the same in any batch."""
    for seed in range(10):
        planes, words = make_planes(method, 2, 6, width=301, seed=seed)
        which = torch.randint(0, 6, (150,), generator=torch.Generator().manual_seed(seed))
        planes = {p: x[:, which] for p, x in planes.items()}
        chosen = kept(method, planes, words, 90)
        assert all(len(set(row)) == 90 for row in chosen)
        for i in range(2):
            assert kept(method, *only(i, planes, words), 90)[0] == chosen[i]


@pytest.mark.parametrize("method", [DivPrune, CDPruner, SCOPE, MMTok, TOPS], ids=lambda m: m.name)
def test_the_last_bits_of_cosines_decide_nothing_between_copies(method, monkeypatch):
    """Other kernels may sum products in another order for each pair of tokens."""
    generator = torch.Generator().manual_seed(0)

    def noisy(*features):
        exact = cosine_matrix(*features)
        return exact + 2e-7 * (torch.rand(exact.shape, generator=generator) - 0.5)

    for seed in range(10):
        planes, words = make_planes(method, 2, 6, width=301, seed=seed)
        which = torch.randint(0, 6, (150,), generator=generator)
        planes = {p: x[:, which] for p, x in planes.items()}
        expected = pick(method, planes, words, 90)
        with monkeypatch.context() as patch:
            patch.setattr("foveate.core.ranking.cosine_matrix", noisy)
            assert torch.equal(pick(method, planes, words, 90), expected)


@every_method
def test_tokens_that_are_no_numbers_or_zero_break_nothing(method):
    planes, words = make_planes(method, 1, 30)
    for value in (float("nan"), float("inf"), 0.0):
        broken = {p: x.clone() for p, x in planes.items()}
        for x in broken.values():
            x[:, [3, 4, 17]] = value
        for count in (1, 12, 29):
            chosen = kept(method, broken, words, count)[0]
            assert len(set(chosen)) == count
            assert 0 <= chosen[0] <= chosen[-1] < 30


@pytest.mark.parametrize("method", [CDPruner, MMTok], ids=lambda m: m.name)
def test_without_text_the_picture_decides(method):
    planes, words = make_planes(method, 2, 41)
    none = kept(method, planes, words[:, :0], 9)
    assert none != kept(method, planes, words, 9)
    assert all(len(set(row)) == 9 for row in none)
