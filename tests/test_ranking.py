import math

import pytest
import torch

from foveate.core.ranking import (
    added_coverage,
    cosine_matrix,
    descending,
    make_room,
    min_max,
    open_scores,
    ranks,
    row_of,
    take_best,
    top,
)


def test_descending_is_stable_and_puts_what_is_no_number_last():
    scores = torch.tensor([[0.5, math.nan, 2.0, 0.5, -math.inf, 2.0, math.inf, math.nan]])
    assert descending(scores).tolist() == [[6, 2, 5, 0, 3, 4, 1, 7]]
    assert descending(torch.zeros(2, 40)).tolist() == [list(range(40))] * 2


def test_top_is_ascending():
    assert top(torch.tensor([[0.1, 3.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]]), 2).tolist() == [[1, 3], [0, 1]]


def test_cosines():
    x = torch.randn(2, 5, 7)
    x[0, 3] = 0
    expected = torch.nn.functional.cosine_similarity(x[:, :, None].double(), x[:, None].double(), dim=-1)
    torch.testing.assert_close(cosine_matrix(x).double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(cosine_matrix(x)[0, 3], torch.zeros(5))
    assert torch.equal(cosine_matrix(x.half()), cosine_matrix(x.half().float()))


def test_ranks_are_places_in_descending_order():
    scores = torch.tensor([[0.5, math.nan, 2.0, 0.5, -math.inf, 2.0, math.inf, math.nan]])
    assert ranks(scores).tolist() == [[3, 6, 1, 4, 5, 2, 0, 7]]


def test_min_max():
    scores = torch.tensor([[3.0, math.nan, 5.0, 4.0], [7.0, 7.0, 7.0, 7.0 + 5e-7], [math.nan] * 4])
    torch.testing.assert_close(min_max(scores)[0], torch.tensor([0.0, 0.0, 1.0, 0.5]), atol=1e-6, rtol=0)
    assert min_max(scores)[1:].tolist() == [[1.0] * 4] * 2
    assert torch.equal(min_max(scores[:1].half()), min_max(scores[:1]))


def test_cosines_with_others():
    x, y = torch.randn(2, 5, 7), torch.randn(2, 3, 7)
    expected = torch.nn.functional.cosine_similarity(x[:, :, None].double(), y[:, None].double(), dim=-1)
    torch.testing.assert_close(cosine_matrix(x, y).double(), expected, atol=1e-6, rtol=1e-6)


def test_the_best_is_the_first_of_those_not_taken():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [math.nan, -math.inf, math.nan, -2.0], [0.0, 0.0, 0.0, 0.0]])
    taken = torch.zeros(3, 4, dtype=torch.bool)
    picks = [take_best(scores, taken).flatten().tolist() for _ in range(4)]
    assert list(map(list, zip(*picks, strict=True))) == [[1, 2, 3, 0], [3, 0, 1, 2], [0, 1, 2, 3]]
    assert taken.all()
    assert scores[0].tolist() == [1.0, 3.0, 3.0, 2.0]


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-20, 1e20])
def test_noise_does_not_decide(scale):
    for difference, first in ((2e-7, 0), (1e-5, 1)):
        scores = scale * torch.tensor([[1 - difference, 1.0] if scale > 0 else [1 + difference, 1.0]])
        assert take_best(scores, torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[first]]


@pytest.mark.parametrize("worst", [math.nan, -math.inf, torch.finfo(torch.float32).min])
def test_what_is_taken_is_below_everything(worst):
    scores = torch.tensor([[math.inf, worst, 1.0, worst, math.inf]])
    taken = torch.zeros(1, 5, dtype=torch.bool)
    assert [take_best(scores, taken).item() for _ in range(5)] == [0, 4, 2, 1, 3]
    taken = torch.tensor([[True, False, True, False, False]])
    ranked = open_scores(scores, taken).argsort(dim=1, descending=True, stable=True)
    assert ranked.tolist() == [[4, 1, 3, 0, 2]]


def test_rows_and_coverage():
    matrix, covered = torch.rand(2, 5, 7), torch.rand(2, 7)
    assert torch.equal(row_of(matrix, torch.tensor([[3], [1]])), torch.stack([matrix[0, 3], matrix[1, 1]]))
    for b in range(2):
        for i in range(5):
            expected = sum(max(0.0, float(x - c)) for x, c in zip(matrix[b, i], covered[b], strict=True))
            assert added_coverage(matrix, covered)[b, i].item() == pytest.approx(expected, abs=1e-5)


def test_room_at_the_ends():
    anchors = torch.tensor([[0, 1, 5, 9], [2, 3, 4, 5], [6, 7, 8, 9]])
    assert make_room(anchors, 10).tolist() == anchors.tolist()
    assert make_room(anchors, 10, front=1).tolist() == [[1, 2, 5, 9], [2, 3, 4, 5], [6, 7, 8, 9]]
    assert make_room(anchors, 10, back=1).tolist() == [[0, 1, 5, 8], [2, 3, 4, 5], [5, 6, 7, 8]]
    assert make_room(anchors, 6, front=1, back=1).tolist() == [[1, 2, 3, 4]] * 3
    assert make_room(anchors[:, :0], 3, front=2, back=1).shape == (3, 0)
