"""Questions put to a model about an image, with as much work shared as a condition allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor

from foveate.core.checks import checked_values
from foveate.core.reducer import Method, Positions, Stage
from foveate.core.tokens import VisualTokens
from foveate.engines.pipeline import look
from foveate.engines.settings import Settings
from foveate.engines.transformers.attach import attach_with
from foveate.engines.transformers.bias.hooks import biased
from foveate.engines.transformers.caches import BIAS, cache_of, note, noted
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.engines.transformers.reduce import Reduced, reduce_with
from foveate.families import family_of
from foveate.methods import Uniform
from foveate.nano.questions import Question

PROMPT: Final = "<image>"
_UNPRUNED: Final = Uniform(keep=1.0)


@dataclass(frozen=True)
class Condition:
    """One way to run the model.

    Attributes
    ----------
    name : str
        Key of the result.
    reducer : Method or None
        None keeps every token.
    positions : str or None
        ``"original"`` or ``"compact"``; `None` leaves it to the parts of a chain.
    wrong_image : bool
        Ask each scene's questions about the scene before it: what can be answered without seeing.
    rectify, absorb
        See `foveate.engines.settings.Settings`.
    """

    name: str
    reducer: Method | None = None
    positions: Positions | None = "original"
    wrong_image: bool = False
    rectify: float = 0.0
    absorb: bool = False


class Runner:
    """Answers questions with work shared: the tower runs once per image, the visual prefix once per condition.

    Parameters
    ----------
    model
        A LLaVA-type model and its processor, such as ``foveate.nano.load()`` returns.
    processor
        See ``model``.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor, self.family = model, processor, family_of(model)

    def look(self, image: Any, reducers: Iterable[Method]) -> tuple[dict[str, Any], Any]:
        """Encode an image once, with every probe that one of the reducers needs that do not change this pass."""
        inputs = dict(self.processor(images=image, text=PROMPT, return_tensors="pt").to(self.model.device))
        spans = self.family.spans(self.model, inputs)
        sharing = [reducer for reducer in reducers if not _stages(reducer) & {"encoder", "in_llm"}]
        return inputs, look(self.model, self.family, inputs, spans, sharing)

    def prefix(self, inputs: Mapping[str, Any], tokens: Any, condition: Condition) -> tuple[Any, int]:
        """Run the visual prefix; returns its key-value cache and the position of the first word after it."""
        settings = self._settings(condition)
        reduced = self._reduced(inputs, settings, tokens)
        with biased(self.model, reduced.bias):
            cache = cache_of(self.model(**reduced, use_cache=True, logits_to_keep=1))
        note(cache, BIAS, reduced.bias)
        return cache, (inputs if settings.positions == "original" else reduced)["input_ids"].shape[1]

    def _settings(self, condition: Condition) -> Settings:
        return Settings.make(
            condition.reducer or _UNPRUNED, condition.positions, family=self.family, rectify=condition.rectify,
            absorb=condition.absorb,
        )  # fmt: skip

    def _reduced(self, inputs: Mapping[str, Any], settings: Settings, tokens: VisualTokens) -> Reduced:
        """Reduce inputs whose images `look` has seen; only methods that change pixels or encoder encode again."""
        seen = None if _stages(settings.reducer) & {"pixels", "encoder"} else tokens
        return reduce_with(self.model, self.family, inputs, settings, seen=seen)

    @checked_values()
    def ask(
        self, inputs: Mapping[str, Any], tokens: Any, condition: Condition, questions: Sequence[Question]
    ) -> tuple[list[str], float]:
        """Answer questions about an image; returns the first word of each answer, and how many visual tokens are left.

        Of a method inside the LLM these are its equivalent tokens, the mean over layers.
        """
        reducer = condition.reducer
        if reducer is not None and ("in_llm" in _stages(reducer) or any(r.query_aware for r in reducer.stages())):
            return self._ask_each(inputs, tokens, condition, questions)
        cache, start = self.prefix(inputs, tokens, condition)
        text = inputs["input_ids"].shape[1] - sum(map(len, tokens.spans))
        kept = cache.get_seq_length() - text
        return self.answer(cache, start, questions), float(kept)

    def _ask_each(
        self, inputs: Mapping[str, Any], tokens: Any, condition: Condition, questions: Sequence[Question]
    ) -> tuple[list[str], float]:
        """Answer with a selection for each question, as its words have a say in it."""
        batch = self.prompts(inputs, questions)
        if condition.reducer is not None and "in_llm" in _stages(condition.reducer):
            return self.ask_attached(batch, condition)
        spans, count = self.family.spans(self.model, batch), len(questions)
        shown = replace(
            tokens,
            spans=spans,
            planes={probe: plane * count for probe, plane in tokens.planes.items()},
            hidden=tokens.hidden * count,
            embedded=None if tokens.embedded is None else tokens.embedded * count,
            queries=self.family.query(self.model, batch, spans),
        )
        reduced = self._reduced(batch, self._settings(condition), shown)
        assert reduced.selection is not None
        with biased(self.model, reduced.bias):
            words = self._last_words(reduced)
        return words, sum(map(len, reduced.selection)) / count

    def ask_attached(self, batch: Mapping[str, Any], condition: Condition) -> tuple[list[str], float]:
        """Answer a batch of whole prompts, padded on the left, with the condition's method attached to the model.

        Returns the answers, and the visual tokens that a layer receives, mean over layers and prompts.
        """
        with attach_with(self.model, self.family, self._settings(condition)) as handle:
            words = self._last_words(batch)
            return words, fmean(map(fmean, handle.received))

    def _last_words(self, batch: Mapping[str, Any]) -> list[str]:
        words: Tensor = self.model(**batch, logits_to_keep=1).logits[:, -1].argmax(-1)
        return [str(word) for word in self.processor.tokenizer.convert_ids_to_tokens(words.tolist())]

    def prompts(self, inputs: Mapping[str, Any], questions: Sequence[Question]) -> dict[str, Any]:
        """One prompt per question about the same image, padded on the left."""
        head = inputs["input_ids"][0].tolist()
        prompts = [head + self.processor.tokenizer(q.text, add_special_tokens=False)["input_ids"] for q in questions]
        longest, pad = max(map(len, prompts)), self.processor.tokenizer.pad_token_id
        rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device, pixels = self.model.device, inputs["pixel_values"]
        return {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": torch.tensor(masks, device=device),
            "pixel_values": pixels.expand(len(rows), *pixels.shape[1:]),
        }

    def answer(self, cache: Any, start: int, questions: Sequence[Question]) -> list[str]:
        """First generated word of each question, all of them batched behind one prefix."""
        texts = [self.processor.tokenizer(q.text, add_special_tokens=False)["input_ids"] for q in questions]
        longest = max(map(len, texts))
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=self.model.device)
        positions = (start + torch.arange(longest, device=ids.device)).expand(len(ids), -1)
        seen = cache.get_seq_length()
        cache.batch_repeat_interleave(len(ids))
        mask = torch.ones(len(ids), seen + longest, dtype=torch.int64, device=ids.device)
        # Padding is on the right, where a causal model does not look.
        with biased(self.model, noted(cache, BIAS)):
            logits = self.model(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, **{CACHE: cache}
            ).logits
        ends = torch.tensor([len(text) - 1 for text in texts], device=ids.device)
        words: Tensor = logits[torch.arange(len(ids), device=ids.device), ends].argmax(-1)
        return [str(word) for word in self.processor.tokenizer.convert_ids_to_tokens(words.tolist())]


def _stages(reducer: Method) -> set[Stage]:
    return {part.stage for part in reducer.stages()}


def with_own_seed(condition: Condition, index: int) -> Condition:
    """Give a reducer that draws another seed for each image; otherwise it would keep the same places everywhere."""
    reducer = condition.reducer
    if reducer is None or "seed" not in {field.name for field in fields(reducer)}:
        return condition
    return replace(condition, reducer=replace(reducer, seed=reducer.seed * 100_003 + index))  # type: ignore[call-arg,attr-defined]
