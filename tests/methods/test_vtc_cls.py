"""VTC-CLS on attention of 24 layers that a formula gives."""

import math

import pytest
import torch
from greedy_cases import cases, crop_batch

from foveate.core.errors import FoveateError, UnsupportedModelError
from foveate.core.probes import Attention
from foveate.methods import VTCCLS, FasterVLM
from tiny import visual_tokens


def layer(number, n=64):
    total = [0.0] * n
    for h in range(4):
        row = [math.exp(2 * math.sin(2.3 * j + 0.5 * h + 0.2 * number)) for j in range(n + 1)]
        for i in range(n):
            total[i] += row[i + 1] / math.fsum(row) / 4
    return total


def planes(layers):
    return torch.tensor([layer(i) for i in layers]).T[None]


def pick(reducer, values, count):
    (probe,) = reducer.needs
    return reducer.pick(crop_batch({probe: values}), count)


def reference(values, count, reduce):
    """Return the kept tokens, and by how much the last of them is ahead of the first dropped one."""
    join = {"sum": math.fsum, "min": min, "max": max}[reduce]
    scores = [join(row) for row in values]
    by_score = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sorted(by_score[:count]), scores[by_score[count - 1]] - scores[by_score[count]]


@pytest.mark.parametrize(
    ("layers", "kept", "gap"),
    [
        (range(16, 23), [6, 14, 17, 25, 36, 44, 47, 55], 1.5e-3),
        ([22], [3, 11, 22, 33, 41, 44, 52, 63], 1.6e-4),
        (range(23), [1, 4, 12, 23, 31, 34, 42, 53], 1.3e-3),
        ([23], [0, 11, 22, 30, 33, 41, 52, 63], None),
    ],
    ids=["16..22", "22", "0..22", "23"],
)
def test_published_picks(layers, kept, gap):
    expected, ahead = reference([[layer(i)[j] for i in layers] for j in range(64)], 8, "sum")
    assert expected == kept
    if gap is not None:
        assert ahead == pytest.approx(gap, rel=0.05)
    assert pick(VTCCLS(keep=8), planes(layers), 8).tolist() == [kept]


def test_the_layers_of_clip():
    """The projector of LLaVA reads the output of layer 22; the last layer must not count."""
    (probe,) = VTCCLS(keep=8).needs
    assert probe.numbers(24, 22) == list(range(16, 23))
    assert VTCCLS(keep=8).needs == (Attention(layers=2 / 3),)
    (probe,) = VTCCLS(keep=8, start=0).needs
    assert probe.numbers(24, 22) == list(range(23))
    (probe,) = VTCCLS(keep=8, start=22 / 24).needs
    assert probe.numbers(24, 22) == [22]
    (probe,) = VTCCLS(keep=8, start=0.99).needs
    with pytest.raises(UnsupportedModelError, match=r"starts at layer 23, but .* 22, .* up to 22 / 24$"):
        probe.numbers(24, 22)


def test_layers_that_attend_within_windows_are_left_out():
    """Qwen2.5-VL has 32 layers, of which 4 attend to the whole picture."""
    whole = [7, 15, 23, 31]
    (probe,) = VTCCLS(keep=8).needs
    assert probe.numbers(32, 31, whole) == [23, 31]
    (probe,) = VTCCLS(keep=8, start=0.99).needs
    assert probe.numbers(32, 31, whole) == [31]
    with pytest.raises(UnsupportedModelError, match=r"layers \[7, 15\] attend to whole pictures"):
        probe.numbers(32, 31, whole[:2])


def test_the_last_layer_would_change_the_selection():
    with_last = pick(VTCCLS(keep=8), planes(range(16, 24)), 8)
    assert with_last.tolist() != pick(VTCCLS(keep=8), planes(range(16, 23)), 8).tolist()


def test_a_single_layer_is_fastervlm():
    values = torch.rand(3, 40)
    single = pick(VTCCLS(keep=9), values[:, :, None], 9)
    tokens = visual_tokens(FasterVLM(keep=9), [(0, [(5, 8)])])
    tokens.planes[Attention()] = [values[0]]
    (span,) = FasterVLM(keep=9).select(tokens)
    assert span.kept.tolist() == single[0].tolist()


def test_layers_are_not_normalised():
    values = planes(range(16, 23))
    louder = values * torch.tensor([9.0, 1, 1, 1, 1, 1, 1])
    assert pick(VTCCLS(keep=8), values, 8).tolist() != pick(VTCCLS(keep=8), louder, 8).tolist()
    assert pick(VTCCLS(keep=8), values, 8).tolist() == pick(VTCCLS(keep=8), 9 * values, 8).tolist()


@pytest.mark.parametrize("reduce", ["sum", "min", "max"])
def test_random_inputs_give_the_reference_selection(reduce):
    for n, count, dtype, generator in cases(60, seed=1):
        values = torch.rand(n, 3, generator=generator).to(dtype)
        if n % 3 == 0:
            values = (4 * values).round() / 4  # exact ties
        kept, gap = reference(values.tolist(), count, reduce)
        assert gap == 0 or gap > 1e-6
        got = pick(VTCCLS(keep=count, reduce=reduce), values[None], count)
        assert got.tolist() == [kept]


def test_what_is_no_number_comes_last():
    values = torch.full((1, 6, 2), 0.5)
    values[0, 1, 0] = math.nan
    assert pick(VTCCLS(keep=5), values, 5).tolist() == [[0, 2, 3, 4, 5]]
    assert pick(VTCCLS(keep=2), torch.zeros(1, 6, 2), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("config", "message"), [({"start": 1.0}, "start"), ({"start": -0.1}, "start"), ({"reduce": "mean"}, "reduce")]
)
def test_impossible_parameters_are_refused(config, message):
    with pytest.raises(FoveateError, match=message):
        VTCCLS(keep=8, **config)
