"""The main job: ask a model about an image without and with visual-token reduction, and measure both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate.budget import Budget, Keep
from foveate.cost import Cost, Patches, check_known, kv_bytes, prefill_flops, probe_flops, vision_layers
from foveate.encoder import EncoderReducer
from foveate.engines.hf import Reduced, Separators, Settings, apply, decide, look, probes_of, select
from foveate.errors import BudgetError, UnsupportedModelError
from foveate.families import Family, family_of
from foveate.grids import crop_budgets
from foveate.loading import model_inputs, prompt_for
from foveate.probes import Attention, Embeddings
from foveate.reducer import Chain, Positions, Reducer, identity, load_reducer
from foveate.selection import Selection
from foveate.timing import STAGES, Clock, FirstToken, Meter
from foveate.tokens import Span, VisualTokens

BASELINES = ("random", "uniform", "pool", "downsample")
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Job:
    """A question about an image, ready for a model.

    Attributes
    ----------
    inputs
        What the processor returned, on the model's device and in its dtype.
    spans
        The visual tokens of the prompt.
    max_new_tokens
        Limit on the answer.
    """

    model: Any
    processor: Any
    family: Family
    inputs: dict[str, Any]
    spans: tuple[Span, ...]
    max_new_tokens: int

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens of the unpruned prompt."""
        return sum(map(len, self.spans))

    @property
    def text_tokens(self) -> int:
        """Number of the other tokens."""
        return int(self.inputs["input_ids"].shape[1]) - self.visual_tokens


@dataclass(frozen=True, eq=False)
class Arm:
    """What came out of one way to run a job.

    Attributes
    ----------
    reducer
        The method; `None` for the stock model.
    answer
        The decoded text.
    answer_tokens
        Its length; decoding takes time in proportion.
    selection
        What was kept.
    saliency
        The attention that the method read, ``[n]`` per crop, if any.
    seconds
        Median time of each stage and of their sum.
    cost
        FLOPs of the prefill, or `None` for a text model whose FLOPs are not known.
    kv_bytes
        Bytes of the prompt's KV cache.
    """

    reducer: Reducer | None
    answer: str
    answer_tokens: int
    selection: Selection
    saliency: list[Tensor] | None
    seconds: dict[str, float]
    cost: Cost | None
    kv_bytes: int

    @property
    def kept(self) -> int:
        """Number of visual tokens that the LLM gets."""
        return sum(map(len, self.selection))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-compatible data."""
        return {
            "method": "unpruned" if self.reducer is None else repr(self.reducer),
            "answer": self.answer,
            "answer_tokens": self.answer_tokens,
            "tokens": self.kept,
            "flops": None if self.cost is None else self.cost.total,
            "kv_bytes": self.kv_bytes,
            "seconds": self.seconds,
        }


def prepare(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    template: str | None = None,
    max_new_tokens: int = 32,
) -> Job:
    """Build the prompt and the model inputs for a question about an image."""
    family = family_of(model)
    prompt = prompt_for(processor, question, template)
    inputs = dict(model_inputs(processor, image, prompt).to(model.device, model.dtype))
    spans = family.located(family.spans(model, inputs), (image.height, image.width))
    return Job(model, processor, family, inputs, spans, max_new_tokens)


def measure(
    job: Job,
    reducers: Sequence[Reducer | None],
    positions: Positions | None = None,
    separators: Separators = "drop",
    repeats: int = 3,
    say: Say = lambda _: None,
) -> list[Arm]:
    """Run a job with each reducer, `None` being the stock model, and time the stages.

    Every arm runs once unmeasured, then all arms take turns. The attention implementation is the model's own in all
    of them.

    Parameters
    ----------
    positions, separators
        See `foveate.engines.hf.Settings`.
    repeats
        Measured runs per arm, of which the median counts.
    say
        Gets a line about what is going on.
    """
    settings = [None if r is None else Settings.make(r, positions, separators, {}, job.family) for r in reducers]
    first, times = [], []
    for reducer, setting in zip(reducers, settings, strict=True):
        say(f"warming up {_name(reducer)}")
        first.append(_once(job, setting, count=True))
    for turn in range(repeats):
        say(f"measuring, turn {turn + 1} of {repeats}")
        times.append([_once(job, setting).seconds for setting in settings])
    return [
        _arm(job, reducer, result, [turn[i] for turn in times] or [result.seconds])
        for i, (reducer, result) in enumerate(zip(reducers, first, strict=True))
    ]


def baselines(job: Job, reducer: Reducer, say: Say = lambda _: None) -> list[Reducer]:
    """Return the methods that every comparison includes, at the budget of `reducer` and without itself.

    Where `reducer.keep` does not tell how many tokens stay, as of an adaptive budget or a chain, they get the number
    that `reducer` keeps in this job. Those that cannot run on the job are left out, and `say` gets a line about each.
    """
    keep = reducer.keep
    if reducer.coverages() or isinstance(reducer, Chain):
        with torch.no_grad():
            tokens = look(job.model, job.family, job.inputs, job.spans, [reducer])
            keep = [len(chosen) for chosen in reducer.select(tokens)]
    others = []
    grid = all(crop.grid for span in job.spans for crop in span.crops)
    for other in (load_reducer(name, keep=keep) for name in BASELINES if name != reducer.name):
        lacking = job.family.lacks(other) or (None if grid or not other.reads_grid else "the grid of the tokens")
        if lacking is None:
            others.append(other)
        else:
            say(f"{other.name} is left out: it needs {lacking}, which the family {job.family.name!r} does not give")
    return others


def parse_keep(text: str) -> Keep:
    """Read a budget.

    ``"32"`` counts tokens, ``"0.1"`` and ``"1.0"`` are ratios, ``"coverage:0.9"`` is a share of the saliency and
    ``"coverage:0.9:16:144"`` bounds it, ``"64,16"`` is one budget per image.
    """
    try:
        values = [_parse_budget(part) for part in text.split(",")]
    except BudgetError:
        raise
    except ValueError as error:
        raise BudgetError(
            f"a budget is a count such as 64, a ratio such as 0.25, a share of the saliency such as coverage:0.9 or "
            f"coverage:0.9:16:144 (at least, at most), or 64,16: not {text!r}"
        ) from error
    return values if "," in text else values[0]


def _parse_budget(text: str) -> int | float | Budget:
    kind, *parts = text.strip().split(":")
    if kind == "coverage" and 1 <= len(parts) <= 3:
        least = int(parts[1]) if len(parts) > 1 else 1
        most = int(parts[2]) if len(parts) > 2 else None
        return Budget.coverage(float(parts[0]), least=least, most=most)
    try:
        return int(text)
    except ValueError:
        return float(text)


@dataclass(frozen=True, eq=False)
class _Result:
    answer: str
    answer_tokens: int
    selection: Selection
    tokens: VisualTokens | None
    seconds: dict[str, float]
    decision_flops: int
    stock: bool


@torch.no_grad()
def _once(job: Job, settings: Settings | None, count: bool = False) -> _Result:
    clock, tokens, counter = Clock(job.model.device), None, FlopCounterMode(display=False)
    stock = settings is None or settings.reducer.keeps_all(job.spans)
    ready: Mapping[str, Any]
    if settings is None or stock:
        selection = identity(job.spans)
        ready = _encode_stock(job)
        clock.stop("vision")
    else:
        ready, selection, tokens = encode_reduced(job, settings, clock, counter if count else None)
    prompt = ready["input_ids"].shape[1]
    out = job.model.generate(
        **ready, max_new_tokens=job.max_new_tokens, do_sample=False, num_beams=1, streamer=FirstToken(clock)
    )
    answer = job.processor.tokenizer.decode(out[0, prompt:], skip_special_tokens=True).strip()
    flops = counter.get_total_flops()
    return _Result(answer, out.shape[1] - prompt, selection, tokens, clock.seconds, flops, stock)


def encode_reduced(
    job: Job, settings: Settings, meter: Meter, deciding: AbstractContextManager[Any] | None = None
) -> tuple[Reduced, Selection, VisualTokens | None]:
    """Reduce a job's inputs as `foveate.reduce` does, and report the ends of ``"vision"`` and ``"select"``.

    Parameters
    ----------
    deciding
        Entered while the method decides.

    Returns
    -------
    tuple
        Inputs for ``generate``, the selection, and what the method saw (`None` if it encodes smaller pictures).
    """
    model, family, inputs, tokens = job.model, job.family, job.inputs, None
    spans = family.spans(model, inputs)  # part of the work: the generic family encodes to find them
    if settings.reducer.stage == "pixels":
        selection, embeds = select(model, family, inputs, spans, settings)
    else:
        tokens = look(model, family, inputs, spans, [settings.reducer])
        meter.stop("vision")
        with deciding or nullcontext():
            selection = decide(tokens, settings)
        meter.stop("select")
        embeds = family.embed(model, tokens, selection, settings.reducer.merges)
    meter.stop("vision")
    ready = apply(model, family, inputs, spans, selection, embeds, settings.positions)
    meter.stop("select")
    return ready, selection, tokens


def _encode_stock(job: Job) -> dict[str, Any]:
    """Run tower and projector as the stock model does, and hand the result over, so that it can be timed by itself."""
    inputs = dict(job.inputs)
    side = {key: inputs[key] for key in job.family.side_inputs if key in inputs}
    encode = getattr(job.model, "get_image_features", None) or job.model.model.get_image_features
    outputs = encode(inputs["pixel_values"], **side, return_dict=True)
    if job.family.keeps_positions:
        inputs["position_ids"] = job.family.positions(job.model, inputs)
    for key in (*job.family.inputs, *job.family.side_inputs):
        inputs.pop(key, None)
    return {**inputs, "mm_encoder_outputs": {"image": outputs}}


def _arm(job: Job, reducer: Reducer | None, result: _Result, times: Sequence[dict[str, float]]) -> Arm:
    seconds = {stage: statistics.median(t[stage] for t in times) for stage in STAGES}
    seconds["total"] = statistics.median(sum(t.values()) for t in times)
    kept = sum(map(len, result.selection))
    size = torch.finfo(job.model.dtype).bits // 8
    cache = kv_bytes(job.model.config.get_text_config(), job.text_tokens + kept, size)
    saliency = _saliency(reducer, result.tokens)
    cost = _cost(job, reducer, result)
    return Arm(
        reducer, result.answer, result.answer_tokens, result.selection, saliency, seconds, cost, cache
    )  # fmt: skip


def _cost(job: Job, reducer: Reducer | None, result: _Result) -> Cost | None:
    config = job.model.config
    try:
        check_known(config)
    except UnsupportedModelError:
        return None
    patches = _rows(job)
    rows: Sequence[Patches] = patches
    kept, projected, probes = sum(map(len, result.selection)), None, 0
    if reducer is None or result.stock:
        projected = sum(patches)
    elif reducer.stage == "pixels":
        rows = [math.prod(grid) for span in job.spans for grid, _ in reducer.plan(span)]  # type: ignore[attr-defined]
    elif isinstance(reducer, EncoderReducer):
        rows = _lengths(job, reducer, patches[0])
    else:
        probes = probe_flops(config, probes_of([reducer]), patches)
        projected = job.visual_tokens if reducer.merges == "embeddings" or Embeddings() in reducer.probes() else None
    try:
        return prefill_flops(
            config, job.visual_tokens, job.text_tokens, kept, rows=rows, projected=projected,
            early_exit=not result.stock, selection=probes + result.decision_flops,
        )  # fmt: skip
    except UnsupportedModelError:
        return None


def _rows(job: Job) -> list[int]:
    """Return the patches of each picture that goes through the vision tower."""
    *batch, _, height, width = job.inputs["pixel_values"].shape
    patch = job.model.config.vision_config.patch_size
    return [(height // patch) * (width // patch)] * math.prod(batch)


def _lengths(job: Job, reducer: EncoderReducer, patches: int) -> list[Patches]:
    """Return the tokens of each picture in each layer of the vision tower."""
    layers, rows = vision_layers(job.model.config), []
    for span in job.spans:
        for crop, _, count in crop_budgets(span, reducer.keep, reducer.name):
            padding = patches - len(crop)
            rows.append([(padding + a, padding + b) for a, b in reducer.lengths(len(crop), count, layers)])
    return rows  # type: ignore[return-value]


def _saliency(reducer: Reducer | None, tokens: VisualTokens | None) -> list[Tensor] | None:
    if reducer is None or tokens is None:
        return None
    probe = next((p for p in reducer.probes() if isinstance(p, Attention)), None)
    if probe is None:
        return None
    return [x.float().cpu() if x.dim() == 1 else x.float().mean(dim=-1).cpu() for x in tokens.probe(probe)]


def _name(reducer: Reducer | None) -> str:
    return "the unpruned model" if reducer is None else reducer.name


def report(job: Job, unpruned: Arm, pruned: Arm, others: Sequence[Arm] = ()) -> dict[str, Any]:
    """Return the outcome of a run as JSON-compatible data."""
    spans = [
        {"kind": span.kind, "grid": list(span.grid), "before": len(span), "after": len(chosen)}
        for span, chosen in zip(job.spans, pruned.selection, strict=True)
    ]
    data: dict[str, Any] = {
        "answer": pruned.answer,
        "answer_unpruned": unpruned.answer,
        "answer_tokens": {"before": unpruned.answer_tokens, "after": pruned.answer_tokens},
        "method": repr(pruned.reducer),
        "tokens": {"before": unpruned.kept, "after": pruned.kept, "text": job.text_tokens, "spans": spans},
        "flops": {"before": unpruned.to_dict()["flops"], "after": pruned.to_dict()["flops"]},
        "flops_by_part": {
            when: arm.cost and arm.cost.to_dict() for when, arm in (("before", unpruned), ("after", pruned))
        },
        "kv_bytes": {"before": unpruned.kv_bytes, "after": pruned.kv_bytes},
        "seconds": {"before": unpruned.seconds, "after": pruned.seconds},
        "kept": [span.kept.tolist() for span in pruned.selection],
    }
    if others:
        data["compare"] = [arm.to_dict() for arm in (unpruned, pruned, *others)]
    return data
