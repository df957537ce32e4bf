"""Probes: the cues that methods need besides the tokens, read from an encoder that runs as it always does.

Attention rows come from a twin of the model's current attention implementation: it calls the original and, on the
modules that a tap marks, computes the few rows that a method reads. No layer is forced to eager attention and no
attention map is built.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.errors import UnsupportedModelError

_PREFIX = "foveate_"
_QUERY_CHUNK = 256


@dataclass(frozen=True)
class Features:
    """Encoder features that the projector reads, ``[N, C]`` per crop."""


@dataclass(frozen=True)
class Attention:
    """Attention that patches get inside the vision encoder, averaged over heads, ``[N]`` per crop.

    Parameters
    ----------
    of
        ``"cls"``: the row of the ``[CLS]`` query, softmax over all keys and the ``[CLS]`` column then dropped.
        ``"received"``: the mean over all query rows. ``"auto"``: ``"cls"`` where the encoder has such a token,
        ``"received"`` otherwise.
    layers
        Encoder layers counted back from the one whose output the projector reads, which is ``-1``. With several,
        the values are ``[N, len(layers)]``.
    """

    of: Literal["auto", "cls", "received"] = "auto"
    layers: tuple[int, ...] = (-1,)


Probe: TypeAlias = Features | Attention


def cls_row(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention of the first query to all other tokens.

    Parameters
    ----------
    query, key
        ``[B, H, 1 + N, d]``, not yet scaled.
    scaling
        Factor on the products, usually ``d ** -0.5``.

    Returns
    -------
    Tensor
        ``[B, N]`` float32, mean over heads; the mass that falls on the first token itself is missing.
    """
    logits = torch.matmul(query[:, :, :1].float(), key.float().transpose(-1, -2)) * scaling
    return logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def received(query: Tensor, key: Tensor, scaling: float, skip: int = 0) -> Tensor:
    """Attention that each token gets, mean over all query rows and heads.

    Works through the rows in chunks, so that no ``N x N`` map is stored.

    Parameters
    ----------
    query, key
        ``[B, H, S, d]``, not yet scaled.
    skip
        Leading tokens (such as ``[CLS]``) that are left out of the result, not out of the softmax.

    Returns
    -------
    Tensor
        ``[B, S - skip]`` float32; sums to one if `skip` is zero.
    """
    transposed = key.float().transpose(-1, -2)
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    for rows in torch.split(query, _QUERY_CHUNK, dim=2):
        total += (torch.matmul(rows.float(), transposed) * scaling).softmax(dim=-1).sum(dim=2).mean(dim=1)
    return total[:, skip:] / query.shape[2]


Reader: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""What a tap runs on a layer's queries and keys ``[B, H, S, d]`` and its scaling."""


class Taps:
    """Readers on attention modules, and what they read in the last pass."""

    def __init__(self, readers: dict[nn.Module, dict[Any, Reader]]):
        self.readers = readers
        self.values: dict[Any, Tensor] = {}

    def read(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        for name, reader in self.readers.get(module, {}).items():
            with torch.no_grad():
                self.values[name] = reader(query.detach(), key.detach(), scaling)


_active: ContextVar[Taps | None] = ContextVar("foveate_taps", default=None)
_lock = threading.Lock()
_tapped: dict[int, int] = {}  # how many passes use the twin on a configuration, by its identity


@contextmanager
def tap(encoder: nn.Module, readers: dict[nn.Module, dict[Any, Reader]]) -> Iterator[Taps]:
    """Run an encoder with readers on some of its attention modules.

    Parameters
    ----------
    encoder
        A `transformers` model whose attention goes through the `AttentionInterface`.
    readers
        For each attention module the readers to run there, by the name of what they read.
    """
    taps = Taps(readers)
    if not readers:
        yield taps
        return
    _use_twin(encoder)
    token = _active.set(taps)
    try:
        yield taps
    finally:
        _active.reset(token)
        _drop_twin(encoder)
    missing = [name for module in readers.values() for name in module if name not in taps.values]
    if missing:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} did not call its attention through the AttentionInterface of transformers, "
            f"so {missing} cannot be read: use a method that needs only token features, such as 'uniform' or 'random'"
        )


def _use_twin(encoder: nn.Module) -> None:
    config: Any = encoder.config
    with _lock:
        if not _tapped.get(id(config)):
            name = config._attn_implementation or "eager"
            encoder.set_attn_implementation(_register_twin(name))  # type: ignore[operator]
        _tapped[id(config)] = _tapped.get(id(config), 0) + 1


def _drop_twin(encoder: nn.Module) -> None:
    config: Any = encoder.config
    with _lock:
        _tapped[id(config)] -= 1
        if not _tapped[id(config)]:
            del _tapped[id(config)]
            config._attn_implementation_internal = _original_name(config._attn_implementation)


_originals: dict[str, str] = {}


def _register_twin(name: str) -> str:
    twin = _PREFIX + name.replace("/", "_").replace("|", "_")
    _originals[twin] = name

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        seen = _seen_as(name, module)
        out = _attention_function(name, module)(seen, query, key, value, attention_mask, **kwargs)
        taps = _active.get()
        if taps is not None:
            scaling = kwargs.get("scaling")
            taps.read(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return out

    AttentionInterface.register(twin, attention)
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(twin, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return twin


class _View:
    """An object with some attributes replaced."""

    def __init__(self, seen: Any, **changes: Any):
        self.__dict__.update(changes, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)


def _seen_as(name: str, module: nn.Module) -> Any:
    """Return a module as the original implementation expects it: flash attention looks its own name up there."""
    config = getattr(module, "config", None)
    return module if config is None else _View(module, config=_View(config, _attn_implementation=name))


def _original_name(twin: str) -> str:
    return _originals[twin]


def _attention_function(name: str, module: nn.Module) -> Callable[..., Any]:
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedModelError(f"{type(module).__name__} has no attention function called {name!r}")


class _ReachedLastLayer(Exception):  # noqa: N818
    """Ends a pass through the encoder once the last layer that anybody reads has run."""


def layer_outputs(encoder: nn.Module, layers: Sequence[nn.Module], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Run an encoder and return the outputs of some of its layers, skipping the layers after the last of them.

    Layers are skipped unless the encoder is managed by accelerate, whose own clean-up must run to the end.
    """
    outputs: dict[nn.Module, Tensor] = {}
    thread = threading.get_ident()
    managed = any(hasattr(module, "_hf_hook") for module in encoder.modules())

    def keep(layer: nn.Module, _: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return  # a pass of another thread through the same encoder
        outputs[layer] = output[0] if isinstance(output, tuple) else output
        if len(outputs) == len(set(layers)) and not managed:
            raise _ReachedLastLayer

    hooks = [layer.register_forward_hook(keep) for layer in dict.fromkeys(layers)]
    try:
        encoder(*args, **kwargs)
    except _ReachedLastLayer:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[layer] for layer in layers]
