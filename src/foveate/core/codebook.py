"""Codebooks of redundant visual tokens (arXiv 2503.20540): the file; `foveate.fit.codebook` builds one."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.core.offload import weights_at_hand

_SMALLEST_NORMAL = 2.0**-14  # of float16


@dataclass(frozen=True, eq=False)
class Codebook:
    """Prototypes of redundant visual tokens, for one model.

    Attributes
    ----------
    prototypes
        ``[K, D]`` float32, in the space of the LLM.
    model
        Name of the model that they come from.
    projector
        `projector_hash` of that model.
    built
        How: the settings, and how many tokens passed each step.
    """

    prototypes: Tensor
    model: str
    projector: str
    built: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the codebook as a safetensors file with metadata."""
        metadata = {"model": self.model, "projector": self.projector, "built": json.dumps(self.built)}
        save_file({"prototypes": self.prototypes.float().cpu().contiguous()}, path, metadata)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Codebook:
        """Read a codebook; one that was read before comes from memory unless its file has changed.

        Raises
        ------
        FoveateError
            If there is no such file, or it is no codebook.
        """
        name = os.fspath(path)
        try:
            return _load(name, os.stat(name).st_mtime_ns)
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise FoveateError(
                f"no codebook in {name!r} ({error}): it is a safetensors file with `prototypes` [K, D] and the "
                "metadata `model`, `projector` and `built`, as `foveate codebook` writes it"
            ) from error

    @lru_cache(maxsize=8)  # noqa: B019  codebooks are few, and kept anyway
    def unit(self, device: torch.device) -> Tensor:
        """Return the prototypes at unit length on a device."""
        return nn.functional.normalize(self.prototypes, dim=-1).to(device)


@lru_cache(maxsize=8)
def _load(path: str, stamp: int) -> Codebook:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        prototypes = file.get_tensor("prototypes").float()
    if prototypes.dim() != 2 or not prototypes.numel():
        raise ValueError(f"prototypes of shape {tuple(prototypes.shape)}")
    return Codebook(prototypes, metadata["model"], metadata["projector"], json.loads(metadata["built"]))


_hashes: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()


def projector_hash(projector: nn.Module) -> str:
    """Return a SHA-256 of the weights, the same for a checkpoint in float16, bfloat16 and float32.

    Weights are rounded to bfloat16, and those that float16 holds with less precision than that count as zero. Worked
    out once, and again when a weight has changed.
    """
    with weights_at_hand(projector.modules()):
        weights = list(projector.state_dict(keep_vars=True).values())
        if quantised := {str(w.dtype) for w in weights if isinstance(w, Tensor) and not w.dtype.is_floating_point}:
            raise FoveateError(
                f"the projector has quantised weights ({', '.join(sorted(quantised))}), which do not tell whether a "
                "codebook was made for it: leave the projector out of the quantisation"
            )
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        known = _hashes.get(projector)
        if known is not None and known[0] == state:
            return known[1]
        digest = hashlib.sha256()
        for weight in weights:
            rounded = weight.detach().to(torch.bfloat16).float().cpu()
            rounded = torch.where(rounded.abs() < _SMALLEST_NORMAL, 0.0, rounded)
            digest.update(f"{tuple(rounded.shape)}".encode())
            digest.update(rounded.numpy().tobytes())
    _hashes[projector] = (state, digest.hexdigest())
    return digest.hexdigest()
