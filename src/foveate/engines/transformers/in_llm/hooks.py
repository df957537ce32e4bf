"""The engine for methods inside the language model: hooks on its layers that drop visual tokens between them.

A pass runs over q new columns of the prompts. The layers behind a boundary at which tokens were dropped keep fewer of
them: `KeptColumns` remembers which, for each layer and for as long as its KV cache lives. From this follow the masks,
the rotary embeddings and the lengths of every later pass, so that decoding, a second turn, beams and padded batches
need nothing else. The hidden states that leave the last layer have their full length again, each dropped token being a
copy of the one before it that is left, or zeros if there is none. So whatever reads them (logits, labels, further
planes of features) finds every token where it was, and the text behind an image is predicted from the last token that
is left of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from foveate.core.ambient import defaults
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.in_llm import InLlmReducer
from foveate.core.probes import LayerStates
from foveate.core.reducer import Positions
from foveate.core.rows import Rows
from foveate.engines.transformers.bias.hooks import BiasPass
from foveate.engines.transformers.in_llm.boundaries import Boundaries
from foveate.engines.transformers.in_llm.layer_pass import LayerPass
from foveate.engines.transformers.in_llm.layer_probes import reads_ahead, reads_executed
from foveate.engines.transformers.in_llm.look_ahead import LookedAhead
from foveate.engines.transformers.in_llm.support import check_boundaries, check_decoder
from foveate.engines.transformers.keywords import embedded, named
from foveate.engines.transformers.packing import packed_prompts
from foveate.engines.transformers.prompt_tokens import Prefill, PromptTokens, placeholders, tokens_by_prompt
from foveate.families import Family
from foveate.families.taps import Watch
from foveate.families.tower import attention_of


class LayerHooks:
    """Hooks on the decoder layers of a model; each thread is in a pass of its own.

    Parameters
    ----------
    reducers, positions
        See `Boundaries`.
    full
        Whether every layer is to hand out all columns.
    """

    def __init__(
        self, model: Any, family: Family, reducers: Sequence[InLlmReducer], positions: Positions, full: bool = False
    ):
        self._model, decoder = model, model.get_decoder()
        check_decoder(decoder, positions)
        self._boundaries = Boundaries.of(decoder, reducers, positions)
        self._local = threading.local()
        layers, at = self._boundaries.layers, self._boundaries.at
        check_boundaries(decoder, at)
        read = {b - 1 for b, r in at.items() if reads_executed(r)} | {b for b, r in at.items() if reads_ahead(r)}
        self._numbers = {attention_of(layers[i]): i for i in sorted(read)}
        # Found before anything is put on the model: a model without one is refused, and stays as it was.
        mlps = {b - 1: _mlp_of(layers[b - 1]) for b, r in at.items() if LayerStates("mlp") in r.needs}
        self._watch = Watch(list(self._numbers), self._attending)
        self._hooks = [
            layer.register_forward_pre_hook(self._entering(i), with_kwargs=True) for i, layer in enumerate(layers)
        ]
        # Whoever reads or writes the output of a layer (the head; DeepStack in Qwen3-VL) finds all columns there.
        for i in range(len(layers)) if full else {len(layers) - 1, *range(family.layers_written(model))}:
            # In front of the hooks with which transformers collects hidden states, whenever it has put these on.
            self._hooks.append(layers[i].register_forward_hook(self._leaving, prepend=True))
        self._hooks += [mlp.register_forward_pre_hook(self._inside(number)) for number, mlp in mlps.items()]

    def remove(self) -> None:
        """Take everything off the model again."""
        for hook in self._hooks:
            hook.remove()
        self._watch.remove()

    @defaults()
    def begin(self, inputs: Mapping[str, Any], prefill: Prefill | None = None, biased: BiasPass | None = None) -> None:
        """Prepare for a forward pass of the model.

        Parameters
        ----------
        inputs
            Keywords of the pass.
        prefill
            The visual tokens that it gives the LLM, where they are known.
        biased
            What attention to tokens is raised by in this pass.
        """
        prompts = self._prompts(inputs, prefill)
        if prompts and packed_prompts(inputs) is not None:
            raise InputError(
                f"{self._boundaries.reducers[0].name} ranks visual tokens by what stands at the end of a prompt, and a "
                "packed row holds several: pad the prompts to a batch instead"
            )
        run = self._local.run = LayerPass(self._boundaries, inputs, prompts, biased)
        run.inputs.show_whole_cache()

    @defaults()
    def end(self) -> LayerPass | None:
        """Finish a forward pass, and return it."""
        run = self._running()
        self._local.run = None
        if run is not None:
            run.inputs.show_own_cache()
        return run

    def _prompts(self, inputs: Mapping[str, Any], prefill: Prefill | None) -> list[PromptTokens]:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if prefill is not None:
            return prefill.in_pass(*embedded(inputs).shape[:2])
        encoded = inputs.get("mm_encoder_outputs")
        if ids is None or encoded is None:
            return []
        # Inputs that `foveate.reduce` made, or somebody's own encoder: the ids alone tell where visual tokens are.
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise InputError("a method inside the LLM needs the 2-D attention mask of the processor")
        return tokens_by_prompt(placeholders(self._model, ids, encoded), mask, ids.shape[1], ids.device)

    def _running(self) -> LayerPass | None:
        return getattr(self._local, "run", None)

    def _entering(self, number: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self._running()
            if run is None or run.looking_ahead:
                return None
            # By name: Gemma 4 calls its layers with further inputs by place.
            out = run.enter(number, layer, named(type(layer).forward, args, kwargs))
            # transformers collects hidden states where they were handed over.
            return ((out.pop("hidden_states"),) if args else ()), out

        return hook

    def _leaving(self, layer: nn.Module, args: Any, output: Any) -> Any:
        run = self._running()
        return output if run is None else run.leave(output)

    def _inside(self, number: int) -> Callable[..., None]:
        def hook(mlp: nn.Module, args: tuple[Any, ...]) -> None:
            run = self._running()
            if run is not None and run.probes is not None:
                run.probes.inside(number, args[0])

        return hook

    def _attending(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> None:
        run = self._running()
        if run is None or run.probes is None:
            return
        rows = Rows.of_call(query, key, mask, kwargs)
        if run.looking_ahead:
            raise LookedAhead(rows)
        if run.biased is not None:
            raised = run.biased.of_layer(self._numbers[module], int(key.shape[2]), key.device)
            rows = replace(rows, bias=raised)
        run.probes.executed(self._numbers[module], rows)


def _mlp_of(layer: nn.Module) -> nn.Module:
    for name, module in layer.named_children():
        if name in ("mlp", "feed_forward", "block_sparse_moe"):
            return module
    raise UnsupportedModelError(f"no feed-forward network found in {type(layer).__name__}")
