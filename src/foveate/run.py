"""The main job: ask a model about an image without and with visual-token reduction, and measure both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation.streamers import BaseStreamer

from foveate.budget import Budget, Keep
from foveate.cost import Cost, anatomy_of, kv_bytes, work_of
from foveate.cost.arms import arm_cost
from foveate.engines.hf import Separators, Settings, apply, base_model, decide, look, select
from foveate.errors import BudgetError, UnsupportedModelError
from foveate.families import Family, family_of
from foveate.loading import model_inputs, prompt_for
from foveate.probes import Attention
from foveate.reducer import Chain, Positions, Reducer, identity, load_reducer
from foveate.selection import Selection
from foveate.tokens import Span, VisualTokens

BASELINES = ("random", "uniform", "pool", "downsample")
STAGES = ("vision", "select", "prefill", "decode")
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
        FLOPs of the prefill, or `None` if they are not known.
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


class _Watch:
    """Adds up the time of stages, waiting for the device at each stop."""

    def __init__(self, device: torch.device):
        self._device, self.seconds = device, dict.fromkeys(STAGES, 0.0)
        self._last = self._now()

    def stop(self, stage: str) -> None:
        now = self._now()
        self.seconds[stage] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _FirstToken(BaseStreamer):  # type: ignore[misc]
    """Stops the prefill when the first token of the answer arrives."""

    def __init__(self, watch: _Watch):
        self._watch, self._calls = watch, 0

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompt
            self._watch.stop("prefill")

    def end(self) -> None:
        self._watch.stop("decode")


@torch.no_grad()
def _once(job: Job, settings: Settings | None, count: bool = False) -> _Result:
    watch, tokens, flops = _Watch(job.model.device), None, 0
    stock = settings is None or settings.reducer.keeps_all(job.spans)
    ready: Mapping[str, Any]
    if settings is None or stock:
        selection = identity(job.spans)
        ready = _encode_stock(job)
        watch.stop("vision")
    else:
        spans = job.family.spans(job.model, job.inputs)  # part of the work: the generic family encodes to find them
        if settings.reducer.stage == "pixels":
            selection, embeds, _ = select(job.model, job.family, job.inputs, spans, settings)
        else:
            tokens = look(job.model, job.family, job.inputs, spans, [settings.reducer])
            watch.stop("vision")
            selection, flops = _decide(tokens, settings, count)
            watch.stop("select")
            embeds = job.family.embed(job.model, tokens, selection, settings.reducer.merges)
        watch.stop("vision")
        ready = apply(job.model, job.family, job.inputs, spans, selection, embeds, settings.positions)
        watch.stop("select")
    prompt = ready["input_ids"].shape[1]
    out = job.model.generate(
        **ready, max_new_tokens=job.max_new_tokens, do_sample=False, num_beams=1, streamer=_FirstToken(watch)
    )
    answer = job.processor.tokenizer.decode(out[0, prompt:], skip_special_tokens=True).strip()
    return _Result(answer, out.shape[1] - prompt, selection, tokens, watch.seconds, flops, stock)


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


def _decide(tokens: VisualTokens, settings: Settings, count: bool) -> tuple[Selection, int]:
    if not count:
        return decide(tokens, settings), 0
    with FlopCounterMode(display=False) as counter:
        selection = decide(tokens, settings)
    return selection, counter.get_total_flops()


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
    model = base_model(job.model)
    method = None if result.stock else reducer
    try:
        anatomy = anatomy_of(model.config, type(model))
        work = work_of(anatomy, job.inputs, job.spans)
        kept = sum(map(len, result.selection))
        return arm_cost(anatomy, work, job.text_tokens, method, kept, result.decision_flops)
    except UnsupportedModelError:
        return None


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
