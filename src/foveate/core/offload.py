"""Weights that accelerate has offloaded: at hand where code reads them without calling their module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def weights_at_hand(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Load the offloaded weights of some modules, not of their parts, for the body of the ``with`` statement.

    `accelerate` loads the weights of a module when it is called; in between they are on the device "meta".
    """
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "_hf_hook"):
                # Only accelerate sets such a hook, so it is installed.
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
        yield


def tables(module: nn.Module) -> list[nn.Module]:
    """Return the embeddings in a module, whose weights `transformers` reads to interpolate positions."""
    return [part for part in module.modules() if isinstance(part, nn.Embedding)]
