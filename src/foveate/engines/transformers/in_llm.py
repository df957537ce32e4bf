"""The engine for methods inside the language model: hooks on its layers that drop visual tokens between them.

A pass runs over q new columns of the prompts. The layers behind a boundary at which tokens were dropped hold fewer of
them: `Held` remembers which, for each layer and for as long as its KV cache lives. From this follow the masks, the
rotary embeddings and the lengths of every later pass, so that decoding, a second turn, beams and padded batches need
nothing else. The hidden states that leave the last layer have their full length again, each dropped token being a copy
of the one before it that is left. So whatever reads them (logits, labels, further planes of features) finds every
token where it was, and the text behind an image is predicted from the last token that is left of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.in_llm import InLlmReducer
from foveate.core.probes import LayerStates
from foveate.core.reducer import Positions
from foveate.core.rows import Rows
from foveate.engines.transformers.caches import HELD, note, noted
from foveate.engines.transformers.given import Given, Shown, given, placeholders
from foveate.engines.transformers.held import Held
from foveate.engines.transformers.layer_pass import STATIC, Pass, embedded
from foveate.engines.transformers.sight import Seen, reads_ahead, reads_executed
from foveate.families import Family
from foveate.families.taps import Watch
from foveate.families.tower import attention_of


class Layers:
    """Hooks on the decoder layers of a model, and what the caches hold.

    Parameters
    ----------
    reducers
        The methods, whose boundaries ascend from one to the next.
    positions
        Whether tokens keep the positions with which they entered the LLM, or are numbered anew behind each boundary.
    """

    def __init__(self, model: Any, family: Family, reducers: Sequence[InLlmReducer], positions: Positions):
        self.model, self.family, self.reducers, self.positions = model, family, tuple(reducers), positions
        self.decoder: Any = model.get_decoder()
        check_decoder(self.decoder, positions)
        layers: Sequence[nn.Module] = self.decoder.layers[: self.decoder.config.num_hidden_layers]
        self.depth = len(layers)
        self.boundaries = self._boundaries()
        self._local = threading.local()
        written = family.layers_written(model)
        watched = {b - 1 for b, r in self.boundaries.items() if reads_executed(r)}
        watched |= {b for b, r in self.boundaries.items() if reads_ahead(r)}
        self._watch = Watch([attention_of(layers[i]) for i in sorted(watched)], self._attending)
        self._numbers = {attention_of(layers[i]): i for i in watched}
        self._hooks = []
        for i, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(self._entering(i), with_kwargs=True))
            if i == self.depth - 1 or i < written:
                self._hooks.append(layer.register_forward_hook(self._leaving))
        for boundary, reducer in self.boundaries.items():
            if LayerStates("mlp") in reducer.needs:
                self._hooks.append(_mlp_of(layers[boundary - 1]).register_forward_pre_hook(self._inside(boundary - 1)))

    def _boundaries(self) -> dict[int, InLlmReducer]:
        found: dict[int, InLlmReducer] = {}
        for reducer in self.reducers:
            for boundary in reducer.boundaries(self.depth):
                if boundary <= max(found, default=0):
                    raise InputError(
                        f"{reducer.name} drops tokens in front of layer {boundary}, but a method before it does so in "
                        f"front of {max(found, default=0)}: give methods inside the LLM ascending layers"
                    )
                found[boundary] = reducer
        return found

    def remove(self) -> None:
        """Take everything off the model again."""
        for hook in self._hooks:
            hook.remove()
        self._watch.remove()

    def begin(self, inputs: Mapping[str, Any], shown: Shown | None = None) -> None:
        """Prepare for a forward pass of the model.

        Parameters
        ----------
        inputs
            Keywords of the pass.
        shown
            The visual tokens that a method before the LLM has left, if there is one.
        """
        run = self._local.run = Pass(self, inputs, self._shown(inputs, shown))
        run.show_whole_cache()

    def end(self) -> Pass | None:
        """Finish a forward pass, and return it."""
        run: Pass | None = getattr(self._local, "run", None)
        self._local.run = None
        if run is not None:
            run.show_own_cache()
        return run

    def held(self, cache: Any, batch: int) -> dict[int, Held]:
        """Return what the layers of a cache hold, where that is less than the first one."""
        known: dict[int, Held] = noted(cache, HELD) or {}
        return {layer: held.expanded(batch) for layer, held in known.items()}

    def remember(self, cache: Any, held: dict[int, Held]) -> None:
        """Note what the layers of a cache hold."""
        if held:
            note(cache, HELD, held)

    def _shown(self, inputs: Mapping[str, Any], shown: Shown | None) -> list[Given]:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if shown is not None:
            return shown.in_pass(*embedded(inputs).shape[:2])
        encoded = inputs.get("mm_encoder_outputs")
        if ids is None or encoded is None:
            return []
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise InputError("a method inside the LLM needs the 2-D attention mask of the processor")
        return given(placeholders(self.model, ids, encoded), mask, ids.shape[1], ids.device)

    def _running(self) -> Pass | None:
        return getattr(self._local, "run", None)

    def _entering(self, number: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self._running()
            if run is None or run.peeking:
                return None
            out = run.enter(number, layer, {"hidden_states": args[0], **kwargs} if args else kwargs)
            # transformers collects hidden states where they were handed over.
            return ((out.pop("hidden_states"),) if args else ()), out

        return hook

    def _leaving(self, layer: nn.Module, args: Any, output: Any) -> Any:
        run = self._running()
        return output if run is None or run.peeking else run.widen(output)

    def _inside(self, number: int) -> Callable[..., None]:
        def hook(mlp: nn.Module, args: tuple[Any, ...]) -> None:
            run = self._running()
            if run is not None and run.prompts:
                run.sight.inside(number, args[0])

        return hook

    def _attending(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> None:
        run = self._running()
        if run is None or not run.prompts:
            return
        rows = Rows.of_call(query, key, mask, kwargs)
        if run.peeking:
            raise Seen(rows)
        run.sight.executed(self._numbers[module], rows)


def check_decoder(decoder: Any, positions: Positions) -> None:
    """Raise `UnsupportedModelError` unless all layers of an LLM attend, and tokens can be numbered as is wanted."""
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has layers of the kinds {', '.join(sorted(strange))}, but methods inside the "
            "LLM need attention in every layer: use a method that acts before the LLM, such as vispruner"
        )
    if positions == "compact" and not hasattr(decoder, "rotary_emb"):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has no rotary embedding to number tokens anew with: use positions='original'"
        )


def _mlp_of(layer: nn.Module) -> nn.Module:
    for name, module in layer.named_children():
        if name in ("mlp", "feed_forward", "block_sparse_moe"):
            return module
    raise UnsupportedModelError(f"no feed-forward network found in {type(layer).__name__}")


def refuse(model: Any, options: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` if ``generate`` is asked for what methods inside the LLM cannot go along with."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> Any:
        value = options.get(name)
        return getattr(config, name, None) if value is None else value

    back = "takes tokens back, but methods inside the LLM give layers caches of different lengths: leave it out"
    advice = {
        "assistant_model": f"assisted decoding {back}",
        "prompt_lookup_num_tokens": f"prompt lookup {back}",
        "prefill_chunk_size": "methods inside the LLM rank the visual tokens by the end of the prompt, which a chunk "
        "does not show: leave prefill_chunk_size out",
    }
    for name, reason in advice.items():
        if asked(name):
            raise UnsupportedModelError(reason)
    if asked("use_cache") is False:
        raise UnsupportedModelError(
            "without a cache, methods inside the LLM would choose other tokens for each one that is generated: leave "
            "use_cache on"
        )
    if "static" in str(asked("cache_implementation")):
        raise UnsupportedModelError(STATIC)
