"""Running an encoder for what some of its layers put out, or are given, and no further."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import UnsupportedModelError


class _ReachedLastLayer(Exception):  # noqa: N818
    """Ends a pass through the encoder once the last layer that anybody reads has run."""


def layer_outputs(encoder: nn.Module, layers: Sequence[nn.Module], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Run an encoder and return the outputs of some of its layers, skipping the layers after the last of them.

    Layers are skipped unless the encoder is managed by accelerate, whose own clean-up must run to the end.
    """
    outputs: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, _: Any, output: Any) -> bool:
        # Layers that can return attention maps return tuples, others the hidden states alone.
        outputs[layer] = output[0] if isinstance(output, tuple) else output
        return len(outputs) == len(set(layers))

    stop = _stopping(encoder, keep)
    _run_hooked(encoder, [layer.register_forward_hook(stop) for layer in dict.fromkeys(layers)], *args, **kwargs)
    return [outputs[layer] for layer in layers]


def layer_input(encoder: nn.Module, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Run an encoder up to a layer and return the hidden states that go into it; see `layer_outputs`."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        return True

    hook = layer.register_forward_pre_hook(_stopping(encoder, keep), with_kwargs=True)
    _run_hooked(encoder, [hook], *args, **kwargs)
    return inputs[0]


def _stopping(encoder: nn.Module, keep: Callable[..., bool]) -> Callable[..., None]:
    """Return a hook that calls `keep` in this thread only, and ends the pass once that returns true."""
    thread = threading.get_ident()
    managed = any(hasattr(module, "_hf_hook") for module in encoder.modules())
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())

    def hook(*call: Any) -> None:
        if threading.get_ident() != thread:
            return
        # Before transformers 5.23, hooks run inside a checkpoint, and a reentrant one records no gradients there.
        if trained and not torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"with use_reentrant=True, gradient checkpointing of this version of transformers would give "
                f"{type(encoder).__name__} no gradients: use use_reentrant=False, freeze it, or update transformers"
            )
        if keep(*call) and not managed:
            raise _ReachedLastLayer

    return hook


def _run_hooked(encoder: nn.Module, hooks: Sequence[Any], *args: Any, **kwargs: Any) -> None:
    try:
        encoder(*args, **kwargs)
    except _ReachedLastLayer:
        pass
    finally:
        for hook in hooks:
            hook.remove()
