"""Models of known shapes with random weights: as fast and as large as the real ones, without a download."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from foveate.core.errors import InputError, UnknownNameError
from foveate.cost.shapes import load_shape
from foveate.families import family_of
from foveate.measure.job import Job

_BEFORE = 35
"""Text tokens before the picture, as many as the system prompt of LLaVA-1.5 has."""


LLAVA_SHAPES = ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b")
"""Shapes of `foveate.cost.shapes` for which `random_job` makes inputs."""


def random_model(
    config: Any, layers: int | None = None, tied: bool = True, dtype: str = "bfloat16", attn: str | None = None
) -> Any:
    """Make a model with random weights from the configuration of a LLaVA-like one.

    Parameters
    ----------
    config
        A configuration, or the name of one of `LLAVA_SHAPES`.
    layers
        Layers of the LLM; by default all that the configuration has.
    tied
        Let all layers of the LLM share the weights of one. Each still has its own cache and reads the weights anew, so
        arithmetic and memory traffic are those of the whole model as long as one layer outgrows the processor's cache.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    attn
        Attention implementation; by default that of `transformers`.

    Returns
    -------
    PreTrainedModel
        In evaluation mode, on the GPU if there is one.
    """
    if isinstance(config, str):
        if config not in LLAVA_SHAPES:
            raise UnknownNameError.among("no shape is called", config, LLAVA_SHAPES)
        config, _ = load_shape(config)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"dtype is 'float32', 'bfloat16' or 'float16', not {dtype!r}")
    depth = config.text_config.num_hidden_layers if layers is None else layers
    if depth < 1:
        raise InputError(f"an LLM has at least one layer, not {depth}")
    config.text_config.num_hidden_layers = 1 if tied else depth
    model = AutoModelForImageTextToText.from_config(
        config, dtype=kind, **({"attn_implementation": attn} if attn else {})
    )
    if tied:
        _repeat_layer(model, depth)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _repeat_layer(model: Any, depth: int) -> None:
    stack = model.get_decoder().layers
    shared = {id(p): p for p in stack[0].parameters()}
    for number in range(1, depth):
        layer = copy.deepcopy(stack[0], dict(shared))
        layer.self_attn.layer_idx = number
        stack.append(layer)
    for config in (model.config.text_config, model.get_decoder().config):
        config.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[0]] * depth


def _no_processor(images: int) -> dict[str, Any]:
    raise InputError("noise takes the place of pictures where no processor cuts or scales them, as in LLaVA")


def random_job(model: Any, text_tokens: int = 64, max_new_tokens: int = 8, seed: int = 0) -> Job:
    """Make a prompt of random words around one picture of noise, at the size that fills the model's vision tower.

    For LLaVA-NeXT the picture has 2 x 2 tiles beside the whole.
    """
    if text_tokens < 2:
        raise InputError(f"a prompt has at least two text tokens, one on each side of the picture, not {text_tokens}")
    generator = torch.Generator().manual_seed(seed)
    family, side, token = family_of(model), 2 * model.config.vision_config.image_size, model.config.image_token_id
    (layout,), inputs = family.imagined_images(model, (side, side), 1, _no_processor)
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=generator).to(model.dtype)
    inputs, visual = {key: value.to(model.device) for key, value in inputs.items()}, layout.length
    before = min(_BEFORE, text_tokens - 1)
    words = torch.randint(3, min(token, model.config.text_config.vocab_size), (text_tokens,), generator=generator)
    ids = torch.cat([words[:before], torch.full((visual,), token), words[before:]])[None].to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
    return Job(model, None, family, inputs, family.spans(model, inputs), max_new_tokens)
