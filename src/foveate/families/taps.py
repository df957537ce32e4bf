"""Taps: reading probes from an encoder that runs as it always does.

Attention rows come from a twin of the model's current attention implementation: it calls the original and, on the
modules that a tap marks, computes the few rows that a method reads. No layer is forced to eager attention and no
attention map is built.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.ambient import neutral
from foveate.core.errors import UnsupportedModelError
from foveate.core.probes import Heads, LayerProbe

_PREFIX = "foveate_"


class Taps:
    """Probes on attention modules, and what they read in the last pass."""

    def __init__(self, probes: dict[nn.Module, list[LayerProbe]], lead: int, lengths: Sequence[int] | None = None):
        self.probes, self.lead, self.lengths = probes, lead, lengths
        self._parts: dict[tuple[nn.Module, LayerProbe], list[Tensor]] = {}

    def read(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        bounds: Tensor | None,
        mask: Any = None,
        out: Tensor | None = None,
    ) -> None:
        """Read one call of a module.

        `bounds` are where packed sequences begin and end, if several share the call; `out` is what it returns.
        """
        for probe in self.probes.get(module, ()):
            visible = None if self.lengths is not None else visible_keys(mask)  # cut apart, pictures need no mask
            with torch.no_grad(), neutral():
                for q, k, v in self._sequences(query.detach(), key.detach(), value.detach(), bounds):
                    values = probe.read(Heads(q, k, v, scaling, self.lead, visible))
                    self._parts.setdefault((module, probe), []).append(values)

    def values(self, module: nn.Module, probe: LayerProbe) -> list[Tensor]:
        """Return what was read, ``[B, N, ...]`` per sequence or stack of sequences, in the order of the calls."""
        return self._parts[module, probe]

    def missing(self) -> list[LayerProbe]:
        """Return the probes that a module was given but never asked."""
        return [p for module, probes in self.probes.items() for p in probes if (module, p) not in self._parts]

    def _sequences(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Tell the pictures of one call apart: packed one behind the other, or padded to the longest."""
        heads = (query, key, value)
        lengths = self.lengths
        if lengths is None and bounds is not None and len(bounds) > 2:
            lengths = bounds.diff().tolist()
        if lengths is None or all(n == query.shape[2] for n in lengths):
            yield heads
        elif len(lengths) == len(query):
            for row, n in enumerate(lengths):
                yield tuple(x[row : row + 1, :, :n] for x in heads)
        else:
            yield from zip(*(torch.split(x, list(lengths), dim=2) for x in heads), strict=True)


def visible_keys(mask: Any) -> Tensor | None:
    """Return which keys each query attends to, ``[B, 1, S or 1, S]`` bool, by the mask of any implementation.

    That is ``[B, S]`` and true at content, or ``[B, 1, S, S]`` and either true or zero where a key is seen.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask.bool()[:, None, None]
    return mask if mask.dtype == torch.bool else mask == 0


_active: ContextVar[Taps | None] = ContextVar("foveate_taps", default=None)
_lock = threading.Lock()
_tapped: dict[int, int] = {}  # how many passes use the twin on a configuration, by its identity


@contextmanager
def tap(
    encoder: nn.Module, probes: dict[nn.Module, list[LayerProbe]], lead: int, lengths: Sequence[int] | None = None
) -> Iterator[Taps]:
    """Run an encoder with probes on some of its attention modules.

    Parameters
    ----------
    encoder
        A `transformers` model whose attention goes through the `AttentionInterface`, or one of timm's, which call the
        fused kernel of torch themselves.
    probes
        For each attention module what to read there.
    lead
        Tokens before the patches, such as ``[CLS]``.
    lengths
        Patches of each picture of a call, where the encoder packs pictures into one sequence under a mask, or pads
        them to the longest.
    """
    taps = Taps(probes, lead, lengths)
    if not probes:
        yield taps
        return
    with _fused(taps) if hasattr(encoder, "timm_model") else twin(encoder, taps):
        yield taps
    if missing := taps.missing():
        raise UnsupportedModelError(
            f"{type(encoder).__name__} did not call its attention through the AttentionInterface of transformers or a "
            f"fused kernel of torch, so {missing} cannot be read: use a method that needs only token features, such as "
            "'uniform' or 'random'"
        )


@contextmanager
def twin(encoder: nn.Module, taps: Taps) -> Iterator[None]:
    """Show all calls that an encoder makes through the `AttentionInterface` on this thread to some taps."""
    _use_twin(encoder)
    token = _active.set(taps)
    try:
        yield
    finally:
        _active.reset(token)
        _drop_twin(encoder)


class _FusedCalls(TorchFunctionMode):
    """Reads the calls of the fused attention kernel that marked modules make on this thread."""

    def __init__(self, taps: Taps):
        super().__init__()
        self.taps = taps
        self.module: nn.Module | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and self.module is not None:
            query, key, value = args
            scaling = kwargs.get("scale")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            self.taps.read(self.module, query, key, value, scaling, None, kwargs.get("attn_mask"))
        return func(*args, **kwargs)


@contextmanager
def _fused(taps: Taps) -> Iterator[None]:
    calls, thread = _FusedCalls(taps), threading.get_ident()

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            calls.module = module

    def leave(*_: Any) -> None:
        if threading.get_ident() == thread:
            calls.module = None

    hooks = [hook for m in taps.probes for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with calls:
            yield
    finally:
        for hook in hooks:
            hook.remove()


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


def implementation_of(config: Any) -> str | None:
    """Return the attention implementation of a model, also while a pass on another thread reads it by way of a twin."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return None if name is None else _originals.get(name, name)


def _register_twin(name: str) -> str:
    # transformers takes a name with a slash for a kernel that is to be fetched from the hub.
    twin = _PREFIX + name.replace("/", "_").replace("|", "_")
    if twin in _originals:
        return twin
    _originals[twin] = name

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        call = functools.partial(_attention_function(name, module), _seen_as(name, module))
        watched = list(_watching(module))
        for one in watched:
            if one.read is not None:
                one.read(module, query, key, attention_mask, kwargs)
        # Readers are shown what the model calls; who goes around the call may change it.
        for one in watched:
            if one.around is not None:
                call = functools.partial(one.around, Around(module, name, call))
        out = call(query, key, value, attention_mask, **kwargs)
        taps = _active.get()
        if taps is not None:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            bounds = kwargs.get("cu_seq_lens_q")
            # Packed sequences are cut apart by their bounds; a mask then only tells them from each other.
            taps.read(module, query, key, value, scaling, bounds, attention_mask if bounds is None else None, out[0])
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


class _Watched(_View):
    """The configuration of a single attention module, which makes it alone call the twin, which asks it what to do."""

    def __init__(self, config: Any, read: Callable[..., None] | None, around: Callable[..., Any] | None):
        super().__init__(config, read=read, around=around)

    @property
    def _attn_implementation(self) -> str:
        return _register_twin(_models_own(self)._attn_implementation or "eager")

    @property
    def seen(self) -> Any:
        """The configuration of the model, or what watches it besides."""
        return self._seen


def _watching(module: nn.Module) -> Iterator[_Watched]:
    config = getattr(module, "config", None)
    while isinstance(config, _Watched):
        yield config
        config = config.seen


def _models_own(config: Any) -> Any:
    """Return the configuration of the model behind those that watch it."""
    while isinstance(config, _Watched):
        config = config.seen
    return config


@dataclass(frozen=True, eq=False)
class Around:
    """A call of an attention function that somebody may change: of which module and implementation, and the rest."""

    module: nn.Module
    implementation: str
    call: Callable[..., Any]


class Watch:
    """Attention modules whose every call is shown to a reader before it runs, or handed to one, until removed.

    Parameters
    ----------
    modules
        Modules that call their attention through the `AttentionInterface` of `transformers`.
    read
        Gets the module, its queries and keys, the mask and the further keywords of the call.
    around
        Gets an `Around`, queries, keys, values, the mask and the further keywords, and returns what the call does.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        read: Callable[..., None] | None = None,
        around: Callable[..., Any] | None = None,
    ):
        for module in modules:
            if getattr(module, "config", None) is None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} does not call its attention through the AttentionInterface of "
                    "transformers, so methods that act inside the LLM cannot read it: use one that acts before the LLM"
                )
        self._modules = list(modules)
        for module in self._modules:
            module.config = _Watched(module.config, read, around)  # type: ignore[assignment]

    def remove(self) -> None:
        """Give the modules their own configuration back."""
        for module in self._modules:
            module.config = module.config.seen  # type: ignore[union-attr]


def _seen_as(name: str, module: nn.Module) -> Any:
    """Return a module as the original implementation expects it: flash attention looks its own name up there."""
    config = _models_own(getattr(module, "config", None))
    return module if config is None else _View(module, config=_View(config, _attn_implementation=name))


def _original_name(twin: str) -> str:
    return _originals[twin]


def _attention_function(name: str, module: nn.Module) -> Callable[..., Any]:
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
    # Eager attention is registered nowhere: each modeling file has its own, that of a parent class where it has none.
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedModelError(f"{type(module).__name__} has no attention function called {name!r}")
