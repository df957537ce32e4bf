import math

import torch

from foveate.ranking import cosine_matrix, descending, min_max, ranks, top


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
