"""The main job: ask a model about images or a video without and with visual-token reduction, and measure both."""

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

from foveate.cost import Cost, anatomy_of, kv_bytes, work_of
from foveate.cost.arms import arm_cost
from foveate.engines.hf import Separators, Settings, apply, base_model, decide, look, select
from foveate.errors import UnsupportedModelError
from foveate.families import FAMILIES, Family, family_of
from foveate.grids import middle
from foveate.loading import encoder_view, model_inputs, prompt_for
from foveate.probes import Attention
from foveate.reducer import Chain, Positions, Reducer, identity, load_reducer
from foveate.selection import Selection
from foveate.tokens import Span, VisualTokens

BASELINES = ("random", "uniform", "pool", "downsample")
STAGES = ("vision", "select", "prefill", "decode")
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Job:
    """A question about images or a video, ready for a model.

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

    def views(self, images: Sequence[Image.Image], video: Sequence[Image.Image]) -> list[list[Image.Image]]:
        """Return what the vision encoder sees of each span, of a video one picture per crop, such as for an overlay.

        Several frames that make one crop are shown by the one in their middle.
        """
        left, shown = iter(images), []
        for span in self.spans:
            crops = len(span.crops)
            pictures = (
                [next(left)] if span.kind == "image" else [video[middle(i, crops, len(video))] for i in range(crops)]
            )
            shown.append([encoder_view(self.processor, picture, span.kind) for picture in pictures])
        return shown

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
    images: Image.Image | Sequence[Image.Image],
    question: str,
    template: str | None = None,
    max_new_tokens: int = 32,
    video: Sequence[Image.Image] = (),
) -> Job:
    """Build the prompt and the model inputs for a question about one or more images, the frames of a video, or both.

    Raises
    ------
    InputError
        If the model's processor takes no videos, or not so many images.
    UnsupportedModelError
        If the model's family takes no videos.
    """
    family = family_of(model)
    if video and (family.name == "generic" or "video" not in family.inputs.values()):
        able = [f.name for f in FAMILIES.values() if f.model_types and "video" in f.inputs.values()]
        raise UnsupportedModelError(
            f"models of the family {family.name!r} take no videos; those of these families do: {', '.join(able)}"
        )
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    prompt = prompt_for(processor, question, template, len(pictures), bool(video))
    inputs = dict(model_inputs(processor, images, prompt, video).to(model.device, model.dtype))
    sizes = {"image": iter(pictures), "video": iter([video[0]] if video else [])}
    spans: list[Span] = []
    for span in family.spans(model, inputs):
        shown = next(sizes[span.kind])
        spans += family.located([span], (shown.height, shown.width))
    return Job(model, processor, family, inputs, tuple(spans), max_new_tokens)


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
    kinds = dict.fromkeys(kind for key, kind in job.family.inputs.items() if inputs.get(key) is not None)
    outputs = {kind: job.family.image_features(job.model, inputs, kind) for kind in kinds}
    if job.family.keeps_positions:
        inputs["position_ids"] = job.family.positions(job.model, inputs)
    for key in (*job.family.inputs, *job.family.side_inputs):
        inputs.pop(key, None)
    return {**inputs, "mm_encoder_outputs": outputs}


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
