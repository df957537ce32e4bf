"""Torch's ambient state: what a method decides does not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_users_dtype: list[torch.dtype] = []  # one entry for each that is within `neutral`, on any thread


@contextmanager
def neutral() -> Iterator[None]:
    """Compute as torch does by default: no autocast, float32 and the CPU where a call names neither.

    It stands around what foveate computes by itself, never around what the model does.
    """
    with ExitStack() as stack:
        for device in ("cpu", torch._C._get_accelerator().type):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_float32())
        yield


@contextmanager
def _float32() -> Iterator[None]:
    # The default dtype belongs to the process, not to a thread: the last one to leave gives it back.
    with _lock:
        current = torch.get_default_dtype()
        counted = bool(_users_dtype) or current != torch.float32
        if counted:
            _users_dtype.append(_users_dtype[0] if _users_dtype else current)
            torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        if counted:
            with _lock:
                before = _users_dtype.pop()
                if not _users_dtype:
                    torch.set_default_dtype(before)
