"""SGL: what it cuts where, and how the attention of a small model adds up to scores."""

from __future__ import annotations

import pytest
import torch
from layer_cases import layer_tokens

from foveate import FoveateError
from foveate.core.errors import BudgetError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.probes import Prior
from foveate.core.rows import Rows
from foveate.engines.transformers.prompt_tokens import PromptTokens
from foveate.guided.attention_sum import AttentionSum
from foveate.guided.guide import Answer, Outcome
from foveate.methods import SGL

PREFILL = [
    [[0.10, 0.20, 0.05, 0.05], [0.05, 0.30, 0.05, 0.10]],
    [[0.02, 0.05, 0.03, 0.20], [0.04, 0.06, 0.10, 0.05]],
]
LAST_VISUAL = [[0.15, 0.04, 0.04, 0.20], [0.05, 0.06, 0.06, 0.10]]
DECODE = [[0.02, 0.04, 0.30, 0.04], [0.10, 0.05, 0.25, 0.05]]


def attending(rows, first):
    """Make one head whose rows attend like that to four visual tokens, and with the rest to the token behind them."""
    size = first + len(rows)
    maps = torch.full((size, max(size, 5)), 1e-9)
    for i, row in enumerate(rows):
        maps[first + i, :4] = torch.tensor(row)
        maps[first + i, 4] = 1 - sum(row)
    query, key = torch.eye(size)[None, None], maps.log().T[None, None]
    return Rows(query, key, 1.0, torch.zeros(1, 1, size, key.shape[2]))


def toy(decode=True, include_last_visual=False, **config):
    """Run the toy: four visual tokens, two of text, and one token of the answer that is read."""
    prompt = PromptTokens(0, (), (), torch.arange(4), behind=2)
    ids = torch.arange(6)[None]
    method = SGL(include_last_visual=include_last_visual, **config)
    total = AttentionSum([prompt], None, ids, torch.tensor([99]), method)
    total.begin(ids)
    for prefill, last in zip(PREFILL, LAST_VISUAL, strict=True):
        total.add(attending([last, *prefill], 3))
    if decode:
        total.begin(torch.tensor([[7]]))
        for row in DECODE:
            rows = attending([row], 6)
            total.add(Rows(rows.query[:, :, 6:], rows.key, 1.0, torch.zeros(1, 1, 1, rows.key.shape[2])))
    return total.scores()[0]


def rounded(x):
    return [round(v, 4) for v in x.tolist()]


def best(scores, count=2):
    (selection,) = SGL(keep=count).select(layer_tokens([4], [count], {Prior(): [scores]}))
    return selection.kept.tolist()


def test_scores_of_the_toy():
    assert rounded(toy(decode=False)) == [0.21, 0.61, 0.23, 0.40]
    assert rounded(toy()) == [0.33, 0.70, 0.78, 0.49]
    assert rounded(toy() - toy(decode=False)) == [0.12, 0.09, 0.55, 0.09]
    assert best(toy()) == [1, 2]
    assert best(toy(decode=False)) == [1, 3]
    assert rounded(toy(include_last_visual=True)) == [0.53, 0.80, 0.88, 0.79]
    assert SGL().include_last_visual  # as the authors' code slices


def test_normalised_scores_are_the_mean_of_two_means():
    expected = [(p / 2 + d) / 2 for p, d in zip([0.21, 0.61, 0.23, 0.40], [0.12, 0.09, 0.55, 0.09], strict=True)]
    assert toy(normalise=True).tolist() == pytest.approx(expected, abs=1e-6)


def test_rows_behind_the_end_of_an_answer_do_not_count():
    prompt = PromptTokens(0, (), (), torch.arange(4), behind=2)
    total = AttentionSum([prompt], None, torch.arange(6)[None], torch.tensor([7]), SGL(include_last_visual=False))
    total.begin(torch.arange(6)[None])
    for prefill in PREFILL:
        total.add(attending(prefill, 4))
    for token in (7, 0):
        total.begin(torch.tensor([[token]]))
        rows = attending([DECODE[0]], 6)
        total.add(Rows(rows.query[:, :, 6:], rows.key, 1.0, torch.zeros(1, 1, 1, rows.key.shape[2])))
    assert rounded(total.scores()[0]) == [0.21, 0.61, 0.23, 0.40]


def test_early_exit_of_the_toy():
    answer = Answer.of(torch.tensor([[5, 6, 7]]), torch.tensor([2]))
    (confidence,) = answer.geometric(torch.tensor([[0.9, 0.8, 0.95]]).log())
    (consistency,) = answer.product(torch.tensor([[0.85, 0.9, 0.9]]).log())
    assert confidence == pytest.approx(0.881087, abs=1e-6)
    assert consistency == pytest.approx(0.6885, abs=1e-6)
    assert Outcome("small", confidence, consistency, torch.empty(0)).score == pytest.approx(0.784793, abs=1e-6)


def test_probabilities_end_with_the_answer():
    answer = Answer.of(torch.tensor([[5, 2, 0], [2, 0, 0], [5, 6, 7]]), torch.tensor([2]))
    assert answer.lengths == [1, 0, 3]
    assert answer.given == [2, 1, 3]
    logs = torch.full((3, 3), 0.5).log()
    assert answer.product(logs) == pytest.approx([0.5, 0.0, 0.125])
    assert answer.geometric(logs) == pytest.approx([0.5, 0.0, 0.5])


@pytest.mark.parametrize(("depth", "share", "boundary", "mean"), [
    (48, 0.4, 19, 0.6375), (48, 0.3, 14, 0.5042), (48, 0.2, 9, 0.3500), (48, 0.05, 2, 0.0896),
    (80, 0.4, 32, 0.6400), (80, 0.3, 24, 0.5100), (80, 0.2, 16, 0.3600), (80, 0.05, 4, 0.0975),
    (32, 0.4, 12, 0.6250), (32, 0.3, 9, 0.4969), (32, 0.2, 6, 0.3500), (32, 0.05, 1, 0.0797),
])  # fmt: skip
def test_mean_shares(depth, share, boundary, mean):
    method = SGL(keep=share, depth=share)
    assert list(method.boundaries(depth)) == [boundary]
    received = tokens_per_layer(method, depth, 10_000)
    assert sum(received) / depth / 10_000 == pytest.approx(mean, abs=5e-5)


@pytest.mark.parametrize(("wanted", "layer", "ratio"), [(192, 6, 0.1795), (128, 3, 0.142), (64, 1, 0.0824)])
def test_equivalents(wanted, layer, ratio):
    (count,) = SGL(equivalent=wanted, layer=layer).counts(32, [("image", 576)])
    assert count / 576 == pytest.approx(ratio, abs=1e-3)


def test_counts_are_rounded_down():
    assert SGL(keep=0.3).counts(10, [("image", 64), ("image", 5)]) == (20,)
    assert SGL(keep=0.05).counts(10, [("image", 9)]) == (1,)
    assert SGL(keep=8).counts(10, [("image", 64), ("image", 5)]) == (13,)


def test_bad_settings():
    with pytest.raises(BudgetError):
        SGL(consistency_keep=0.0)
    with pytest.raises(FoveateError, match="share of the layers"):
        SGL(depth=1.0)
    for layer in (2.5, "2", True, 0, [2]):
        with pytest.raises(FoveateError, match="layer"):
            SGL(layer=layer)
    for wrong in ({"depth": "0.3"}, {"consistency_keep": "all"}):
        with pytest.raises(FoveateError, match=next(iter(wrong))):
            SGL(**wrong)
    with pytest.raises(FoveateError, match="layers 0 to 3"):
        SGL(depth=0.1).boundaries(4)
