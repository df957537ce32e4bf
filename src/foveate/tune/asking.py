"""One prompt, asked of the unpruned model and of the candidates in turn."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from foveate.core.errors import FoveateError, InputError
from foveate.core.reducer import Method
from foveate.engines.settings import Settings
from foveate.measure.job import Job, prepare
from foveate.measure.loading import open_image
from foveate.measure.run import Result, cost_of, run_once
from foveate.tune.prompts import Prompt, same_text

BLOCK: Final = 8
"""Candidates to one timed run of the unpruned model, which is at a random place among them."""


@dataclass(frozen=True, eq=False)
class Asker:
    """A model and how its answers are measured.

    Attributes
    ----------
    template
        See `foveate.measure.loading.prompt_for`.
    max_new_tokens
        Limit on answers.
    seed
        Decides in which order candidates take turns.
    now
        See `foveate.measure.timing.Clock`.
    rectify, absorb
        Of every candidate, see `foveate.engines.settings.Settings`.
    """

    model: Any
    processor: Any
    template: str | None = None
    max_new_tokens: int = 32
    seed: int = 0
    now: Callable[[], float] = time.perf_counter
    rectify: float = 0.0
    absorb: bool = False

    def ask(self, prompt: Prompt, candidates: Mapping[str, Method], *, count: bool = False) -> dict[str, Any]:
        """Run the unpruned model and every candidate on one prompt.

        A candidate that cannot run on the prompt has an ``"error"`` instead of figures.

        Parameters
        ----------
        count
            Also count FLOPs. Each arm runs once more for this, untimed and before its timed run.

        Returns
        -------
        dict
            JSON-compatible: what is said of the prompt, of the unpruned model and of each candidate. An infinite
            divergence is `None`.

        Raises
        ------
        InputError
            If the unpruned model cannot be asked; the message names the line of the prompt.
        """
        try:
            pictures = [open_image(path) for path in prompt.images]
            job = prepare(self.model, self.processor, pictures, prompt.question, self.template, self.max_new_tokens)
            stock, reference = self._run(job, None)  # the first run of a prompt is not timed
            stock_flops = self._flops(job, None) if count else None
        except FoveateError as error:
            raise InputError(f"the prompt in line {prompt.line}: {error}") from error
        arms: dict[str, Any] = {}
        seconds = []
        draw = random.Random(f"{self.seed}/{prompt.line}")
        names = draw.sample(list(candidates), len(candidates))
        for start in range(0, len(names), BLOCK):
            block: list[str | None] = [*names[start : start + BLOCK]]
            block.insert(draw.randint(0, len(block)), None)
            for name in block:
                if name is None:
                    seconds.append(_total(self._run(job, None)[0]))
                    continue
                arms[name] = self._arm(job, prompt, candidates[name], stock, reference, stock_flops)
            for name in block:
                if name is not None and "error" not in arms[name]:
                    arms[name]["time"] = arms[name]["seconds"] / seconds[-1]
        return {
            "line": prompt.line, "answer": stock.answer, "right": _right(prompt, stock), "seconds": median(seconds),
            "arms": arms,
        }  # fmt: skip

    def _arm(
        self, job: Job, prompt: Prompt, reducer: Method, stock: Result, reference: Tensor, stock_flops: int | None
    ) -> dict[str, Any]:
        try:
            flops = self._flops(job, reducer) if stock_flops else None
            result, logits = self._run(job, reducer)
        except FoveateError as error:
            return {"error": str(error)}
        kl = divergence(reference, logits)
        return {
            "answer": result.answer, "same": result.answer == stock.answer, "right": _right(prompt, result),
            "kl": kl if math.isfinite(kl) else None, "seconds": _total(result),
            "tokens": sum(result.layers) / len(result.layers) / job.visual_tokens,
            "flops": flops / stock_flops if flops and stock_flops else None,
        }  # fmt: skip

    def _run(self, job: Job, reducer: Method | None) -> tuple[Result, Tensor]:
        with first_logits(self.model) as caught:
            result = run_once(job, self._settings(job, reducer), now=self.now)
        if (caught[0].isnan() | caught[0].isposinf()).any():
            raise InputError("the model's logits are no numbers: load it in another dtype")
        return result, caught[0]

    def _flops(self, job: Job, reducer: Method | None) -> int | None:
        result = run_once(job, self._settings(job, reducer), count=True)
        cost = cost_of(job, reducer, result)
        return None if cost is None else cost.total

    def _settings(self, job: Job, reducer: Method | None) -> Settings | None:
        if reducer is None:
            return None
        return Settings.make(reducer, family=job.family, rectify=self.rectify, absorb=self.absorb)


def _total(result: Result) -> float:
    return sum(result.seconds.values())


def _right(prompt: Prompt, result: Result) -> bool | None:
    return None if prompt.answer is None else same_text(result.answer, prompt.answer)


def divergence(reference: Tensor, other: Tensor) -> float:
    """Return KL(reference || other) of two next-token distributions, given as logits ``[V]``, in nats.

    Infinite if the other rules out, with a logit of minus infinity, what the reference allows.
    """
    log_p, log_q = (x.double().log_softmax(dim=-1) for x in (reference, other))
    p = log_p.exp()
    # A token that the reference rules out counts nothing, whatever the other makes of it.
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return max(0.0, float(terms.sum()))


@contextmanager
def first_logits(model: Any) -> Iterator[list[Tensor]]:
    """Catch the logits ``[V]`` behind the prompt, of the next pass of a model over one."""
    caught: list[Tensor] = []

    def catch(module: Any, args: Sequence[Any], output: Any) -> None:
        if not caught:
            caught.append(output.logits[0, -1].detach().clone())

    hook = model.register_forward_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()
