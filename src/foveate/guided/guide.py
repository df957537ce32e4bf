"""A small model that guides a large one, and answers in its place where it is sure (SGL, arXiv 2412.03324)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.core.errors import AttachError, InputError
from foveate.core.grids import resampled
from foveate.core.ranking import top
from foveate.core.reducer import Reducer
from foveate.core.selection import Selection, SpanSelection
from foveate.core.spans import Span
from foveate.core.tokens import VisualTokens
from foveate.engines.transformers.attach import attach, attached
from foveate.engines.transformers.caches import NAMES
from foveate.engines.transformers.in_llm.support import check_decoder
from foveate.engines.transformers.prompt_tokens import tokens_by_prompt
from foveate.engines.transformers.reduce import base_model, pad_id
from foveate.families import Family, family_of
from foveate.guided.attention_sum import AttentionSum
from foveate.guided.prompts import prompts_only, with_answer
from foveate.methods.sgl import SGL, share_of


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one prompt.

    A batch of text alone has nothing to rank: the large model answers it, and the small one does not run.

    Attributes
    ----------
    source
        Which model the answer is from.
    confidence
        Geometric mean of the probabilities of the small model's answer; 0 if that is empty, or if there is none.
    consistency
        What it makes of the probabilities of the same answer, given the best few visual tokens alone; `None` if
        nobody asked for an early exit, or the small model did not run.
    scores
        ``[n]`` float32: what each visual token of the prompt scores.
    """

    source: Literal["small", "large"]
    confidence: float
    consistency: float | None
    scores: Tensor

    @property
    def score(self) -> float | None:
        """The mean of confidence and consistency, which decides about the exit."""
        return None if self.consistency is None else (self.confidence + self.consistency) / 2


def guide(
    large: Any, small: Any, method: SGL | None = None, *, exit_at: float | None = None, resample: bool = False
) -> Guided:
    """Let a small model choose which visual tokens a large one keeps.

    Parameters
    ----------
    large, small
        `transformers` models of supported families, with the same tokenizer and the same layout of visual tokens.
    method
        What is cut, and how tokens score.
    exit_at
        The small model's answer counts, and the large one does not run, for prompts whose `Outcome.score` reaches this.
        By default the large model answers everything.
    resample
        Accept layouts whose grids differ, and interpolate the scores; see `Guided.generate`.

    Examples
    --------
    >>> guided = foveate.guide(large, small, SGL(keep=0.3), exit_at=0.9)  # doctest: +SKIP
    >>> out = guided.generate(**inputs)  # doctest: +SKIP
    >>> guided.outcomes[0].source, guided.outcomes[0].confidence  # doctest: +SKIP

    Raises
    ------
    InputError
        If `exit_at` is no share, or the method is another one.
    """
    if exit_at is not None and not 0.0 <= exit_at <= 1.0:
        raise InputError(f"exit_at is a score from 0 (always) to 1, or None for never, not {exit_at!r}")
    if method is not None and not isinstance(method, SGL):
        raise InputError(f"a guided model is cut by scores from elsewhere: pass an SGL, or nothing, not {method!r}")
    return Guided(base_model(large), base_model(small), method or SGL(), exit_at, resample)


class Guided:
    """A large model and the small one that guides it. Neither is changed outside of a call; calls wait for each other.

    Attributes
    ----------
    outcomes
        What became of each prompt of the last call.
    """

    def __init__(self, large: Any, small: Any, method: SGL, exit_at: float | None, resample: bool):
        self.large, self.small, self.method, self.exit_at, self.resample = large, small, method, exit_at, resample
        self.outcomes: list[Outcome] = []
        self._families = family_of(large), family_of(small)
        self._lock = threading.Lock()
        check_decoder(small.get_decoder(), "original")
        method.boundaries(large.get_decoder().config.num_hidden_layers)

    @torch.no_grad()
    def generate(self, *, small_inputs: Mapping[str, Any] | None = None, **kwargs: Any) -> Tensor:
        """Answer prompts.

        The small model decodes greedily whatever the options, as its answer is what the scores follow.

        Parameters
        ----------
        small_inputs
            What the small model's processor made of the same prompts, if that is another one.
        **kwargs
            Inputs and options of ``large.generate``.

        Returns
        -------
        Tensor
            ``[B, L + T]``: prompts and answers, padded on the right.

        Raises
        ------
        InputError
            If the two models lay visual tokens out differently, or an option needs what only one model could give.
        """
        config = kwargs.get("generation_config") or self.large.generation_config
        asked = {"return_dict_in_generate": None, "num_return_sequences": None, **kwargs}
        asked |= {name: getattr(config, name, None) for name, value in asked.items() if value is None}
        for name in (*NAMES, "streamer", "return_dict_in_generate", "inputs_embeds", "position_ids"):
            if asked.get(name) is not None and asked[name] is not False:
                raise InputError(f"two models share the work of a guided answer: leave {name} out")
        if asked["num_return_sequences"] not in (None, 1):
            raise InputError("a guided answer is one per prompt: leave num_return_sequences out")
        if kwargs.get("input_ids") is None:
            raise InputError("a guided model needs input_ids")
        inputs, options = _split(kwargs)
        with self._lock:
            return self._generate(inputs, dict(small_inputs or inputs), options)

    @torch.no_grad()
    def scores(self, **kwargs: Any) -> list[Tensor]:
        """Let the small model alone answer prompts, and return what each visual token of each image scores, ``[N]``."""
        inputs, options = _split(kwargs)
        with self._lock:
            return self._small_answer(inputs, _spans(self._families[1], self.small, inputs), options)[1]

    def _generate(self, inputs: dict[str, Any], small_inputs: dict[str, Any], options: dict[str, Any]) -> Tensor:
        spans = _spans(self._families[0], self.large, inputs)
        small_spans = _spans(self._families[1], self.small, small_inputs)
        self._compare(spans, small_spans)
        if not spans:
            self.outcomes = [Outcome("large", 0.0, None, torch.empty(0)) for _ in inputs["input_ids"]]
            further = {k: v for k, v in options.items() if k not in self._families[0].inputs}  # pixel_values=None
            out: Tensor = self.large.generate(**inputs, **further)
            return out
        answer, scores, confidences = self._small_answer(small_inputs, small_spans, options)
        batch, consistencies = len(answer.ids), [None] * len(answer.ids)
        if self.exit_at is not None:
            consistencies = self._consistencies(small_inputs, answer, scores)
        outcomes = []
        for i in range(batch):
            own = [x for x, span in zip(scores, small_spans, strict=True) if span.sample == i]
            outcome = Outcome("small", confidences[i], consistencies[i], torch.cat(own) if own else torch.empty(0))
            leaves = outcome.score is not None and answer.lengths[i] and outcome.score >= (self.exit_at or 0.0)
            outcomes.append(outcome if leaves else Outcome("large", *list(vars(outcome).values())[1:]))
        rest = [i for i, outcome in enumerate(outcomes) if outcome.source == "large"]
        rows = [answer.ids[i, : answer.given[i]] for i in range(batch)]
        if rest:
            moved = [resampled(x, a, b) for x, a, b in zip(scores, small_spans, spans, strict=True)]
            for i, row in self._large_answers(inputs, spans, moved, rest, options):
                rows[i] = row
        self.outcomes = outcomes
        ids = inputs["input_ids"]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id(self.large))
        return torch.cat([ids, padded.to(ids.device)], dim=1)

    def _compare(self, spans: Sequence[Span], small: Sequence[Span]) -> None:
        """Raise `InputError` unless both models see the same visual tokens, or scores can be moved between them."""
        layouts = [[(s.sample, s.kind, s.grid, len(s)) for s in own] for own in (spans, small)]
        if layouts[0] == layouts[1]:
            return
        described = " and ".join(str([(grid, n) for _, _, grid, n in own]) for own in layouts)
        if not self.resample:
            raise InputError(
                f"the large and the small model lay visual tokens out differently, {described} (grid, tokens): use "
                "models of one family, or guide(..., resample=True)"
            )
        if [(s.sample, s.kind, len(s.crops)) for s in spans] != [(s.sample, s.kind, len(s.crops)) for s in small]:
            raise InputError(
                f"scores cannot be moved between these layouts, {described} (grid, tokens): the images have different "
                "numbers of crops"
            )

    def _small_answer(
        self, inputs: dict[str, Any], spans: Sequence[Span], options: dict[str, Any]
    ) -> tuple[Answer, list[Tensor], list[float]]:
        """Let the small model answer; returns also a score ``[n]`` per span, and confidences."""
        if (handle := attached(self.small)) is not None:
            raise AttachError(
                f"{handle.reducer!r} is attached to the small model, which must see all tokens: detach it"
            )
        ids = inputs["input_ids"]
        prompts = tokens_by_prompt(spans, inputs.get("attention_mask"), ids.shape[1], ids.device)
        greedy = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True, "output_logits": True}
        stops = _stops(self.small, options)
        total = AttentionSum(prompts, inputs.get("attention_mask"), ids, stops, self.method)
        with total.watching(self.small):
            out = self.small.generate(**inputs, **{**options, **greedy})
        answer = Answer.of(out.sequences[:, ids.shape[1] :], stops)
        found = [
            step.float().log_softmax(dim=-1).gather(1, answer.ids[:, t, None]) for t, step in enumerate(out.logits)
        ]
        confidences = answer.geometric(torch.cat(found, dim=1))
        per_prompt = dict(zip((p.sample for p in prompts), total.scores(), strict=True))
        scores: list[Tensor] = []
        for sample in dict.fromkeys(span.sample for span in spans):
            scores += torch.split(per_prompt[sample], [len(span) for span in spans if span.sample == sample])
        return answer, scores, confidences

    def _consistencies(self, inputs: dict[str, Any], answer: Answer, scores: list[Tensor]) -> list[Any]:
        """Return how sure the small model is of its answer when it sees the best few visual tokens alone."""
        t = answer.ids.shape[1]
        longer = with_answer(self._families[1], inputs, answer.ids)
        with attach(self.small, BestScored(self.method.consistency_keep, tuple(scores)), positions="original"):
            logits = self.small(**longer, use_cache=False, logits_to_keep=t + 1).logits[:, -t - 1 : -1]
        logs = logits.float().log_softmax(dim=-1).gather(2, answer.ids[..., None])[..., 0]
        return answer.geometric(logs) if self.method.geometric else answer.product(logs)

    def _large_answers(
        self, inputs: dict[str, Any], spans: Sequence[Span], scores: list[Tensor], rest: list[int], options: Any
    ) -> Iterator[tuple[int, Tensor]]:
        """Let the large model answer some of the prompts, or all where their pictures cannot be told apart."""
        own = prompts_only(self._families[0], inputs, spans, rest)
        asked = list(range(len(inputs["input_ids"]))) if own is None else rest
        per_prompt = [
            torch.cat([x for x, span in zip(scores, spans, strict=True) if span.sample == i])
            for i in asked
            if any(span.sample == i for span in spans)
        ]
        with attach(self.large, self.method) as handle, handle.scored(per_prompt):
            out = self.large.generate(**(inputs if own is None else own), **options)
        for i, row in zip(asked, out[:, inputs["input_ids"].shape[1] :], strict=True):
            if i in rest:
                yield i, row


@dataclass(frozen=True, eq=False)
class Answer:
    """Answers ``[B, T]``, of which the first `lengths` tokens say something, and the first `given` were generated."""

    ids: Tensor
    lengths: list[int]
    given: list[int]

    @classmethod
    def of(cls, ids: Tensor, stops: Tensor) -> Answer:
        ended = torch.isin(ids, stops)
        lengths = (ended.cumsum(dim=1) == 0).sum(dim=1).tolist()
        return cls(ids, lengths, [min(n + 1, ids.shape[1]) for n in lengths])

    def product(self, logs: Tensor) -> list[float]:
        """Return the probability of each answer, from those of its tokens ``[B, T]`` in logarithms."""
        return [float(row[:n].double().sum().exp()) if n else 0.0 for row, n in zip(logs, self.lengths, strict=True)]

    def geometric(self, logs: Tensor) -> list[float]:
        """Return the geometric mean of the probabilities of each answer's tokens."""
        return [float(row[:n].double().mean().exp()) if n else 0.0 for row, n in zip(logs, self.lengths, strict=True)]


def _split(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell the inputs of a model from the options of ``generate``."""
    options = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor | list) or k.endswith("token_id")}
    return {k: v for k, v in kwargs.items() if k not in options}, options


def _spans(family: Family, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    """Return the images and videos of a batch, of which there are none without their inputs."""
    return family.spans(model, inputs) if any(inputs.get(name) is not None for name in family.inputs) else ()


def _stops(model: Any, options: Mapping[str, Any]) -> Tensor:
    """Return the ids that end an answer."""
    own = getattr(options.get("generation_config"), "eos_token_id", None)  # `generate` fills it in from the model's
    ids = options.get("eos_token_id", model.generation_config.eos_token_id if own is None else own)
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    return torch.tensor([] if ids is None else ids, dtype=torch.long, device=model.device).reshape(-1)


@dataclass(frozen=True, eq=False)
class BestScored(Reducer):
    """The tokens with the highest scores, before the LLM; of several images all compete.

    Parameters
    ----------
    keep
        Share of the tokens, rounded down to one at least.
    scores
        ``[N]`` per span.
    """

    keep: float
    scores: tuple[Tensor, ...] = ()

    name = "best"
    adaptive = True

    def count(self, span: Span) -> int:
        return sum(map(len, span.crops))

    def keeps_all(self, spans: Sequence[Span]) -> bool:
        return False

    def select(self, tokens: VisualTokens) -> Selection:
        parts: list[SpanSelection] = []
        for sample in dict.fromkeys(span.sample for span in tokens.spans):
            own = [i for i, span in enumerate(tokens.spans) if span.sample == sample]
            scores = torch.cat([_without_separators(self.scores[i], tokens.spans[i]) for i in own])
            count = sum(len(crop) for i in own for crop in tokens.spans[i].crops)
            kept = top(scores[None], share_of(self.keep, count))[0]
            start = 0
            for i in own:
                span = tokens.spans[i]
                inside = kept[(kept >= start) & (kept < start + len(span))] - start
                parts.append(SpanSelection(len(span), inside, sample=sample, kind=span.kind))
                start += len(span)
        return Selection(tuple(parts))


def _without_separators(scores: Tensor, span: Span) -> Tensor:
    return scores.index_fill(0, span.separators().to(scores.device), -torch.inf)
