"""What ``generate`` and ``forward`` of one model are wrapped with while a method is attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import AttachError, UnsupportedModelError
from foveate.engines.transformers.bias.hooks import Biasing
from foveate.engines.transformers.caches import BIAS, COMPACTION, cache_of, given_cache, note
from foveate.engines.transformers.callbacks import WholePrompts, wrap_callbacks
from foveate.engines.transformers.continuation import Call, Continuation
from foveate.engines.transformers.full_length import FullLength, wants_tuple
from foveate.engines.transformers.in_llm.hooks import LayerHooks
from foveate.engines.transformers.in_llm.support import check_options
from foveate.engines.transformers.keywords import named
from foveate.engines.transformers.results import Results


class Wrapping:
    """``generate`` wrapped on the instance, and hooks around ``forward``, until removed.

    Parameters
    ----------
    layers
        Hooks on the layers, if methods act inside the LLM.
    biasing
        What lets attention take up a bias, if kept tokens have one.
    full
        Whether outputs of ``forward`` have the full length.
    """

    def __init__(
        self, model: Any, continuation: Continuation, layers: LayerHooks | None, biasing: Biasing | None,
        results: Results, call: Call, full: bool,
    ):  # fmt: skip
        self._model, self._continuation, self._layers, self._biasing = model, continuation, layers, biasing
        self._results, self._call, self._full = results, call, full
        self._instances_own = vars(model).get("generate")
        self._generate: Callable[..., Any] = model.generate
        self._wrapper = self._wrapped_generate  # a bound method is another object each time it is asked for
        self._removed = False
        model.generate = self._wrapper
        self._prepare = model.prepare_inputs_for_generation
        self._instances_prepare = vars(model).get("prepare_inputs_for_generation")
        self._watcher = self._watched_prepare
        model.prepare_inputs_for_generation = self._watcher
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            # Called after a fault too: a pass must end, lest the next one takes its place for another's.
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Restore the model."""
        self._removed = True
        for hook in self._hooks:
            hook.remove()
        self._restore("generate", self._wrapper, self._instances_own)
        self._restore("prepare_inputs_for_generation", self._watcher, self._instances_prepare)

    def _restore(self, name: str, ours: Any, before: Any) -> None:
        if vars(self._model).get(name) is not ours:
            return  # wrapped by somebody since, whose wrapper goes on to the model's own
        delattr(self._model, name)
        if before is not None:
            setattr(self._model, name, before)

    def __getstate__(self) -> Any:
        """Refuse copies: they would reduce by way of this wrapping, and of this model."""
        raise AttachError("a model cannot be copied or pickled while a method is attached: detach it first")

    def _wrapped_generate(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:
            return self._generate(*args, **kwargs)
        kwargs = named(type(self._model).generate, args, kwargs)
        if (inputs := kwargs.pop("inputs", None)) is not None:  # the first one that transformers takes
            kwargs["input_ids"] = inputs
        cache = given_cache(kwargs)
        if self._layers is not None:
            check_options(self._model, kwargs)
        with torch.no_grad():
            reduced = self._continuation.reduce(kwargs, cache)
        self._call.bias = reduced.bias
        if reduced.compaction is None:
            wrap_callbacks(reduced, WholePrompts(None, 0, self._outside))
            return self._run_generate(reduced, cache)
        full_ids, width = kwargs["input_ids"], reduced["input_ids"].shape[1]
        shorten_limits(self._model, reduced, full_ids.shape[1] - width)
        wrap_callbacks(reduced, WholePrompts(full_ids, width, self._outside))
        out = self._run_generate(reduced, cache)
        sequences = out if isinstance(out, Tensor) else out.sequences
        prompts = full_ids.to(sequences.device).repeat_interleave(len(sequences) // len(full_ids), dim=0)
        whole = torch.cat([prompts, sequences[:, width:]], dim=1)
        for used in (cache, cache_of(out)):  # plain outputs do not carry the caller's cache
            if used is not None:
                note(used, COMPACTION, reduced.compaction)
        if isinstance(out, Tensor):
            return whole
        out.sequences = whole
        return out

    def _run_generate(self, kwargs: Mapping[str, Any], cache: Any) -> Any:
        self._call.generating = True
        self._call.numbered = kwargs.get("position_ids") is not None
        try:
            out = self._generate(**kwargs)
            for used in (cache, cache_of(out)):
                self._note_bias(used)
            return out
        finally:
            self._call.generating = False
            self._call.prefill = self._call.bias = None

    def _note_bias(self, cache: Any) -> None:
        if cache is not None and self._call.bias is not None:
            note(cache, BIAS, self._call.bias)

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Let what a callback of ``generate`` runs be reduced as outside of it; ``generate`` then goes on."""
        call = self._call
        before = (call.generating, call.numbered, call.prefill, call.bias)
        call.generating, call.prefill, call.bias = False, None, None
        try:
            with self._results.aside():
                yield
        finally:
            call.generating, call.numbered, call.prefill, call.bias = before

    def _watched_prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a `generate` that does not come by way of the wrapper: its loop counts the tokens of full prompts."""
        if not self._removed and not self._call.generating:
            raise AttachError(
                "this generate was taken from the model before a method was attached, or from its class, and knows of "
                "no reduction: call model.generate"
            )
        return self._prepare(*args, **kwargs)

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call
        if call.generating and call.numbered:
            call.numbered = False  # of the first pass alone
            if kwargs.get("position_ids") is None:
                raise UnsupportedModelError(
                    f"generate of {type(module).__name__} throws position_ids away: use positions='compact'"
                )
        if call.generating and self._layers is None and call.bias is None:
            return None
        # By the class: accelerate puts a forward of its own on the instance.
        kwargs = named(type(module).forward, args, kwargs)
        if not call.generating:
            kwargs = self._reduced(kwargs)
        biased = None if self._biasing is None else self._biasing.begin(call.bias, kwargs)
        if self._layers is not None:
            prefill, call.prefill = call.prefill, None  # of the first pass of ``generate`` alone
            self._layers.begin(kwargs, prefill, biased)
        return (), kwargs

    def _reduced(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of a pass outside of ``generate``, reduced."""
        call, wanted = self._call, kwargs.pop("logits_to_keep", None) if self._full else None
        call.spread = None
        reduced = self._continuation.reduce(kwargs, given_cache(kwargs))
        call.compaction, call.bias = reduced.compaction, reduced.bias
        compaction = reduced.compaction if reduced.added is None else reduced.added
        if self._full and compaction is not None and not compaction.drops_nothing:
            call.spread = FullLength.ask(reduced, compaction, wanted, wants_tuple(self._model, kwargs))
        elif wanted is not None:
            reduced["logits_to_keep"] = wanted
        return dict(reduced)

    def _after_forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        cache = cache_of(output)
        biased = None if self._biasing is None else self._biasing.end()
        if biased is not None and biased.was_cut:
            self._call.bias = biased.bias
        if self._layers is not None and (run := self._layers.end()) is not None and output is not None:
            run.finish(cache)
            if run.state.prompts:
                self._results.own.inside = run.state
        if self._call.generating:
            return None
        if self._call.compaction is not None and cache is not None:
            note(cache, COMPACTION, self._call.compaction)
        self._note_bias(cache)
        self._call.bias = None
        if self._call.spread is None or output is None:
            return None
        spread, self._call.spread = self._call.spread, None
        return spread.of(output)


def shorten_limits(model: Any, kwargs: dict[str, Any], dropped: int) -> None:
    """Let limits of ``generate`` on the whole length count the dropped tokens, as without foveate."""
    config = kwargs.get("generation_config")
    config = model.generation_config if config is None else config
    for name, sibling in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = kwargs.get(name)
        limit = getattr(config, name, None) if limit is None else limit
        # transformers lets a limit on the new tokens, which counts no prompt, take precedence.
        if limit and kwargs.get(sibling) is None and getattr(config, sibling, None) is None:
            kwargs[name] = limit - dropped
