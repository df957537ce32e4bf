"""AdamW over one flat buffer of weights, averaged over processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.nano.architecture import Weights

BETAS = (0.9, 0.98)
CLIP = 1.0


class FlatAdamW:
    """Keeps ``weights`` (leaves by name, views of one buffer) up to date; the state is float32 whatever their type.

    Parameters
    ----------
    initial : dict of torch.Tensor
        float32 start values.
    weight_decay : float
        Applied to matrices other than embeddings.
    slow : tuple of str
        Weights whose name contains one of these learn at half the rate.
    dtype : torch.dtype
        Type of ``weights``, and so of the forward and backward passes.
    """

    def __init__(
        self, initial: Weights, weight_decay: float, slow: tuple[str, ...] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        self.names = list(initial)
        self.sizes = [initial[name].numel() for name in self.names]
        self.master = torch.cat([initial[name].flatten().float() for name in self.names])
        self.first = torch.zeros_like(self.master)
        self.second = torch.zeros_like(self.master)
        self.step_count = 0
        self._rate = torch.ones_like(self.master)
        self._decay = torch.zeros_like(self.master)
        self._used = self.master if dtype == torch.float32 else self.master.to(dtype)
        self._gradient = torch.zeros_like(self._used)
        self.weights: Weights = {}
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            end, shape = start + size, initial[name].shape
            leaf = self._used[start:end].view(shape).detach().requires_grad_()
            leaf.grad = self._gradient[start:end].view(shape)
            self.weights[name] = leaf
            if len(shape) >= 2 and "embed" not in name:
                self._decay[start:end] = weight_decay
            if any(part in name for part in slow):
                self._rate[start:end] = 0.5
            start = end

    def step(self, rate: float) -> None:
        """Average the gradients over all processes, clip, update, and clear them."""
        gradient = self._gradient.float()
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        gradient *= (CLIP / (gradient.norm() + 1e-6)).clamp(max=1.0)
        self.step_count += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        mean = self.first / (1 - BETAS[0] ** self.step_count)
        spread = (self.second / (1 - BETAS[1] ** self.step_count)).sqrt_().add_(1e-8)
        self.master -= rate * self._rate * (mean / spread + self._decay * self.master)
        self._gradient.zero_()
        self._publish()

    def _publish(self) -> None:
        if self._used is not self.master:
            self._used.copy_(self.master)

    def trained(self) -> Weights:
        """The float32 weights by name."""
        parts = torch.split(self.master, self.sizes)
        return {name: part.view(self.weights[name].shape) for name, part in zip(self.names, parts, strict=True)}

    def save(self, path: Path) -> None:
        """Write the state to a safetensors file, replacing it only when it is complete."""
        state: dict[str, Tensor] = {"master": self.master, "first": self.first, "second": self.second}
        save_file(state, path.with_suffix(".partial"), {"step": str(self.step_count)})
        path.with_suffix(".partial").replace(path)

    def restore(self, path: Path) -> None:
        """Read the state back; training then goes on exactly as if it had never stopped."""
        with safe_open(path, "pt") as stored:
            for name in ("master", "first", "second"):
                getattr(self, name).copy_(stored.get_tensor(name))
            self.step_count = int(stored.metadata()["step"])
        self._publish()
