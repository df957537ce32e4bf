"""What the tests must know of a family to build a tiny model of it, and prompts without its processor."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, SiglipVisionConfig

Grid = tuple[int, int]
VOCABULARY, PAD, IMAGE, VIDEO = 128, 0, 120, 121
"""Ids above 110 are never text; those from 111 to 119 are free for a family's own markers."""


@dataclass(frozen=True)
class Visual:
    """A picture or video of a prompt: its family, and what that family needs to know to make one."""

    family: str
    what: Any


class Tiny(ABC):
    """A family's tiny model.

    A prompt is a row ``{"ids": [...], "types": [...], "<model input>": [tensor, ...]}``; the tensors of an input are
    concatenated along the first dimension.
    """

    name: str
    visuals: tuple[Any, Any, Any]
    """Three pictures or videos, of different sizes if the family has them."""
    type_plane: str | None = None
    """Name of the input that tells text (0), image (1) and video (2) tokens apart, if the model has one."""
    positions = ("original", "compact")
    whole_grid: Grid | None = (8, 8)
    """The grid of a crop from which nothing was cut; `None` if nothing ever is."""
    masks = True
    """Whether dropping a token equals masking it; otherwise the oracle for both kinds of positions drops it, too."""
    packs_features = True
    """Whether the plain model without its projector hands the tower's features to the LLM as they are; otherwise the
    oracle of methods that merge them takes the family's word for the features."""
    answer_type = 0
    """What the type plane says of answers."""
    skips: Mapping[str, str] = {}
    """Tests that do not apply to the family, and why."""

    @abstractmethod
    def build(self) -> Any:
        """Make the model; its weights are spread afterwards."""

    @abstractmethod
    def place(self, what: Any, generator: torch.Generator) -> dict[str, list[Any]]:
        """Make the ids, and the tensors with a first dimension of their own, of one picture or video."""

    def collate(self, inputs: dict[str, list[list[Tensor]]]) -> dict[str, Tensor]:
        """Join the tensors of all rows, given per input and row."""
        return {key: torch.cat([x for row in rows for x in row]) for key, rows in inputs.items()}

    def position_ids(self, net: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return the position ids of the plain model's full prompt."""
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def types(self, ids: Tensor) -> Tensor:
        """Return the type plane of some ids."""
        return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()

    def cache(self, net: Any) -> Any:
        """Return an empty cache for several turns."""
        return DynamicCache()

    def mask(self, net: Any, inputs: dict[str, Tensor], visible: Tensor) -> Any:
        """Return what the model takes as an attention mask that hides all but the visible columns ``[B, L]``."""
        return additive(self.allowed(inputs) & visible[:, None, :], net.dtype)

    def allowed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return which columns each column of a prompt may attend to, ``[B, L, L]`` bool, padding aside."""
        batch, length = inputs["input_ids"].shape
        return torch.ones(length, length, dtype=torch.bool).tril().expand(batch, -1, -1)

    def received(self, call: dict[str, Any]) -> Tensor:
        """Return what the language model gets of each token, ``[B, L, ...]``, from the keywords of its call."""
        return call["inputs_embeds"]

    def logits(self, net: Any, received: Tensor, position_ids: Tensor, **planes: Tensor) -> Tensor:
        """Run the language model on tokens as `received` returns them, with what else runs along the prompt."""
        return net(inputs_embeds=received, position_ids=position_ids, **planes).logits

    @functools.cached_property
    def original(self) -> Any:
        return self._ready(self.build())

    def _ready(self, built: Any) -> Any:
        built.generation_config.eos_token_id = None
        built.generation_config.pad_token_id = PAD
        built.generation_config.suppress_tokens = [PAD, *range(110, VOCABULARY)]
        return spread(built)

    @functools.cached_property
    def deep(self) -> Any:
        """The same with an LLM of four layers."""
        token = _layers.set(4)
        try:
            built = self.build()
        finally:
            _layers.reset(token)
        return self._ready(built)

    def model(self, attention: str, dtype: torch.dtype) -> Any:
        return self._fresh(self.original, attention, dtype)

    def deep_model(self, attention: str, dtype: torch.dtype) -> Any:
        return self._fresh(self.deep, attention, dtype)

    def _fresh(self, original: Any, attention: str, dtype: torch.dtype) -> Any:
        fresh = copy.deepcopy(original).to(dtype)
        fresh.set_attn_implementation(attention)
        return fresh


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn what each column may attend to ``[B, L, L]`` into a 4-D mask; every column sees itself."""
    allowed = allowed | torch.eye(allowed.shape[-1], dtype=torch.bool)
    mask = torch.zeros(len(allowed), 1, *allowed.shape[1:], dtype=dtype)
    return mask.masked_fill_(~allowed[:, None], torch.finfo(dtype).min)


def picture(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def clip_config(**changes: Any) -> CLIPVisionConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPVisionConfig(**{**shape, "image_size": 32, "patch_size": 4, "projection_dim": 32, **changes})


def siglip_config(**changes: Any) -> SiglipVisionConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return SiglipVisionConfig(**{**shape, "image_size": 32, "patch_size": 4, "vision_use_head": False, **changes})


_layers: ContextVar[int | None] = ContextVar("layers", default=None)


def text_shape(**changes: Any) -> dict[str, Any]:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    if _layers.get() is not None:
        changes["num_hidden_layers"] = _layers.get()
    return {**shape, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None, **changes}


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**text_shape(**changes))


def spread(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give weights a scale at which attention is not flat and logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "class_embedding" in name or "image_newline" in name or ("embed" in name and p.dim() == 2):
                p.copy_(noise)
            elif p.dim() > 1:
                p.copy_(noise * (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / p[0].numel() ** 0.5)
            else:
                p.add_(0.1 * noise)
    return module.eval()
