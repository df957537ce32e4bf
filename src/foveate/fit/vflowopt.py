"""Calibration: a search for VFlowOpt's parameters on a few prompts of the user's own, for one model and one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from foveate.core.errors import FoveateError, InputError
from foveate.engines.settings import Settings
from foveate.engines.transformers.attach import attach
from foveate.engines.transformers.reduce import base_model
from foveate.families import family_of
from foveate.methods.vflowopt_stages import VFlowOptAll, cuts

PENALTY: Final = -1.0
"""The score of parameters that no ratio of the last stage brings to the budget: that of the opposite direction."""
_FIRST, _SECOND = 1.5, 0.8 / 1.5  # the authors' ranges: the encoder keeps up to 1.5 times the budget ...
_T, _A, _GRID = 50.0, (3.0, 24.0), 27  # ... and blocks of 3 to 24 patches on a grid of 27 x 27


@dataclass(frozen=True)
class Calibration:
    """What a search has found.

    Attributes
    ----------
    reducer
        The best method.
    score
        Its mean cosine to the unpruned model.
    default
        The score of ``VFlowOptAll(keep=share)``, with no search.
    share
        The mean share of visual tokens that the layers receive with the best method.
    scores
        The score of every call, in order; `PENALTY` where the budget cannot be met.
    """

    reducer: VFlowOptAll
    score: float
    default: float
    share: float
    scores: tuple[float, ...]


def calibrate(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    keep: float,
    calls: int = 300,
    initial: int = 27,
    seed: int = 42,
    done: Callable[[float], None] = lambda _: None,
) -> Calibration:
    """Search for the ratios, the threshold of judges and the side of blocks with which VFlowOpt changes least.

    The objective is the cosine between the hidden states of the last prompt token behind the last layer, unpruned and
    pruned, mean over the prompts. A Gaussian process proposes the ratios of the encoder and of the first boundary, `t`
    and `a`; the ratio of the second boundary follows from the budget.

    Parameters
    ----------
    model
        A `transformers` model of a family with an attention-based vision encoder.
    prompts
        Model inputs of one prompt each, as its processor returns them; the paper takes 30.
    keep
        The budget: the mean share of visual tokens that the layers receive, between 0 and 1.
    calls, initial
        How many parameters are tried, and how many of them at random before the first proposal.
    seed
        Of the search.
    done
        Called with the score of each call.

    Raises
    ------
    FoveateError
        If optuna is not installed, or no parameters that were tried meet the budget.
    InputError
        If an argument is out of range, or a prompt holds no image or is padded at its end.

    Notes
    -----
    Costs one forward pass per prompt and call. Deviations from the paper: the weight of entropy is 0, as in what was
    released. Whether the hidden state is taken behind the last norm is UNVERIFIED: here it is. The range of `a` is
    scaled to the longest side of a token grid.
    """
    _check(prompts, keep, calls, initial)
    optuna = _optuna()
    model = base_model(model)
    family = family_of(model)
    Settings.make(VFlowOptAll(keep=keep), family=family)
    if not all(any(inputs.get(key) is not None for key in family.inputs) for inputs in prompts):
        raise InputError("a prompt of the calibration set holds no image: VFlowOpt would have nothing to drop")
    spans = [span for inputs in prompts for span in family.spans(model, inputs)]
    side = max(max(crop.grid) for span in spans for crop in span.crops if crop.grid)
    depth = int(model.get_decoder().config.num_hidden_layers)
    boundaries = cuts(depth)
    unpruned = [_last_state(model, inputs) for inputs in prompts]

    def score(reducer: VFlowOptAll) -> float:
        with attach(model, reducer):
            pruned = [_last_state(model, inputs) for inputs in prompts]
        pairs = zip(unpruned, pruned, strict=True)
        return float(torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs]).mean())

    def proposed(trial: Any) -> VFlowOptAll | None:
        first = trial.suggest_float("first", keep, min(1.0, _FIRST * keep))
        others = [trial.suggest_float(f"ratio_{i}", _SECOND, 1.0) for i in range(1, len(boundaries))]
        t = trial.suggest_float("t", 0.0, _T)
        a = trial.suggest_float("a", *(x * side / _GRID for x in _A))
        last = last_ratio(depth, boundaries, keep, (first, *others))
        return None if last is None else VFlowOptAll(ratios=(first, *others, last), t=t, a=a)

    def objective(trial: Any) -> float:
        reducer = proposed(trial)
        value = PENALTY if reducer is None else score(reducer)
        done(value)
        return value

    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=initial)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=calls)
    best = proposed(study.best_trial)
    if best is None or best.ratios is None:
        raise FoveateError(f"none of {calls} calls met a budget of {keep:g}: try more calls")
    return Calibration(
        best,
        study.best_value,
        score(VFlowOptAll(keep=keep)),
        mean_share(depth, boundaries, best.ratios),
        tuple(trial.value for trial in study.trials),
    )


def mean_share(depth: int, boundaries: Sequence[int], ratios: Sequence[float]) -> float:
    """Return the mean share of visual tokens that layers receive, where `ratios` has one more entry for the encoder."""
    widths = [after - before for before, after in pairwise((0, *boundaries, depth))]
    left = [math.prod(ratios[: stage + 1]) for stage in range(len(ratios))]
    return sum(width * share for width, share in zip(widths, left, strict=True)) / depth


def last_ratio(depth: int, boundaries: Sequence[int], share: float, ratios: Sequence[float]) -> float | None:
    """Return the ratio of the last boundary, at most 1, that makes `mean_share` a given one; `None` if there is none.

    Parameters
    ----------
    ratios
        Those of the encoder and of all other boundaries.
    """
    spent = mean_share(depth, boundaries, (*ratios, 0.0))
    ratio = (share - spent) * depth / ((depth - boundaries[-1]) * math.prod(ratios))
    return min(ratio, 1.0) if ratio > 0 else None


def _optuna() -> Any:
    try:
        import optuna
        import scipy  # noqa: F401  what the sampler needs
    except ImportError as error:
        raise FoveateError(f"calibration needs {error.name}: pip install 'foveate[calibrate]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _check(prompts: Sequence[Mapping[str, Any]], keep: float, calls: int, initial: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, float) or not 0.0 < keep < 1.0:
        raise InputError(f"calibration is for a share of the tokens such as 0.25, below 1.0, not {keep!r}")
    if initial < 1 or calls < initial:
        raise InputError(f"of {calls} calls {initial} cannot be the first, random ones: give 1 <= initial <= calls")
    if not prompts:
        raise InputError("calibration needs at least one prompt with an image")
    for inputs in prompts:
        mask = inputs.get("attention_mask")
        if len(inputs["input_ids"]) != 1 or (mask is not None and not bool(mask[:, -1].all())):
            raise InputError("calibration reads the end of each prompt: give it one prompt at a time, without padding")


@torch.no_grad()
def _last_state(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return what leaves the LLM at the last token of a prompt, ``[D]`` float32."""
    states: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda _, args, out: states.append(out.last_hidden_state[0, -1]))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return states[-1].float()
