"""Arms: the ways to run one job that a bench measures in turn."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from foveate.bench.naive import plain_selection
from foveate.core.errors import UnsupportedModelError
from foveate.core.in_llm import InLlmReducer, LayerTokens, tokens_per_layer
from foveate.core.reducer import Method
from foveate.core.schedules import Images
from foveate.core.selection import Selection, SpanSelection
from foveate.engines.pipeline import Meter
from foveate.engines.settings import Settings
from foveate.engines.transformers.attach import attach_with
from foveate.engines.transformers.bias.hooks import biased
from foveate.engines.transformers.reduce import apply, reduce_with
from foveate.measure.job import Job
from foveate.measure.timing import FirstToken, encoder_reports
from foveate.methods import VisPruner
from foveate.methods.chain import Chain

M = TypeVar("M", bound=Meter)


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to run a job.

    Attributes
    ----------
    name
        ``"unpruned"``, ``"ratio 1"``, ``"method"``, ``"oracle"`` or ``"naive"``.
    job
        What is run.
    encode
        Makes the inputs of ``generate`` from those of the job, and reports the ends of its stages.
    received
        Visual tokens that each layer of the LLM receives, of all prompts of the job, which are of equal size.
    reducer
        The method, if the arm has one.
    around
        What holds during a run and is not measured, such as an attachment.
    """

    name: str
    job: Job
    encode: Callable[[Meter], Mapping[str, Any]]
    received: Sequence[int]
    reducer: Method | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def tokens(self) -> float:
        """Mean over the layers of the visual tokens that they receive."""
        return statistics.mean(self.received)

    @torch.no_grad()
    def run(self, start: Callable[[], M]) -> tuple[M, Any]:
        """Run the job once, with an answer of ``max_new_tokens`` tokens.

        Parameters
        ----------
        start
            Makes the meter; what happens from then on is measured.

        Returns
        -------
        tuple
            The meter, and what ``generate`` returned.
        """
        length = self.job.max_new_tokens
        with self.around():
            meter = start()
            with encoder_reports(self.job.model, meter):
                out = self.job.model.generate(
                    **self.encode(meter), max_new_tokens=length, min_new_tokens=length, do_sample=False, num_beams=1,
                    return_dict_in_generate=True, streamer=FirstToken(meter),
                )  # fmt: skip
        return meter, out


def unpruned(job: Job) -> Arm:
    """Make the arm of the model as it is."""
    return Arm("unpruned", job, lambda _: job.inputs, _throughout(job, job.visual_tokens))


def _throughout(job: Job, tokens: int) -> tuple[int, ...]:
    return (tokens,) * job.depth


def attached(name: str, job: Job, settings: Settings, received: Sequence[int]) -> Arm:
    """Make an arm of a method that is attached to the model, as those that act inside the LLM are."""
    around = partial(attach_with, job.model, job.family, settings)
    return replace(unpruned(job), name=name, received=received, reducer=settings.reducer, around=around)


def control(job: Job, settings: Settings) -> Arm:
    """Make the arm of the method attached with a budget that covers everything."""
    return attached(
        "ratio 1", job, replace(settings, reducer=_whole(settings.reducer)), _throughout(job, job.visual_tokens)
    )


def _whole(reducer: Method) -> Method:
    if isinstance(reducer, Chain):
        return Chain(*map(_whole, reducer.reducers))
    other = {"equivalent": None} if hasattr(reducer, "equivalent") else {}  # the other way to give a budget
    return replace(reducer, keep=1.0, **other)


def inside(job: Job, settings: Settings) -> list[Arm]:
    """Make the arms of a method inside the LLM: the method, and an oracle that drops as many tokens at the same layers.

    The oracle drops tokens without reading anything: which ones stay is known beforehand.

    Raises
    ------
    UnsupportedModelError
        If the method is a chain, or decides itself how many tokens stay.
    """
    reducer = settings.reducer
    if not isinstance(reducer, InLlmReducer) or reducer.adaptive:
        raise UnsupportedModelError(
            f"{reducer.name} has no oracle: inside the LLM, single methods with a fixed number of tokens have one"
        )
    each = tokens_per_layer(reducer, job.depth, job.visual_tokens // job.prompts)
    received = tuple(job.prompts * tokens for tokens in each)
    free = replace(settings, reducer=_Free(keep=None, like=reducer))  # type: ignore[arg-type]
    return [attached("method", job, settings, received), attached("oracle", job, free, received)]


@dataclass(frozen=True)
class _Free(InLlmReducer):
    """Drops tokens where and as many as another method does, at random and without reading anything."""

    like: InLlmReducer

    name = "free"

    def boundaries(self, depth: int) -> Sequence[int]:
        return self.like.boundaries(depth)

    def counts(self, depth: int, images: Images) -> Sequence[int]:
        return self.like.counts(depth, images)

    def select(self, tokens: LayerTokens) -> Selection:
        return tokens.per_prompt(
            lambda prompts, count: _ranks(prompts.size)[:count].to(prompts.device).expand(len(prompts.ordinals), -1)
        )


@functools.cache
def _ranks(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))


def method(job: Job, settings: Settings) -> tuple[Arm, Selection]:
    """Make the arm of a method that acts before the LLM, and return what it keeps of the job too."""
    reduced = partial(reduce_with, job.model, job.family, job.inputs, settings)
    with torch.no_grad():
        made = reduced()
    selection = made.selection
    assert selection is not None
    around = partial(biased, job.model, made.bias)  # the inputs of a model carry none
    return Arm("method", job, reduced, _throughout(job, sum(map(len, selection))), settings.reducer, around), selection


@torch.no_grad()
def oracle(job: Job, settings: Settings, selection: Selection, seed: int = 0) -> Arm:
    """Make the arm that gets as many tokens as a selection keeps for free.

    Which ones is drawn beforehand, and so is the compact prompt made: what is left to do is the encoder up to the last
    layer that is read, without probes, the projection of the kept tokens, and the LLM.
    """
    generator = torch.Generator().manual_seed(seed)
    model, family, inputs = job.model, job.family, job.inputs
    spans = family.spans(model, inputs)
    chosen = Selection(tuple(_drawn(span, generator) for span in selection))
    tokens = family.encode(model, inputs, spans, ())
    ready = apply(model, family, inputs, spans, chosen, family.embed(model, tokens, chosen, None), settings.positions)

    def encode(meter: Meter) -> Mapping[str, Any]:
        tokens = family.encode(model, inputs, spans, ())
        embeds = family.embed(model, tokens, chosen, None)
        outputs = family.encoder_outputs(spans, embeds)
        meter.stop("vision")
        return {**ready, "mm_encoder_outputs": outputs}

    return Arm("oracle", job, encode, _throughout(job, sum(map(len, chosen))))


def _drawn(span: SpanSelection, generator: torch.Generator) -> SpanSelection:
    kept = torch.randperm(span.length, generator=generator)[: len(span)].sort().values
    return SpanSelection(span.length, kept.to(span.kept.device), sample=span.sample, kind=span.kind)


def naive(job: Job, settings: Settings, count: int) -> Arm:
    """Make the arm of VisPruner as it is written at first.

    The whole vision tower runs with eager attention and returns all attention maps and hidden states; the selection is
    the plain loop of `plain_selection`. The projection of the kept tokens and all behind it is as in the library.

    Parameters
    ----------
    count
        Tokens that stay of the picture.

    Raises
    ------
    UnsupportedModelError
        If the method is another one, or the model is not a LLaVA with a CLIP tower.
    """
    reducer, model, family = settings.reducer, job.model, job.family
    if not naive_runs(job, reducer):
        raise UnsupportedModelError(
            f"the naive way is that of vispruner with a CLIP tower and one crop per image, as in LLaVA-1.5; not that "
            f"of {reducer.name} on {family.name}"
        )
    assert isinstance(reducer, VisPruner)
    tower: Any = family.encoder(model)
    layer = family.read_layer(model)
    own = tower.config._attn_implementation

    @contextmanager
    def eager() -> Iterator[None]:
        tower.set_attn_implementation("eager")
        try:
            yield
        finally:
            tower.set_attn_implementation(own)

    def encode(meter: Meter) -> Mapping[str, Any]:
        spans = family.spans(model, job.inputs)
        seen = tower(job.inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
        features = seen.hidden_states[layer + 1][:, 1:]
        saliency = seen.attentions[layer][:, :, 0, 1:].mean(dim=1)
        meter.stop("vision")
        step = reducer.per_round(features.shape[1], count)
        kept = plain_selection(features, saliency, count, reducer.important_ratio, step)
        meter.stop("select")
        chosen = Selection(tuple(SpanSelection(len(s), k, sample=s.sample) for s, k in zip(spans, kept, strict=True)))
        embeds = _projected(job, features, kept)
        meter.stop("vision")
        ready = apply(model, family, job.inputs, spans, chosen, embeds, settings.positions)
        meter.stop("select")
        return ready

    return Arm("naive", job, encode, _throughout(job, count * len(job.spans)), reducer, eager)


def naive_runs(job: Job, reducer: Method) -> bool:
    """Return whether `naive` can run a method on a job."""
    family, model = job.family, job.model
    plain = all(len(span.crops) == 1 and not len(span.separators()) for span in job.spans)
    clip = family.projects_kept and family.features_read(model) == 1 and family.lead(model) == 1
    return isinstance(reducer, VisPruner) and plain and clip


def _projected(job: Job, features: Tensor, kept: Tensor) -> list[Tensor]:
    rows = torch.cat([x.index_select(0, k) for x, k in zip(features, kept, strict=True)])
    return list(torch.split(job.family.project(job.model, rows), kept.shape[1]))
