"""Gates that tell from text states when all visual tokens may leave the LLM (DyVTE, arXiv 2411.19628)."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.core.errors import FoveateError

_KEY = re.compile(r"(?:.*\.)?visual_gates_router\.(\d+)\.(w[12])\.weight")


def feature(text: Tensor) -> Tensor:
    """Return what a gate reads: the mean of all text states but the last one, and the last one.

    Parameters
    ----------
    text
        ``[M, D]``: states of the text behind the image, M at least 1. A single one counts as its own mean.

    Returns
    -------
    Tensor
        ``[2 D]`` float32.
    """
    states = text.detach().float()
    last = states[-1]
    return torch.cat([states[:-1].mean(dim=0) if len(states) > 1 else last, last])


class Gate(nn.Module):
    """The gate of one layer: two linear maps without biases, with a GELU between them.

    Parameters
    ----------
    width
        Width D of the LLM.
    hidden
        Width between the maps.
    """

    def __init__(self, width: int, hidden: int = 2048):
        super().__init__()
        self.w1 = nn.Linear(2 * width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, 2, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[..., 2 D]`` to the logits ``[..., 2]`` of keeping and of leaving."""
        out: Tensor = self.w2(nn.functional.gelu(self.w1(features.to(self.w1.weight.dtype))))
        return out


class Gates(nn.Module):
    """One `Gate` per decoder layer, by the layer's index; the gate of layer i reads what leaves that layer.

    Parameters
    ----------
    layers
        Indices of the layers that get a gate.
    width, hidden
        See `Gate`.
    """

    def __init__(self, layers: range | list[int], width: int, hidden: int = 2048):
        super().__init__()
        self.visual_gates_router = nn.ModuleDict({str(i): Gate(width, hidden) for i in layers})

    def initialise(self, seed: int = 0) -> Gates:
        """Draw all weights anew, Xavier-uniform."""
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight, generator=generator)
        return self

    def of(self, layer: int) -> Gate | None:
        """Return the gate of a layer, or `None` if it has none."""
        return dict(self.visual_gates_router.items()).get(str(layer))  # type: ignore[return-value]

    @property
    def layers(self) -> list[int]:
        """The layers that have a gate."""
        return [int(name) for name in self.visual_gates_router]

    @property
    def width(self) -> int:
        """Width of the LLM that the gates are for."""
        return int(next(self.parameters()).shape[1]) // 2

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, with the names of weights that the authors' checkpoints have."""
        tensors = {f"model.{name}": x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, {"format": "pt"})
        except OSError as error:
            raise FoveateError(f"cannot write {os.fspath(path)!r}: {error.strerror}") from error

    @staticmethod
    def load(path: str | os.PathLike[str], first: int = 0, device: torch.device | str = "cpu") -> Gates:
        """Read gates from a safetensors file, or from the safetensors files of a folder; other weights do not matter.

        What was read before comes from memory unless a file has changed.

        Parameters
        ----------
        first
            Leave out the gates of the layers before this one.

        Raises
        ------
        FoveateError
            If there are none, or they do not fit together.
        """
        name = os.fspath(path)
        files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else [Path(name)]
        try:
            found = tuple((str(file), file.stat().st_mtime_ns) for file in files)
            return _load(found, first, str(device))
        except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
            raise FoveateError(
                f"no gates in {name!r} ({error}): they are safetensors weights visual_gates_router.0.w1.weight "
                "[hidden, 2 D], visual_gates_router.0.w2.weight [2, hidden] and so on, as foveate.train_gates(...)"
                ".save(path) writes them"
            ) from error


@lru_cache(maxsize=8)
def _load(files: tuple[tuple[str, int], ...], first: int, device: str) -> Gates:
    weights: dict[str, Tensor] = {}
    for name, _ in files:
        with safe_open(name, framework="pt", device=device) as file:
            for key in file.keys():  # noqa: SIM118  the file is no mapping
                if (match := _KEY.fullmatch(key)) and int(match[1]) >= first:
                    weights[f"visual_gates_router.{match[1]}.{match[2]}.weight"] = file.get_tensor(key)
    layers = sorted({int(key.split(".")[1]) for key in weights})
    if not layers:
        raise ValueError(f"no weights of that name from layer {first} on")
    hidden, double = weights[f"visual_gates_router.{layers[0]}.w1.weight"].shape
    with torch.device("meta"):
        gates = Gates(layers, double // 2, hidden)
    gates.load_state_dict(weights, assign=True)
    return gates.requires_grad_(False).eval()
