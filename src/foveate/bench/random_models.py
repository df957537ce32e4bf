"""Models of known shapes with random weights: as fast and as large as the real ones, without a download."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from foveate.core.errors import InputError, UnknownNameError
from foveate.cost.shapes import load_shape
from foveate.families import Family, family_of
from foveate.families.mrope import MRopeFamily
from foveate.measure.job import Job
from foveate.measure.loading import first_line

_BEFORE = 35
"""Text tokens before the picture, as many as the system prompt of LLaVA-1.5 has."""


LLAVA_SHAPES = ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b")
"""Shapes of `foveate.cost.shapes` that `random_model` knows by name."""


def random_model(
    config: Any,
    layers: int | None = None,
    tied: bool = True,
    dtype: str = "bfloat16",
    attn: str | None = None,
    device: str | None = None,
) -> Any:
    """Make a model with random weights from a configuration.

    Parameters
    ----------
    config
        A configuration, or the name of one of `LLAVA_SHAPES`.
    layers
        Layers of the LLM; by default all that the configuration has.
    tied
        Let all layers of the LLM share the weights of one. Each still has its own cache and reads the weights anew, so
        arithmetic and memory traffic are those of the whole model as long as one layer outgrows the processor's cache.
        For an LLM whose layers are all of one kind.
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    attn
        Attention implementation; by default that of `transformers`.
    device
        Where the weights are made; by default on the GPU if there is one.

    Returns
    -------
    PreTrainedModel
        In evaluation mode.

    Raises
    ------
    UnknownNameError, InputError
        If there is no such shape, type of numbers or attention implementation, or it is not installed.
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
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with place:
            model = AutoModelForImageTextToText.from_config(
                config, dtype=kind, **({"attn_implementation": attn} if attn else {})
            )
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot make this model: {first_line(error)}") from error
    if tied:
        _repeat_layer(model, depth)
    return model.eval().to(place)


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


def random_job(
    model: Any,
    text_tokens: int = 64,
    max_new_tokens: int = 8,
    seed: int = 0,
    processor: Any = None,
    side: int | None = None,
) -> Job:
    """Make a prompt of random words around one picture of noise.

    Parameters
    ----------
    processor
        The image processor of models that cut or scale pictures by their size.
    side
        Width and height of the picture in pixels. By default twice the size that the model's vision tower takes, which
        in LLaVA-NeXT makes 2 x 2 tiles beside the whole.
    """
    if text_tokens < 2:
        raise InputError(f"a prompt has at least two text tokens, one on each side of the picture, not {text_tokens}")
    generator = torch.Generator().manual_seed(seed)
    family, token = family_of(model), model.config.image_token_id
    side = 2 * model.config.vision_config.image_size if side is None else side
    (layout,), inputs = family.imagined_images(model, (side, side), 1, partial(_blank_pictures, processor, side))
    shape, known = inputs.pop("pixel_values").shape, inspect.signature(type(model).forward).parameters
    # Older versions of transformers call the images of Video-LLaVA pixel_values_images.
    key = next((k for k, kind in family.inputs.items() if kind == "image" and k in known), "pixel_values")
    inputs[key] = torch.randn(shape, generator=generator).to(model.dtype)
    read = {*family.inputs, *family.side_inputs}  # processors also tell what only they themselves need
    inputs, visual = {k: x.to(model.device) for k, x in inputs.items() if k in read}, layout.length
    before = min(_BEFORE, text_tokens - 1)
    words = torch.randint(3, min(token, model.config.text_config.vocab_size), (text_tokens,), generator=generator)
    ids = torch.cat([words[:before], torch.full((visual,), token), words[before:]])[None].to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_types(model, family, ids), **inputs}
    return Job(model, None, family, inputs, family.spans(model, inputs), max_new_tokens)


def _blank_pictures(processor: Any, side: int, images: int) -> dict[str, Any]:
    if processor is None:
        raise InputError("noise takes the place of pictures where no processor cuts or scales them, as in LLaVA")
    return dict(processor(images=[[Image.new("RGB", (side, side))]] * images, return_tensors="pt"))


def _types(model: Any, family: Family, ids: Tensor) -> dict[str, Tensor]:
    """Return the plane that tells images from text, as processors make it where the model reads one."""
    if isinstance(family, MRopeFamily):
        return {"mm_token_type_ids": family.types(model, ids)}
    return {"token_type_ids": (ids == model.config.image_token_id).long()} if family.two_way else {}
