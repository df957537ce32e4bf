"""FSR against a plain version in float64: the tokens that it keeps, and what flows into them."""

import math

import pytest
import torch
from greedy_cases import S16, SALIENCY16, cases, choose, cosines, crop_batch, exact_features, text

from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Embeddings, Query
from foveate.methods import FSR
from tiny import visual_tokens


def scaled(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low + 1e-6) if high - low > 1e-6 else 1.0 for v in values]


def reference(features, saliency, query, count, focus=0.9):
    """Return the tokens in order of picking, the number in focus, the weights ``[T][N]``, and the smallest gap."""
    n, gap = len(features), math.inf
    similarity = cosines(features, features)
    score = scaled(saliency)
    if query:
        relevance = scaled([math.fsum(row) / len(row) for row in cosines(features, query)])
        score = [s * r**3 for s, r in zip(score, relevance, strict=True)]
    by_score = sorted(range(n), key=lambda i: -score[i])
    picks, mass = [], 0.0
    for i in by_score:
        gap = min([gap, *(abs(score[i] - score[j]) for j in range(n) if score[j] != score[i])])
        picks.append(i)
        mass += score[i]
        gap = min(gap, abs(mass - focus * math.fsum(score)))
        if mass >= focus * math.fsum(score) or len(picks) == count:
            break
    focused = len(picks)
    while len(picks) < count:
        pick, ahead = choose({i: -max(similarity[i][j] for j in picks) for i in range(n) if i not in picks})
        picks.append(pick)
        gap = min(gap, ahead)
    weights = [[float(i == k) for i in range(n)] for k in picks]
    scanned = picks[focused:]
    if scanned:
        dropped = [i for i in range(n) if i not in picks]
        nearness = {i: max(similarity[i][j] for j in scanned) for i in dropped}
        for i in sorted(dropped, key=lambda i: -nearness[i])[: len(scanned)]:
            gap = min([gap, *(abs(nearness[i] - v) for j, v in nearness.items() if j != i and v != nearness[i])])
            apart = [abs(nearness[i] - similarity[i][j]) for j in scanned if similarity[i][j] != nearness[i]]
            gap = min([gap, *apart])
            nearest = next(j for j in scanned if similarity[i][j] == nearness[i])
            weights[picks.index(nearest)][i] = max(nearness[i], 0.0)
    return picks, focused, [[w / math.fsum(row) for w in row] for row in weights], gap


def merge(features, saliency, query, count, **config):
    """Return the kept tokens in the method's own order, and the weights ``[T, N]``."""
    planes = {Embeddings(): torch.as_tensor(features)[None], Attention(): torch.as_tensor(saliency)[None]}
    query = torch.as_tensor(query, dtype=torch.float32).reshape(1, -1, planes[Embeddings()].shape[-1])
    groups = FSR(keep=count, **config).pick(crop_batch(planes, query), count)
    dense = torch.zeros(count, groups.source.shape[1])
    dense.index_put_((groups.target[0], groups.source[0]), groups.weight[0], accumulate=True)
    return groups.kept[0].tolist(), dense


@pytest.mark.parametrize("focus", [0.9, 0.3, 1.0])
def test_random_inputs_give_the_reference_groups(focus):
    compared = 0
    splits = set()
    for n, count, dtype, generator in cases(100, seed=18):
        features = torch.randn(n, 6, generator=generator).to(dtype)
        saliency = (torch.rand(n, generator=generator) ** 4).to(dtype)
        query = torch.randn(n % 4, 6, generator=generator).to(dtype)
        picks, focused, weights, gap = reference(features.tolist(), saliency.tolist(), query.tolist(), count, focus)
        if gap < 1e-5:
            continue
        compared += 1
        kept, dense = merge(features, saliency, query, count, focus=focus)
        assert kept == picks, (n, count)
        torch.testing.assert_close(dense, torch.tensor(weights), atol=1e-5, rtol=1e-5)
        splits.add((focused == count, focused > 1))
    assert compared > 40
    if focus < 1:
        assert (False, True) in splits  # a focus of several tokens, and a scan
    if focus > 0.5:
        assert (True, True) in splits  # nothing but focus


def test_wave_fixture():
    picks, focused, weights, gap = reference(S16, SALIENCY16, text(3), 8)
    assert gap > 1e-5
    assert 1 < focused < 8
    kept, dense = merge(S16, SALIENCY16, text(3), 8)
    assert kept == picks
    torch.testing.assert_close(dense, torch.tensor(weights), atol=1e-5, rtol=1e-5)


def test_a_scanned_token_absorbs_its_like():
    # Token 0 is what the question asks for; tokens 1 and 2 are context, 3 to 5 resemble them, 6 nothing.
    features = torch.tensor(
        [
            [1.0, 0, 0, 0],
            [0, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 3, 0, 0.3],
            [0, 0.6, 0.8, 0],
            [0.8, 0.6, 0, 0],
            [0.7, 0, 0, 0.7],
        ]
    )
    saliency = torch.tensor([1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    kept, dense = merge(features, saliency, features[:1], 3, focus=0.5)
    assert kept == [0, 1, 2]
    assert dense[0].tolist() == [1, 0, 0, 0, 0, 0, 0]  # what is in focus stays as it is
    near = 3 / 9.09**0.5
    assert dense[1].tolist() == pytest.approx([0, 1 / (1 + near), 0, near / (1 + near), 0, 0, 0])
    assert dense[2].tolist() == pytest.approx([0, 0, 1 / 1.8, 0, 0.8 / 1.8, 0, 0])


def test_the_question_counts():
    features = torch.eye(8)
    saliency = torch.full((8,), 0.5)
    for i in (2, 5):
        kept, dense = merge(features, saliency, features[i : i + 1], 3)
        assert kept[0] == i
        assert torch.equal(dense, torch.eye(8)[kept])  # nothing resembles anything


def test_without_text_attention_decides():
    features, saliency = torch.randn(30, 6), torch.rand(30) ** 6
    kept, _ = merge(features, saliency, torch.empty(0, 6), 9, focus=1.0)
    assert kept == saliency.argsort(descending=True)[:9].tolist()
    same, _ = merge(features, saliency, torch.zeros(2, 6), 9, focus=1.0)
    assert same == kept  # no difference in relevance


def test_exact_ties_go_to_the_earlier_token():
    for n, count, dtype, generator in cases(60, seed=19):
        features = exact_features(n, generator)
        saliency = torch.ones(n)
        saliency[int(torch.randint(n, (), generator=generator))] = 1e6
        picks, _, weights, _ = reference(features.tolist(), saliency.tolist(), [], count)
        kept, dense = merge(features.to(dtype), saliency, torch.empty(0, 8), count)
        assert kept == picks
        torch.testing.assert_close(dense, torch.tensor(weights), atol=1e-5, rtol=1e-5)


def test_edges():
    unknown = torch.full((6,), math.nan)
    kept, dense = merge(torch.zeros(6, 4), unknown, torch.ones(2, 4), 4)
    assert sorted(kept) == [0, 1, 2, 3]
    assert torch.equal(dense.sum(dim=1), torch.ones(4))
    saliency = torch.tensor([0.2, math.nan, 0.4, 0.1, 0.3, 0.2])
    assert merge(torch.eye(6), saliency, torch.empty(0, 6), 1)[0] == [2]
    assert merge(-torch.eye(6)[:, :1].expand(6, 4), saliency, torch.ones(1, 4), 5)[1].isfinite().all()


def test_batch_equals_loop_over_crops():
    features, saliency, query = torch.randn(5, 33, 6), torch.rand(5, 33) ** 4, torch.randn(5, 3, 6)
    groups = FSR(keep=12, focus=0.5).pick(crop_batch({Embeddings(): features, Attention(): saliency}, query), 12)
    for b in range(5):
        kept, dense = merge(features[b], saliency[b], query[b], 12, focus=0.5)
        assert groups.kept[b].tolist() == kept
        row = torch.zeros(12, 33)
        row.index_put_((groups.target[b], groups.source[b]), groups.weight[b], accumulate=True)
        torch.testing.assert_close(row, dense)


def test_weights_sum_to_one_at_their_anchors():
    reducer = FSR(keep=20)
    assert Query() in reducer.needs
    (span,) = reducer.select(visual_tokens(reducer, [(0, [(8, 8)])]))
    span.check()
    torch.testing.assert_close(span.apply(torch.ones(65, 1)), torch.ones(20, 1))
    own = {(int(t), int(s)) for t, s, w in zip(*vars(span.merge).values(), strict=True) if w > 0}
    assert {(t, int(i)) for t, i in enumerate(span.kept)} <= own


@pytest.mark.parametrize("focus", [0.0, -0.1, 1.1])
def test_impossible_shares_are_refused(focus):
    with pytest.raises(FoveateError, match="focus"):
        FSR(keep=8, focus=focus)
