"""The stock model's forward pass on plain tensors: what training runs, several times faster than the modules.

Weights go by the stock names, so that export is a copy. A test holds the two against each other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.nano.labels import GRID, PATCH
from training.nano.architecture import Weights
from training.nano.recipe import Recipe

VISION = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
TEXT = "model.language_model."


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def _layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weights[name + ".weight"], weights[name + ".bias"], 1e-5)


def _heads(x: Tensor, heads: int) -> Tensor:
    split: Tensor = x.view(*x.shape[:-1], heads, -1).transpose(1, 2)
    return split


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention without the fused kernel, which is slower in bfloat16 on CPUs."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    mixed: Tensor = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return mixed


def patches(images: Tensor) -> Tensor:
    """Cut images into the rows that the patch embedding multiplies.

    Parameters
    ----------
    images : torch.Tensor
        uint8 ``[B, 192, 192, 3]``.

    Returns
    -------
    torch.Tensor
        float32 ``[B, 256, 432]``, scaled to -1 .. 1.
    """
    x = images.reshape(-1, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(len(images), GRID * GRID, -1).float() / 127.5 - 1


def tower(weights: Weights, recipe: Recipe, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the vision tower.

    Parameters
    ----------
    weights : dict of torch.Tensor
        By stock names.
    recipe : Recipe
        Sizes.
    images : torch.Tensor
        uint8 ``[B, 192, 192, 3]``.

    Returns
    -------
    features : torch.Tensor
        ``[B, 256, D]`` of the layer before the last, ``[CLS]`` removed.
    cls_before, cls_last : torch.Tensor
        ``[B, D]``: ``[CLS]`` after the layer before the last, and after the last.
    """
    embedding = weights[VISION + "embeddings.patch_embedding.weight"].flatten(1)
    x = F.linear(patches(images).to(embedding.dtype), embedding)
    start = weights[VISION + "embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([start, x], 1) + weights[VISION + "embeddings.position_embedding.weight"]
    x = _layer_norm(weights, VISION + "pre_layrnorm", x)
    for layer in range(recipe.vision_layers - 1):
        x = _vision_layer(weights, f"{VISION}encoder.layers.{layer}.", x, recipe.vision_heads, x.shape[1])
    last = _vision_layer(weights, f"{VISION}encoder.layers.{recipe.vision_layers - 1}.", x, recipe.vision_heads, 1)
    return x[:, 1:], x[:, 0], last[:, 0]


def _vision_layer(weights: Weights, name: str, x: Tensor, heads: int, rows: int) -> Tensor:
    """One layer, of which only the first ``rows`` outputs are computed."""
    y = _layer_norm(weights, name + "layer_norm1", x)
    query, key, value = (
        _heads(_linear(weights, f"{name}self_attn.{part}_proj", y[:, :rows] if part == "q" else y), heads)
        for part in "qkv"
    )
    x = x[:, :rows] + _linear(weights, name + "self_attn.out_proj", _attend(query, key, value, None))
    y = _layer_norm(weights, name + "layer_norm2", x)
    return x + _linear(weights, name + "mlp.fc2", F.gelu(_linear(weights, name + "mlp.fc1", y)))


def project(weights: Weights, features: Tensor) -> Tensor:
    """Run the stock projector, ``[B, 256, D]`` to ``[B, 256, D]``."""
    return _linear(weights, PROJECTOR + "linear_2", F.gelu(_linear(weights, PROJECTOR + "linear_1", features)))


def _rms_norm(weight: Tensor, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    return x * scale.to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


def rotation(recipe: Recipe, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions ``[B, S]``, each ``[B, 1, S, head size]``."""
    size = recipe.hidden_size // recipe.text_heads
    frequencies = torch.exp(-math.log(recipe.rope_theta) * torch.arange(0, size, 2) / size)
    angles = (positions[..., None].float() * frequencies).repeat(1, 1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def decode(weights: Weights, recipe: Recipe, x: Tensor, positions: Tensor, mask: Tensor, text: int) -> Tensor:
    """Run the decoder and keep the last ``text`` columns, which alone are computed in the last layer.

    Parameters
    ----------
    weights : dict of torch.Tensor
        By stock names.
    recipe : Recipe
        Sizes.
    x : torch.Tensor
        Input embeddings ``[B, S, D]``.
    positions : torch.Tensor
        int64 ``[B, S]``.
    mask : torch.Tensor
        ``[B, 1, S, S]``, added to the attention scores.
    text : int
        Number of columns wanted.

    Returns
    -------
    torch.Tensor
        ``[B, text, D]``, normalised: times the embeddings they give the logits.
    """
    cos, sin = rotation(recipe, positions, x.dtype)
    for layer in range(recipe.text_layers):
        name = f"{TEXT}layers.{layer}."
        first = x.shape[1] - text if layer == recipe.text_layers - 1 else 0
        y = _rms_norm(weights[name + "input_layernorm.weight"], x)
        query = _heads(_linear(weights, name + "self_attn.q_proj", y[:, first:]), recipe.text_heads)
        key, value = (_heads(_linear(weights, f"{name}self_attn.{part}_proj", y), recipe.text_heads) for part in "kv")
        query = _rotate(query, cos[:, :, first:], sin[:, :, first:])
        mixed = _attend(query, _rotate(key, cos, sin), value, mask[:, :, first:])
        x = x[:, first:] + _linear(weights, name + "self_attn.o_proj", mixed)
        y = _rms_norm(weights[name + "post_attention_layernorm.weight"], x)
        gate = F.silu(_linear(weights, name + "mlp.gate_proj", y))
        x = x + _linear(weights, name + "mlp.down_proj", gate * _linear(weights, name + "mlp.up_proj", y))
    return _rms_norm(weights[TEXT + "norm.weight"], x)
