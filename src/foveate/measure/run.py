"""The main job: ask a model about images or a video without and with visual-token reduction, and measure both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import BudgetError, UnsupportedModelError
from foveate.core.grids import middle
from foveate.core.in_llm import InLlmReducer, of_encoder, schedule
from foveate.core.probes import Attention
from foveate.core.reducer import Method, Positions, Reducer, identity
from foveate.core.selection import Selection
from foveate.core.tokens import Span, VisualTokens
from foveate.cost import Cost, anatomy_of, kv_bytes, work_of
from foveate.cost.arms import arm_cost
from foveate.cost.inside import inside_flops
from foveate.engines.settings import Separators, Settings
from foveate.engines.transformers.attach import attach
from foveate.engines.transformers.given import Shown, given, priors_of
from foveate.engines.transformers.reduce import Reduced, apply, base_model, decide, look, select, shown_to_llm
from foveate.families import FAMILIES, Family, family_of
from foveate.measure.loading import encoder_view, model_inputs, prompt_for
from foveate.measure.timing import STAGES, Clock, FirstToken, Meter
from foveate.methods import Downsample
from foveate.methods.chain import Chain
from foveate.registry import load_reducer

BASELINES = ("random", "uniform", "pool", "downsample")
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
    layers
        The visual tokens that each layer of the LLM receives.
    cost
        FLOPs of the prefill, or `None` if they are not known.
    kv_bytes
        Bytes of the prompt's KV cache.
    """

    reducer: Method | None
    answer: str
    answer_tokens: int
    selection: Selection
    saliency: list[Tensor] | None
    seconds: dict[str, float]
    layers: tuple[int, ...]
    cost: Cost | None
    kv_bytes: int

    @property
    def kept(self) -> int:
        """Number of visual tokens that are left, in the last layer of the LLM."""
        return sum(map(len, self.selection))

    @property
    def equivalent(self) -> float:
        """Mean over the layers of the visual tokens that they receive."""
        return statistics.fmean(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-compatible data."""
        return {
            "method": "unpruned" if self.reducer is None else repr(self.reducer),
            "answer": self.answer,
            "answer_tokens": self.answer_tokens,
            "tokens": self.kept,
            "equivalent_tokens": self.equivalent,
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
    reducers: Sequence[Method | None],
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
        See `foveate.engines.settings.Settings`.
    repeats
        Measured runs per arm, of which the median counts.
    say
        Gets a line about what is going on.

    Raises
    ------
    BudgetError
        If there are budgets for more images than the job has.
    """
    for reducer in reducers:
        if reducer is not None:
            reducer.check_images(len(job.spans))
    settings = [None if r is None else Settings.make(r, positions, separators, {}, job.family) for r in reducers]
    first, times = [], []
    for reducer, setting in zip(reducers, settings, strict=True):
        say(f"warming up {_name(reducer)}")
        first.append(once(job, setting, count=True))
    for turn in range(repeats):
        say(f"measuring, turn {turn + 1} of {repeats}")
        times.append([once(job, setting).seconds for setting in settings])
    return [
        _arm(job, reducer, result, [turn[i] for turn in times] or [result.seconds])
        for i, (reducer, result) in enumerate(zip(reducers, first, strict=True))
    ]


def baselines(job: Job, reducer: Method, say: Say = lambda _: None) -> list[Method]:
    """Return the methods that every comparison includes, at the budget of `reducer` and without itself.

    Where `reducer.keep` does not tell how many tokens stay, as of an adaptive budget or a chain, they get the number
    that `reducer` keeps in this job; beside methods inside the LLM the share that its layers receive on average. Those
    that cannot run on the job are left out, and `say` gets a line about each.
    """
    keep = reducer.keep
    if any(isinstance(r, InLlmReducer) for r in reducer.stages()):
        received = schedule(reducer, job.model.config.get_text_config().num_hidden_layers, job.visual_tokens)
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


@dataclass(frozen=True, eq=False)
class Result:
    """What came out of one run of a job; see `Arm`."""

    answer: str
    answer_tokens: int
    selection: Selection
    tokens: VisualTokens | None
    given: list[tuple[str, int]]
    layers: tuple[int, ...]
    seconds: dict[str, float]
    decision_flops: int
    stock: bool


@torch.no_grad()
def once(
    job: Job, settings: Settings | None, count: bool = False, now: Callable[[], float] = time.perf_counter
) -> Result:
    """Run a job with a method, or unpruned, and time the stages.

    Parameters
    ----------
    count
        Also count the FLOPs of the method's decision, which takes time.
    now
        See `foveate.measure.timing.Clock`.
    """
    clock, tokens, counter = Clock(job.model.device, now), None, FlopCounterMode(display=False)
    stock = settings is None or settings.reducer.keeps_all(job.spans)
    ready: Mapping[str, Any]
    if settings is None or stock:
        selection = identity(job.spans)
        ready = _encode_stock(job)
        clock.stop("vision")
    elif settings.before is None and not any(map(of_encoder, settings.inside)):
        selection, shown = identity(job.spans), shown_whole(job)
        ready = _encode_stock(job)
        clock.stop("vision")
    else:
        reduced, selection, tokens = encode_reduced(job, settings, clock, counter if count else None)
        ready, shown = reduced, shown_to_llm(job.inputs, reduced)
    prompt, depth = ready["input_ids"].shape[1], job.model.config.get_text_config().num_hidden_layers
    given_images = [(chosen.kind, len(chosen)) for chosen in selection]
    layers = (sum(map(len, selection)),) * depth
    options = {"max_new_tokens": job.max_new_tokens, "do_sample": False, "num_beams": 1, "streamer": FirstToken(clock)}
    if settings is None or stock or not settings.inside:
        out = job.model.generate(**ready, **options)
    else:
        with attach(job.model, settings.inside_alone, positions=settings.inside_positions) as handle:
            handle.expect(shown)
            out = job.model.generate(**ready, **options)
            left = {boundary: sum(map(len, rows[0])) for boundary, rows in handle.layers.items()}
            selection = Selection(tuple(handle.selections[0]))
        layers = layer_counts(layers, left)
    answer = job.processor.tokenizer.decode(out[0, prompt:], skip_special_tokens=True).strip()
    flops = counter.get_total_flops()
    return Result(answer, out.shape[1] - prompt, selection, tokens, given_images, layers, clock.seconds, flops, stock)


def layer_counts(entering: Sequence[int], left: Mapping[int, int]) -> tuple[int, ...]:
    """Return what each layer receives of what the LLM is given, if so many tokens are left behind some boundaries."""
    return tuple(accumulate((left.get(layer, count) for layer, count in enumerate(entering)), min))


def shown_whole(job: Job) -> Shown:
    """Describe what the LLM is given if nothing is dropped before it."""
    ids = job.inputs["input_ids"]
    spans = job.family.spans(job.model, job.inputs)
    return Shown(given(spans, job.inputs.get("attention_mask"), ids.shape[1], ids.device), *ids.shape)


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
    before, judging = settings.before, [r for r in settings.inside if of_encoder(r)]
    spans = family.spans(model, inputs)  # part of the work: the generic family encodes to find them
    if before is not None and before.stage == "pixels":
        selection, embeds, _ = select(model, family, inputs, spans, settings)
    else:
        tokens = look(model, family, inputs, spans, [r for r in (before, *judging) if r is not None])
        meter.stop("vision")
        with deciding or nullcontext():
            selection = decide(tokens, settings)
        meter.stop("select")
        embeds = family.embed(model, tokens, selection, None if before is None else before.merges)
    meter.stop("vision")
    ready = apply(model, family, inputs, spans, selection, embeds, settings.positions)
    if tokens is not None:
        ready.priors = priors_of(judging, tokens, selection)
    meter.stop("select")
    return ready, selection, tokens


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


def _arm(job: Job, reducer: Method | None, result: Result, times: Sequence[dict[str, float]]) -> Arm:
    seconds = {stage: statistics.median(t[stage] for t in times) for stage in STAGES}
    seconds["total"] = statistics.median(sum(t.values()) for t in times)
    size = torch.finfo(job.model.dtype).bits // 8
    cache = kv_bytes(job.model.config.get_text_config(), [job.text_tokens + n for n in result.layers], size)
    saliency = _saliency(reducer, result.tokens)
    cost = cost_of(job, reducer, result)
    return Arm(
        reducer, result.answer, result.answer_tokens, result.selection, saliency, seconds, result.layers, cost, cache
    )  # fmt: skip


def cost_of(job: Job, reducer: Method | None, result: Result) -> Cost | None:
    """Return the FLOPs of the prefill of a run, or `None` if they are not known."""
    model = base_model(job.model)
    method = None if result.stock else reducer
    try:
        anatomy = anatomy_of(model.config, type(model))
        work = work_of(anatomy, job.inputs, job.spans)
        inside = [] if method is None else [r for r in method.stages() if isinstance(r, InLlmReducer)]
        decision = result.decision_flops
        decision += inside_flops(anatomy, inside, result.layers, job.text_tokens, result.given)
        return arm_cost(anatomy, work, job.text_tokens, method, result.layers, decision)
    except UnsupportedModelError:
        return None


def _saliency(reducer: Method | None, tokens: VisualTokens | None) -> list[Tensor] | None:
    if reducer is None or tokens is None:
        return None
    probe = next((p for p in reducer.needs if isinstance(p, Attention)), None)
    if probe is None:
        return None
    return [x.float().cpu() if x.dim() == 1 else x.float().mean(dim=-1).cpu() for x in tokens.probe(probe)]


def _name(reducer: Method | None) -> str:
    return "the unpruned model" if reducer is None else reducer.name
