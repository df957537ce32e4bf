"""The methods that every comparison includes: what chooses tokens must beat what does not look at them."""

from __future__ import annotations

import statistics

import torch

from foveate.core.errors import BudgetError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.reducer import Method, Reducer
from foveate.engines.pipeline import look
from foveate.engines.settings import inside_llm
from foveate.measure.job import Job, Say
from foveate.methods import Downsample
from foveate.methods.chain import Chain
from foveate.registry import load_reducer

BASELINES = ("random", "uniform", "pool", "downsample")


def baselines(job: Job, reducer: Method, say: Say = lambda _: None) -> list[Method]:
    """Return the methods that every comparison includes, at the budget of `reducer` and without itself.

    Where `reducer.keep` does not tell how many tokens stay, as of an adaptive budget or a chain, they get the number
    that `reducer` keeps in this job; beside methods inside the LLM the share that its layers receive on average. Those
    that cannot run on the job are left out, and `say` gets a line about each.
    """
    keep = reducer.keep
    if inside_llm(reducer):
        received = tokens_per_layer(reducer, job.depth, job.visual_tokens)
        keep = min(statistics.fmean(received) / job.visual_tokens, 1.0)
    elif reducer.coverages() or reducer.adaptive or isinstance(reducer, Chain):
        assert isinstance(reducer, Reducer | Chain)
        with torch.no_grad():
            tokens = look(job.model, job.family, job.inputs, job.spans, [reducer])
            keep = [len(chosen) for chosen in reducer.select(tokens)]
    others = []
    grid = all(crop.grid for span in job.spans for crop in span.crops)
    for other in (load_reducer(name, keep=keep) for name in BASELINES if name != reducer.name):
        lacking = job.family.lacks(other) or (None if grid or not other.reads_grid else "the grid of the tokens")
        if lacking is None and isinstance(other, Downsample):
            try:
                [other.plan(span) for span in job.spans]
            except BudgetError as error:
                say(f"{other.name} is left out: {error}")
                continue
        if lacking is None:
            others.append(other)
        else:
            say(f"{other.name} is left out: it needs {lacking}, which the family {job.family.name!r} does not give")
    return others
