"""Attention modules of an LLM whose keys have a bias, for as long as a method is attached."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import UnsupportedModelError
from foveate.engines.transformers.bias.planes import Bias
from foveate.engines.transformers.bias.routes import FURTHER, additive, augmented, takes_mask
from foveate.engines.transformers.caches import given_cache
from foveate.engines.transformers.in_llm.kept_columns import KeptColumns
from foveate.engines.transformers.keywords import embedded, named
from foveate.families.taps import Around, Watch
from foveate.families.tower import attention_of

_WIDEST = 256
"""Heads that flash attention takes."""


class BiasPass:
    """One pass of a model, over the last of some columns.

    Attributes
    ----------
    bias
        Of all columns up to the last of the pass; `None` so far.
    strength
        See `foveate.engines.settings.Settings.rectify`.
    was_cut
        Whether a method inside the LLM has dropped tokens.
    kept
        Tells what a layer keeps of these columns, `None` for all.
    """

    def __init__(self, bias: Bias | None, batch: int, length: int, strength: float):
        self.bias, self.strength = None if bias is None else bias.fitted(batch, length), strength
        self.was_cut = False
        self.kept: Callable[[int], KeptColumns | None] = lambda layer: None
        self._length = length
        self._made: dict[Any, Any] = {}

    def plane(self, layer: int, batch: int, device: torch.device) -> Tensor:
        """Return a copy of the plane ``[B, length]`` that holds for a layer."""
        found = None if self.bias is None else self.bias.at(layer)
        return torch.zeros(batch, self._length, device=device) if found is None else found.clone()

    def cut(self, layer: int, plane: Tensor) -> None:
        """Take in the plane ``[B, length]`` that holds from a layer on, in front of which tokens are dropped."""
        self.bias = (Bias({}) if self.bias is None else self.bias).cut(layer, plane)
        self.was_cut = True

    def of_layer(self, layer: int, keys: int, device: torch.device) -> Tensor | None:
        """Return the bias ``[B, keys]`` of the keys of a layer: the last ones, where it has a window.

        A static cache has room for further ones behind.
        """
        plane = None if self.bias is None else self.bias.at(layer)
        if plane is None:
            return None
        kept = self.kept(layer)
        key = (id(plane), id(kept), keys, device)
        if key not in self._made:
            own = plane
            if kept is not None:
                columns = kept.until(self._length).to(plane.device)
                own = plane.gather(1, columns.clamp(min=0)) * (columns >= 0)
            own = own[:, -keys:]
            self._made[key] = torch.nn.functional.pad(own, (0, keys - own.shape[1])).to(device), plane, kept
        return self._made[key][0]  # type: ignore[no-any-return]

    def mask(self, mask: Tensor | None, own: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """Return `additive`; layers that share a mask share the result."""
        which = (id(mask), id(own), query.shape[2], query.dtype, causal)
        if which not in self._made:
            self._made[which] = additive(mask, own, query, key, causal), mask, own
        return self._made[which][0]  # type: ignore[no-any-return]


class Biasing:
    """Lets the attention of an LLM take up a bias, until removed; each thread is in a pass of its own.

    Parameters
    ----------
    strength
        Of the bias that methods inside the LLM come to.
    """

    def __init__(self, model: Any, strength: float = 0.0):
        self._decoder, self._strength = model.get_decoder(), strength
        layers = self._decoder.layers[: self._decoder.config.num_hidden_layers]
        # Layers of linear attention, and convolutions, know no logits to raise.
        self._numbers = {found: i for i, layer in enumerate(layers) if (found := _attention(layer)) is not None}
        self._check()
        self._local = threading.local()
        self._watch = Watch(list(self._numbers), around=self._attend)

    def _check(self) -> None:
        config, name = self._decoder.config, str(self._decoder.config._attn_implementation)
        if "flash" not in name and "flex" not in name:
            return
        advice = "load the model with attn_implementation='sdpa' or 'eager', or leave rectify out"
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise UnsupportedModelError(f"{name} bounds logits before a bias could be added: {advice}")
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if "flash" in name and head + FURTHER > _WIDEST:
            raise UnsupportedModelError(f"{name} has no room for a bias beside heads of {head} components: {advice}")

    def begin(self, bias: Bias | None, inputs: Mapping[str, Any]) -> BiasPass:
        """Prepare for a pass with some keywords of the model."""
        if bias is not None and self._decoder.training and getattr(self._decoder, "gradient_checkpointing", False):
            raise UnsupportedModelError(
                "gradient checkpointing runs attention again, when the bias is gone: switch it off, or leave rectify "
                "out"
            )
        cache, (batch, width, *_) = given_cache(inputs), embedded(inputs).shape
        past = 0 if cache is None else int(cache.get_seq_length())
        run = self._local.run = BiasPass(bias, batch, past + width, self._strength)
        return run

    def end(self) -> BiasPass | None:
        """Finish a pass, and return it."""
        run = self.running()
        self._local.run = None
        return run

    def running(self) -> BiasPass | None:
        """Return the pass that this thread is in."""
        return getattr(self._local, "run", None)

    def remove(self) -> None:
        """Take everything off the model again."""
        self._watch.remove()

    def _attend(self, around: Around, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        run, module = self.running(), around.module
        own = None if run is None else run.of_layer(self._numbers[module], int(key.shape[2]), key.device)
        if run is None or own is None:
            return around.call(query, key, value, mask, **kwargs)
        if takes_mask(around.implementation, mask, query.shape[2], kwargs):
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            return around.call(query, key, value, run.mask(mask, own, query, key, bool(causal)), **kwargs)
        return augmented(around.call, query, key, value, mask, own, kwargs)


def _attention(layer: nn.Module) -> nn.Module | None:
    try:
        return attention_of(layer)
    except UnsupportedModelError:
        return None


@contextmanager
def biased(model: Any, bias: Bias | None) -> Iterator[None]:
    """Let passes of a model, in the body of the ``with`` statement, attend with the bias of their columns."""
    if bias is None:
        yield
        return
    biasing = Biasing(model)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        biasing.begin(bias, named(type(module).forward, args, kwargs))

    def after(*_: Any) -> None:
        biasing.end()

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        biasing.remove()
