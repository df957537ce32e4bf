"""The stock architecture, and an initialisation from which it learns quickly."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from foveate.nano.drawing import SIDE
from foveate.nano.labels import CONCEPTS, GRID, PATCH, TOKENS
from foveate.nano.vocabulary import (
    ALL_COLORS,
    BOS,
    DIGITS,
    EOS,
    IMAGE,
    KINDS,
    PAD,
    PLURALS,
    REGIONS,
    vocabulary,
)
from training.nano.recipe import Recipe

WORDS: Final = vocabulary()
WORD_IDS: Final = {word: number for number, word in enumerate(WORDS)}
# The words that a visual token may stand for: kinds (background first), colours, regions, digits, "object" at a centre.
ALIGNED: Final = ("background", *KINDS, *ALL_COLORS, *REGIONS, *DIGITS, "object")
DENSE: Final = len(ALIGNED)
REGION_SCALE, SINCOS_SCALE, CENTER_SCALE = 0.6, 0.6, 0.7
MATCH_GAIN, COPY_GAIN = 1.4, 0.4
Weights = dict[str, Tensor]


def configuration(recipe: Recipe) -> LlavaConfig:
    """Configuration of the stock ``LlavaForConditionalGeneration``."""
    vision = CLIPVisionConfig(
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.vision_heads,
        intermediate_size=recipe.vision_mlp,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=recipe.hidden_size,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        num_key_value_heads=recipe.text_heads,
        intermediate_size=recipe.text_mlp,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=WORD_IDS[PAD],
        bos_token_id=WORD_IDS[BOS],
        eos_token_id=WORD_IDS[EOS],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORD_IDS[IMAGE],
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def sincos(size: int, longest: float = 40.0) -> Tensor:
    """2-D sine and cosine code of the patch grid, float32 ``[256, size]``: half of it for rows, half for columns."""
    frequencies = longest ** -(torch.arange(size // 4) / (size // 4))
    angles = torch.arange(GRID)[:, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = code.repeat_interleave(GRID, 0), code.repeat(GRID, 1)
    return torch.cat([rows, columns], 1)


def visual_words(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Embeddings of the words and code of the places, so built that aligned words and places are orthogonal.

    Parameters
    ----------
    recipe : Recipe
        Seed and width.

    Returns
    -------
    words : torch.Tensor
        float32 ``[vocabulary, D]``, unit length.
    places : torch.Tensor
        float32 ``[256, D]``, unit length times ``SINCOS_SCALE``.
    """
    random = torch.Generator().manual_seed(1000 + recipe.seed)
    width = recipe.hidden_size
    basis = torch.linalg.qr(torch.randn(width, width, generator=random))[0]
    words = torch.nn.functional.normalize(torch.randn(len(WORDS), width, generator=random), dim=-1)
    words[[WORD_IDS[word] for word in ALIGNED]] = basis[:DENSE]
    for kind, plural in PLURALS.items():
        mixed = words[WORD_IDS[kind]] + 0.3 * words[WORD_IDS[plural]]
        words[WORD_IDS[plural]] = mixed / mixed.norm()
    words[WORD_IDS["objects"]] = words[WORD_IDS["object"]]
    spare = min(64, (width - DENSE) // 4 * 4)
    places = torch.nn.functional.normalize(sincos(spare), dim=-1) @ basis[DENSE : DENSE + spare]
    return words, SINCOS_SCALE * places


def initial_weights(recipe: Recipe) -> Weights:
    """Random initial weights by the names of the stock model, with the training-only heads under ``heads.``.

    The tower starts with a sine and cosine position code. Two thirds of its attention heads, and half of the decoder's,
    start by matching equal content (equal query and key projections); the decoder's values start as a copy.

    Parameters
    ----------
    recipe : Recipe
        Seed and sizes.

    Returns
    -------
    dict of torch.Tensor
        float32.
    """
    random = torch.Generator().manual_seed(recipe.seed)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(configuration(recipe))
    shapes = {name: value.shape for name, value in model.state_dict().items() if name != "lm_head.weight"}
    weights = {name: _draw(name, shape, random, recipe) for name, shape in shapes.items()}
    words, _ = visual_words(recipe)
    weights["model.language_model.embed_tokens.weight"] = words
    position = 0.5 * sincos(recipe.hidden_size, longest=100.0)
    weights["model.vision_tower.embeddings.position_embedding.weight"] = torch.cat([position.mean(0)[None], position])
    width = recipe.hidden_size
    for layer in range(recipe.vision_layers):
        prefix = f"model.vision_tower.encoder.layers.{layer}.self_attn."
        _match(weights, prefix, recipe.vision_heads, round(recipe.vision_heads * 2 / 3), 0.9, random)
    for layer in range(recipe.text_layers):
        prefix = f"model.language_model.layers.{layer}.self_attn."
        _match(weights, prefix, recipe.text_heads, recipe.text_heads // 2, MATCH_GAIN, random)
        copy = torch.linalg.qr(torch.randn(width, width, generator=random))[0]
        weights[prefix + "v_proj.weight"] = copy + 0.005 * torch.randn(width, width, generator=random)
        weights[prefix + "o_proj.weight"] = COPY_GAIN * copy.T + 0.005 * torch.randn(width, width, generator=random)
    for name, size in (("dense", DENSE), ("cls_before", CONCEPTS), ("cls_last", CONCEPTS)):
        weights[f"heads.{name}.weight"] = 0.02 * torch.randn(size, width, generator=random)
        weights[f"heads.{name}.bias"] = torch.zeros(size)
    return weights


def _draw(name: str, shape: torch.Size, random: torch.Generator, recipe: Recipe) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name or "layrnorm" in name:
        return torch.ones(shape)
    deviation = 0.7 / math.sqrt(shape[-1])
    if "embedding" in name:
        deviation = 0.02
    elif name.endswith(("out_proj.weight", "fc2.weight", "down_proj.weight")):
        deviation /= math.sqrt(2 * recipe.vision_layers)
    return deviation * torch.randn(shape, generator=random)


def _match(weights: Weights, prefix: str, heads: int, matching: int, gain: float, random: torch.Generator) -> None:
    query, key = weights[prefix + "q_proj.weight"], weights[prefix + "k_proj.weight"]
    width = query.shape[1]
    size = width // heads
    for head in range(matching):
        rows = gain * torch.linalg.qr(torch.randn(width, size, generator=random))[0].T
        for target in (query, key):
            target[head * size : (head + 1) * size] = rows + 0.01 * torch.randn(size, width, generator=random)
