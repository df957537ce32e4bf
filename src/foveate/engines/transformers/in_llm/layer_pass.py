"""One forward pass of a model with methods inside its LLM, layer by layer, and what it leaves in a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.ambient import defaults
from foveate.core.checks import selected_inside
from foveate.core.errors import UnsupportedModelError
from foveate.core.rectify import bias, groups_of, shares
from foveate.core.rows import Rows
from foveate.core.selection import SpanSelection
from foveate.engines.transformers.bias.hooks import BiasPass
from foveate.engines.transformers.caches import given_cache, without_cache
from foveate.engines.transformers.in_llm.boundaries import Boundaries
from foveate.engines.transformers.in_llm.kept_columns import RemainingTokens
from foveate.engines.transformers.in_llm.layer_inputs import LayerInputs
from foveate.engines.transformers.in_llm.layer_probes import LayerProbes
from foveate.engines.transformers.in_llm.look_ahead import look_ahead
from foveate.engines.transformers.in_llm.pass_state import PassState
from foveate.engines.transformers.in_llm.support import check_pass
from foveate.engines.transformers.keywords import embedded
from foveate.engines.transformers.prompt_tokens import PromptTokens


class LayerPass:
    """One forward pass, layer by layer.

    Attributes
    ----------
    state
        The tokens of the pass, and what methods have left of them.
    inputs
        What the layers run with.
    probes
        What the methods read; `None` in a pass without visual tokens.
    looking_ahead
        Whether a layer only runs to show what it would attend with.
    biased
        What attention to tokens is raised by, if it is.
    """

    def __init__(
        self, boundaries: Boundaries, inputs: Mapping[str, Any], prompts: Sequence[PromptTokens],
        biased: BiasPass | None = None,
    ):  # fmt: skip
        cache, shape = given_cache(inputs), embedded(inputs)
        if prompts:
            check_pass(boundaries.decoder, cache)
        past = int(cache.get_seq_length()) if cache is not None else 0
        size = (int(shape.shape[0]), int(shape.shape[1]))
        self.state = PassState(boundaries, prompts, size, past, inputs.get("attention_mask"), shape.device)
        self.inputs = LayerInputs(self.state, cache)
        self.probes = LayerProbes(self.state) if prompts else None
        self.looking_ahead = False
        self.biased = biased
        self._embedded: list[Tensor] = []
        if biased is not None:
            biased.kept = self.inputs.kept
        self._carried: RemainingTokens | None = None  # what the hidden states between the layers hold

    @defaults()
    def enter(self, number: int, layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords with which a layer runs instead of those given."""
        hidden, state = kwargs["hidden_states"], self.state
        if number == 0:
            if self.probes is not None and hidden.dim() != 3:  # Gemma 3n runs several streams at once
                raise UnsupportedModelError(
                    f"{type(layer).__name__} runs on states {list(hidden.shape)}, of which tokens cannot be taken out: "
                    "use a method that acts before the LLM, such as vispruner"
                )
            self.inputs.cache = given_cache(kwargs)  # which the decoder makes, if the model was given none
            if self.probes is not None:
                self.probes.start(hidden)
                if self.biased is not None:
                    pairs = zip(state.prompts, state.tokens.visual, strict=True)
                    self._embedded = [hidden[p.sample, visual].detach() for p, visual in pairs]
        if state.remaining is not None and self._carried is not state.remaining:
            hidden = state.remaining.gather(hidden)  # `leave` gave all columns back to whoever writes into them
        if state.acting(number) is not None:
            hidden = self._cut(number, layer, {**kwargs, "hidden_states": hidden})
        self._carried = state.remaining
        if self.probes is not None:
            self.probes.entering(number, hidden)
        return self.inputs.of_layer(number, {**kwargs, "hidden_states": hidden}, keep=True)

    def leave(self, output: Any) -> Any:
        """Give the output of a layer its full length."""
        if self._carried is None:
            return output
        carried, self._carried = self._carried, None
        if isinstance(output, tuple):  # of a layer that also returns its attention
            return (carried.spread(output[0], self.state.width), *output[1:])
        return carried.spread(output, self.state.width)

    @defaults()
    def finish(self, cache: Any) -> None:
        """Note for later passes what a cache keeps after this one."""
        cache = self.inputs.cache if cache is None else cache
        if cache is not None:
            self.inputs.finish(cache)

    def _cut(self, number: int, layer: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        """Let the method of a boundary choose, and return the hidden states ``[B, R, D]`` that are left."""
        hidden: Tensor = kwargs["hidden_states"]

        def ahead(rows: Tensor | None) -> Rows:
            return self._look_ahead(number, layer, kwargs, rows)

        assert self.probes is not None
        tokens = self.probes.tokens(number, hidden, ahead)
        with torch.no_grad():
            chosen = selected_inside(self.state.boundaries.at[number], tokens)
        if all(c.is_identity for c in chosen):
            return hidden
        if any(c.merge is not None for c in chosen):
            hidden = hidden.clone()  # the model may hand these states out, or need them for gradients
            for prompt, picked, visual in zip(self.state.prompts, chosen, self.state.tokens.visual, strict=True):
                hidden[prompt.sample, visual.index_select(0, picked.kept)] = picked.apply(hidden[prompt.sample, visual])
        order = self.state.drop(number, chosen).to(hidden.device)
        if self.biased is not None:
            self.biased.cut(number, self._raised(number, self.biased))
        return hidden[torch.arange(len(order), device=hidden.device)[:, None], order]

    def _raised(self, number: int, biased: BiasPass) -> Tensor:
        """Return the plane ``[B, past + q]`` of what is left behind a boundary, by what it stands for now."""
        state = self.state
        plane = biased.plane(number, state.batch, state.device)
        for i, (prompt, given_to_llm) in enumerate(zip(state.prompts, self._embedded, strict=True)):
            origin, merge = state.tokens.origin[i], state.merges[number][i]
            if not len(origin):
                continue
            given = None if prompt.counts is None else prompt.counts[: prompt.free]
            groups = groups_of(prompt.crops("image"), prompt.free, origin)
            found = shares(groups, SpanSelection(prompt.free, origin, merge), given_to_llm, given)
            plane[prompt.sample, prompt.columns[origin] + state.past] = bias(found, biased.strength)
        return plane

    def _look_ahead(self, number: int, layer: nn.Module, kwargs: dict[str, Any], rows: Tensor | None) -> Rows:
        """Return what a layer would attend with if nothing were dropped in front of it."""
        arranged = without_cache(self.inputs.of_layer(number, kwargs))
        # Implementations differ in what they make of a mask; the rows of attention are worked out with this one.
        mask, arranged["attention_mask"] = arranged["attention_mask"], None
        self.looking_ahead = True
        try:
            with torch.no_grad():
                found = look_ahead(layer, arranged, rows, kwargs["hidden_states"].shape[1])
        finally:
            self.looking_ahead = False
        key = found.key
        if self.state.past:
            old = self.inputs.cache.layers[number].keys
            key = torch.cat([old.to(key.device), key], dim=2)
        window = found.window if mask is None or mask.dim() == 2 else None
        raised = None if self.biased is None else self.biased.of_layer(number, int(key.shape[2]), key.device)
        return Rows(found.query, key, found.scaling, mask, window, found.softcap, raised)
