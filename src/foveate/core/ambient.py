"""Torch's ambient state: what a method decides does not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_users_dtype: list[torch.dtype] = []  # one entry for each that is within `defaults`, on any thread


@contextmanager
def neutral() -> Iterator[None]:
    """Compute as torch does by default: `defaults`, and no autocast.

    It stands around what foveate computes by itself, never around what the model does.
    """
    with ExitStack() as stack:
        accelerator = torch.accelerator.current_accelerator()
        for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(defaults())
        yield


@contextmanager
def defaults() -> Iterator[None]:
    """Make tensors in float32 and on the CPU where a call names neither.

    The vision tower may run in it: models of `transformers` are written for these defaults.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if _users_dtype or torch.get_default_dtype() != torch.float32:
            stack.enter_context(_float32())
        yield


@contextmanager
def _float32() -> Iterator[None]:
    # The default dtype belongs to the process, not to a thread: the last one to leave gives it back.
    with _lock:
        _users_dtype.append(_users_dtype[0] if _users_dtype else torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        with _lock:
            before = _users_dtype.pop()
            if not _users_dtype:
                torch.set_default_dtype(before)
