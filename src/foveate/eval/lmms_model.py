"""The model ``foveate`` of lmms-eval: any supported vision-language model, with a method attached.

``lmms-eval --model foveate --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=vispruner,keep=64`` finds it
through the entry point of `foveate.eval.lmms.manifest`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm
from transformers import GenerationConfig

from foveate.core.errors import FoveateError, InputError
from foveate.core.reducer import Method
from foveate.core.selection import SpanSelection
from foveate.engines.transformers.attach import attach
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.engines.transformers.caches import cache_of
from foveate.eval.conversations import Conversation, batch_inputs, conversation, pad_on_the_left
from foveate.eval.lmms_arguments import check_unreduced, make_reducer, provenance
from foveate.families import family_of
from foveate.measure.loading import load_model

MAX_NEW_TOKENS = 1024
_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass
class Counts(TokenCounts):  # type: ignore[misc]
    """What lmms-eval logs about one request beside its answer.

    Attributes
    ----------
    input_tokens
        Tokens of the whole prompt before the reduction, visual ones included.
    visual_tokens, kept_tokens
        Visual tokens of the prompt before the reduction, and in the last layer of the LLM.
    equivalent_tokens
        Mean number of visual tokens over the layers of the LLM: `kept_tokens`, unless a method acts inside the LLM.
    seconds
        The request's share of the time that its batch spent in the model.
    """

    visual_tokens: int = 0
    kept_tokens: int = 0
    equivalent_tokens: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all counts as JSON-compatible data."""
        return asdict(self)


class SimpleFoveate(lmms):  # type: ignore[misc]
    """A model for lmms-eval's older form of requests: a text, and the pictures that belong to it.

    Parameters
    ----------
    pretrained
        ``"nano"``, a folder, or a hub id.
    method, keep, **config
        The method, its budget and its further parameters; without a method the model is not reduced.
    batch_size
        Requests with equal generation arguments that go through the model together.
    device
        As of lmms-eval's command line; `device_map` goes before it.
    dtype, attn, device_map
        See `foveate.measure.loading.load_model`. Of several processes, each takes a device of its own by default.
    positions, separators, rectify, absorb
        See `foveate.engines.settings.Settings`.
    frames
        Frames taken from each video.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str | Path | Method | None = None,
        keep: Any = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn: str | None = None,
        device_map: str | None = None,
        positions: Any = None,
        separators: Any = "drop",
        frames: int = 32,
        rectify: float = 0.0,
        absorb: bool = False,
        **config: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"the batch size is a number from 1 on, not {batch_size!r}")
        reducer = make_reducer(method, keep, **config)
        check_unreduced(reducer, rectify=rectify, absorb=absorb)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = str(self.accelerator.device) if self.accelerator.num_processes > 1 else device
        self._model, self._processor = load_model(pretrained, str(dtype), device_map or own, attn)
        pad_on_the_left(self._processor)
        self._name, self._reducer, self._frames = pretrained, reducer, int(frames)
        self._family, self.batch_size = family_of(self._model), int(batch_size)
        how = {"positions": positions, "separators": separators, "rectify": rectify, "absorb": absorb}
        self._handle = None if reducer is None else attach(self._model, reducer, **how)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.accelerator.device if self._model is None else self._model.device  # type: ignore[no-any-return]

    def words(self) -> dict[str, Any]:
        """Return the model's arguments as lmms-eval puts them into its results."""
        return {"pretrained": self._name, "method": repr(self._reducer)}

    def about(self) -> dict[str, Any]:
        """Return what a result says about the model, the method and the machine, as JSON-compatible data."""
        settings = None if self._handle is None else self._handle.settings
        return {
            "model": self._name,
            "family": self._family.name,
            "configuration": "unpruned" if self._reducer is None else repr(self._reducer),
            "method": None if self._reducer is None else self._reducer.to_dict(),
            "positions": settings and settings.positions,
            "separators": settings and settings.separators,
            "rectify": settings and settings.rectify,
            "absorb": settings and settings.absorb,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": self._model.config._attn_implementation,
            "batch_size": self.batch_size,
            "processes": self._world_size,
            **provenance(),
        }

    def clean(self) -> None:
        """Let go of the model, as lmms-eval asks for once all requests are answered."""
        if self._handle is not None:
            self._handle.detach()
        self._handle = self._model = None
        super().clean()

    # lmms-eval's request types

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer each request, cut off before the first of its stop texts."""
        results: list[Any] = [None] * len(requests)
        with self._progress(len(requests)) as bar:
            for members in self._batches([self._generation(request) for request in requests]):
                arguments = self._generation(requests[members[0]])
                until, options = self._options(arguments)
                for part, talks in self._alike(members, [self._conversation(requests[i]) for i in members]):
                    for i, answer in zip(part, self._generate(talks, until, options), strict=True):
                        results[i] = answer
                    bar.update(len(part))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Score the given continuation of each request.

        The prompt alone decides what is kept, so all continuations of a question see the same tokens.

        Returns
        -------
        list of GenerationResult
            Of which ``text`` is the mean negative log-likelihood per token, which lmms-eval takes the minimum of,
            and whether greedy decoding would give the continuation.
        """
        results: list[Any] = [None] * len(requests)
        with self._progress(len(requests)) as bar:
            for members in self._batches([None] * len(requests)):
                asked = [self._question(requests[i]) for i in members]
                answers = dict(zip(members, (answer for _, answer in asked), strict=True))
                for part, talks in self._alike(members, [talk for talk, _ in asked]):
                    scores = self._score(talks, [answers[i] for i in part])
                    for i, score in zip(part, scores, strict=True):
                        results[i] = score
                    bar.update(len(part))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """Tasks of several rounds are not supported."""
        raise FoveateError("tasks of several rounds are not supported: choose tasks that ask once")

    # One batch

    @torch.inference_mode()
    def _generate(
        self, talks: Sequence[Conversation], until: Sequence[str], options: Mapping[str, Any]
    ) -> list[GenerationResult]:
        inputs = self._inputs(talks)
        started = time.perf_counter()
        out = self._model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].cpu()
        seconds = (time.perf_counter() - started) / len(talks)
        texts = self._processor.tokenizer.batch_decode(out, skip_special_tokens=True)
        end = self._processor.tokenizer.pad_token_id
        lengths = [int((row != end).sum()) for row in out]
        counts = self._counts(inputs, lengths, seconds)
        return [GenerationResult(_cut(text, until), count) for text, count in zip(texts, counts, strict=True)]

    @torch.inference_mode()
    def _score(self, talks: Sequence[Conversation], answers: Sequence[str]) -> list[GenerationResult]:
        tokenizer, inputs = self._processor.tokenizer, self._inputs(talks)
        ids = [_continuation(tokenizer, talk.prompt, answer) for talk, answer in zip(talks, answers, strict=True)]
        longest, device = max(map(len, ids)), inputs["input_ids"].device
        # Filled up on the right, where a causal model does not look.
        padded = torch.tensor([row + row[-1:] * (longest - len(row)) for row in ids], device=device)
        started = time.perf_counter()
        prompt = self._model(**inputs, use_cache=True)
        counts = self._counts(inputs, [0] * len(ids), 0.0)
        logits = prompt.logits[:, -1:]
        if longest > 1:
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(padded)], dim=1)
            more = self._model(input_ids=padded, attention_mask=mask, **{CACHE: cache_of(prompt)})
            logits = torch.cat([logits, more.logits[:, :-1]], dim=1)
        losses = -logits.float().log_softmax(-1).gather(-1, padded[..., None])[..., 0]
        right = logits.argmax(-1) == padded
        pairs = [(losses[i, : len(row)].mean().item(), bool(right[i, : len(row)].all())) for i, row in enumerate(ids)]
        seconds = (time.perf_counter() - started) / len(talks)
        for count in counts:
            count.seconds = seconds
        return [GenerationResult(pair, count) for pair, count in zip(pairs, counts, strict=True)]  # type: ignore[arg-type]

    def _inputs(self, talks: Sequence[Conversation]) -> dict[str, Any]:
        if talks[0].videos and "video" not in self._family.kinds:
            raise InputError(f"the family {self._family.name!r} takes no videos: choose tasks with images")
        return dict(batch_inputs(self._processor, talks, self._frames).to(self.device, self._model.dtype))

    def _counts(self, inputs: Mapping[str, Any], lengths: Sequence[int], seconds: float) -> list[Counts]:
        """Count the tokens of each prompt of the batch that has just been run."""
        batch = len(lengths)
        visual, kept, mean = [0] * batch, [0] * batch, [0.0] * batch
        if any(inputs.get(key) is not None for key in self._family.inputs):
            if self._handle is None:
                for span in self._family.spans(self._model, inputs):
                    visual[span.sample] += len(span)
                kept, mean = visual, [float(n) for n in visual]
            else:
                chosen = self._handle.selections
                visual = [sum(span.length for span in spans) for spans in chosen]
                kept, mean = _sizes(chosen), [fmean(layers) for layers in self._handle.received]
        whole = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            Counts(n, length, None, before, after, layers, seconds)
            for n, before, after, layers, length in zip(whole, visual, kept, mean, lengths, strict=True)
        ]

    # Requests

    def _progress(self, total: int) -> Any:
        return tqdm(total=total, disable=self._rank != 0, desc="answering")

    def _batches(self, arguments: Sequence[Any]) -> Iterator[list[int]]:
        """Yield the numbers of requests with equal arguments, in order and at most `batch_size` at a time."""
        groups: dict[str, list[int]] = {}
        for i, given in enumerate(arguments):
            groups.setdefault(json.dumps(given, sort_keys=True, default=str), []).append(i)
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                yield members[start : start + self.batch_size]

    def _alike(
        self, members: Sequence[int], talks: Sequence[Conversation]
    ) -> Iterator[tuple[list[int], list[Conversation]]]:
        """Split a batch by the kinds of media in its prompts, which a processor takes for all of them or for none."""
        for kinds in dict.fromkeys(talk.kinds for talk in talks):
            pairs = [(i, talk) for i, talk in zip(members, talks, strict=True) if talk.kinds == kinds]
            yield [i for i, _ in pairs], [talk for _, talk in pairs]

    def _generation(self, request: Instance) -> Mapping[str, Any]:
        """Return the generation arguments of a request."""
        return request.args[1]  # type: ignore[no-any-return]

    def _conversation(self, request: Instance) -> Conversation:
        context, _, to_visual, doc_id, task, split = request.args
        return self._ask(context, to_visual(self.task_dict[task][split][doc_id]))

    def _question(self, request: Instance) -> tuple[Conversation, str]:
        """Return the prompt and the continuation of a request to score one."""
        if len(request.args) == 2:  # the continuation by itself, for a metric that compares the two
            return self._ask(request.args[0], ()), request.args[1]
        context, target, to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        return self._ask(context, to_visual(doc)), target if isinstance(target, str) else target(doc)

    def _ask(self, text: str, visuals: Sequence[Any] | None) -> Conversation:
        content = [{"type": "image" if _is_image(v) else "video", "url": v} for v in visuals or ()]
        return conversation(self._processor, [{"role": "user", "content": [*content, {"type": "text", "text": text}]}])

    def _options(self, arguments: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Return the stop texts, and the arguments for ``generate``."""
        given = {key: value for key, value in arguments.items() if value is not None}
        until = given.pop("until", [])
        unknown = [key for key in given if not hasattr(_DEFAULTS, key)]
        for key in unknown:
            logger.warning(f"generate() has no argument {key!r}: the task's value {given.pop(key)!r} has no effect")
        sampling = bool(given.pop("do_sample", True)) and given.get("temperature", 0) > 0
        if not sampling:
            given = {key: value for key, value in given.items() if key not in _SAMPLING}
        options = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, **given, "do_sample": sampling}
        options["pad_token_id"] = self._processor.tokenizer.pad_token_id
        return [until] if isinstance(until, str) else list(until), options


class ChatFoveate(SimpleFoveate):
    """A model for lmms-eval's requests as conversations, in which text and pictures take turns."""

    is_simple = False

    def _generation(self, request: Instance) -> Mapping[str, Any]:
        return request.args[2]  # type: ignore[no-any-return]

    def _conversation(self, request: Instance) -> Conversation:
        _, to_messages, _, doc_id, task, split = request.args
        return conversation(self._processor, to_messages(self.task_dict[task][split][doc_id]))


_DEFAULTS = GenerationConfig()


def _is_image(visual: Any) -> bool:
    if isinstance(visual, str):
        return visual.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
    return not isinstance(visual, Mapping)


def _sizes(prompts: Sequence[Sequence[SpanSelection]]) -> list[int]:
    return [sum(map(len, spans)) for spans in prompts]


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.partition(stop)[0] if stop else text
    return text


def _continuation(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Return the ids that an answer adds to a prompt."""
    ids: list[int] = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    added = ids[len(head) :]
    if not added:
        raise InputError(f"the continuation {answer!r} adds no token to its prompt")
    return added
