"""Questions put to a model about an image, with as much work shared as a condition allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor

from foveate.core.reducer import Method, Positions, Stage, identity
from foveate.engines.settings import Settings
from foveate.engines.transformers.attach import attach
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.engines.transformers.caches import cache_of
from foveate.engines.transformers.reduce import apply, decide, look, select
from foveate.families import family_of
from foveate.nano.questions import Question

PROMPT: Final = "<image>"


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
    """

    name: str
    reducer: Method | None = None
    positions: Positions | None = "original"
    wrong_image: bool = False


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
        selection, embeds = self._kept(inputs, tokens, condition)
        positions = self._positions(condition)
        reduced = apply(self.model, self.family, inputs, tokens.spans, selection, embeds, positions)
        cache = cache_of(self.model(**reduced, use_cache=True, logits_to_keep=1))
        full = inputs["input_ids"].shape[1]
        return cache, full if positions == "original" else int(reduced["input_ids"].shape[1])

    def _positions(self, condition: Condition) -> Positions:
        if condition.positions is not None or condition.reducer is None:
            return condition.positions or "original"
        return Settings.make(condition.reducer, None, "drop", {}, self.family).positions

    def _kept(self, inputs: Mapping[str, Any], tokens: Any, condition: Condition) -> tuple[Any, list[Tensor]]:
        """Selection and embeddings under a condition; only methods that change pixels or encoder encode again."""
        reducer = condition.reducer
        if reducer is None:
            selection = identity(tokens.spans)
            return selection, self.family.embed(self.model, tokens, selection, None)
        settings = Settings(reducer, self._positions(condition))
        if _stages(reducer) & {"pixels", "encoder"}:
            selection, embeds, _ = select(self.model, self.family, inputs, tokens.spans, settings)
            return selection, embeds
        selection = decide(tokens, settings)
        return selection, self.family.embed(self.model, tokens, selection, reducer.merges)

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
        reducer = condition.reducer
        assert reducer is not None
        batch = self.prompts(inputs, questions)
        if "in_llm" in _stages(reducer):
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
        positions = self._positions(condition)
        selection = decide(shown, Settings(reducer, positions))
        embeds = self.family.embed(self.model, shown, selection, reducer.merges)
        reduced = apply(self.model, self.family, batch, spans, selection, embeds, positions)
        return self._last_words(reduced), sum(map(len, selection)) / count

    def ask_attached(self, batch: Mapping[str, Any], condition: Condition) -> tuple[list[str], float]:
        """Answer a batch of whole prompts, padded on the left, with the condition's method attached to the model.

        Returns the answers, and the visual tokens that a layer receives, mean over layers and prompts.
        """
        with attach(self.model, condition.reducer, positions=condition.positions) as handle:  # type: ignore[arg-type]
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
