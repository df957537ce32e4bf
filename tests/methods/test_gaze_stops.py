"""Gaze with `tau`: how many tokens a crop needs, and the calibration of a mean number."""

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError, InputError
from foveate.fit.gaze import calibrate
from foveate.methods import Gaze, GazeQuery
from foveate.registry import load_reducer
from tiny import collate, model, sample, visual_tokens

LAYOUT = [(0, [(5, 6)]), (1, [(4, 5), (5, 6)])]


def kept(reducer):
    return [len(c) for c in reducer.select(visual_tokens(reducer, LAYOUT))]


def test_gains_are_those_of_the_picking():
    reducer, seen = Gaze(keep=9, tau=1e-9), []

    def pick(crops, count):
        picks, scores = reducer.pick(crops, count), []
        unit = torch.nn.functional.normalize(crops.probe(foveate.author.probes.Embeddings()).double(), dim=-1)
        centred = unit - unit.mean(dim=1, keepdim=True)
        weight = reducer._weight(crops).double()
        for b in range(len(picks)):
            variance = centred[b].square().sum(-1).mean()
            near = torch.stack([reducer._nearness(crops, torch.tensor([[i]]))[0] for i in range(crops.size)])
            kernel = centred[b] @ centred[b].T / variance * near
            for t in range(1, count):
                p, earlier = picks[b, t], picks[b, 1:t]
                gain = kernel[p, p] + reducer.ridge
                if len(earlier):
                    inner = kernel[earlier][:, earlier] + reducer.ridge * torch.eye(len(earlier))
                    gain = gain - kernel[p, earlier] @ torch.linalg.solve(inner, kernel[earlier, p])
                scores.append(float(weight[b, p] * gain))
        least = torch.tensor(scores).reshape(len(picks), -1).cummin(dim=1).values
        torch.testing.assert_close(reducer.falling(crops, picks).float(), least, atol=1e-4, rtol=1e-4)
        seen.append(len(picks))
        return picks

    visual_tokens(reducer, LAYOUT).per_crop(9, pick)
    assert sum(seen) == 3


def test_tau_stops_between_the_least_and_the_budget():
    many, few = kept(Gaze(keep=12, tau=1e-9)), kept(Gaze(keep=12, tau=1e9))
    assert many == kept(Gaze(keep=12))
    assert few == [4, 8]
    assert kept(Gaze(keep=12, tau=1e9, least=2)) == [2, 4]
    assert kept(Gaze(keep=3, tau=1e9)) == [3, 3]
    between = kept(Gaze(keep=12, tau=0.9))
    assert all(a <= b <= c for a, b, c in zip(few, between, many, strict=True))


def test_fewer_are_the_first_of_more():
    whole = Gaze(keep=12).select(visual_tokens(Gaze(keep=12), LAYOUT))
    for tau in (0.3, 0.6, 0.9):
        reducer = Gaze(keep=12, tau=tau)
        for few, all_of_them in zip(reducer.select(visual_tokens(reducer, LAYOUT)), whole, strict=True):
            assert {*few.kept.tolist()} <= {*all_of_them.kept.tolist()}


def test_plain_ones_are_written_as_before():
    assert Gaze(keep=8).to_dict() == {"method": "gaze", "keep": 8, "spread": 0.25, "ridge": 0.1, "saliency": 0.5}
    stopping = Gaze(keep=8, tau=0.5, least=3)
    assert (
        load_reducer(**{"method": "gaze", **{k: v for k, v in stopping.to_dict().items() if k != "method"}}) == stopping
    )
    assert stopping.adaptive
    assert not Gaze(keep=8).adaptive


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"tau": -1.0}, {"tau": float("inf")}, {"least": 0}], ids=str)
def test_refused(wrong):
    with pytest.raises(FoveateError, match=next(iter(wrong))):
        Gaze(keep=8, **wrong)


@pytest.mark.parametrize("method", [Gaze, GazeQuery])
def test_calibration_finds_the_mean(method):
    net = model("llava")
    prompts = [collate([sample(4, "image", 5, seed=i)]) for i in range(6)]
    found = calibrate(net, prompts, 6, method)
    assert found.mean <= 6
    assert 4 <= min(found.counts) <= max(found.counts) <= 24
    with foveate.attach(net, found.reducer) as handle:
        own = []
        for inputs in prompts:
            net(**inputs)
            own.append(len(handle.selections[0][0]))
    assert tuple(own) == found.counts
    with pytest.raises(InputError, match="at least 4"):
        calibrate(net, prompts, 3)
    with pytest.raises(InputError, match="more than 256"):
        calibrate(net, prompts, 64)
