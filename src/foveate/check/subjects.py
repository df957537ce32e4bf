"""What is checked: a model with prompts for it, from a built-in shape with random weights, a folder or the hub."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from PIL import ImageOps
from torch import Tensor

from foveate.bench.random_models import random_job, random_model
from foveate.core.errors import InputError, UnknownNameError, UnsupportedModelError, did_you_mean
from foveate.core.reducer import Method
from foveate.cost.shapes import SHAPES, Shape, read_shape
from foveate.engines.transformers.reduce import pad_id
from foveate.families import Family, family_of
from foveate.measure.job import Job, prepare
from foveate.measure.loading import load_model
from foveate.registry import load_reducer

TINY: Final = "tiny-"
"""In front of the name of a shape: the same architecture, small enough for any machine."""
BEFORE: Final = ("vispruner", "gaze", "divprune", "random")
"""Methods before the LLM, of which a model is checked with the first that runs on its family."""
KEEP: Final = 0.25
QUESTIONS: Final = ("What is in the picture?", "What is the largest thing in the picture, and what color does it have?")
WORDS: Final = (64, 80)
"""Text tokens of the two prompts of a model with random weights."""
SIDE: Final = 672
"""Width and height of the pictures of models that take any size, in pixels: 24 x 24 tokens of Qwen2.5-VL."""
_TINY_SIDE, _TINY_GRID, _WIDTH, _DEPTH = 112, 8, 64, 4


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and two prompts of different lengths with a picture each.

    Attributes
    ----------
    name
        As the user gave it.
    """

    name: str
    model: Any
    family: Family
    jobs: tuple[Job, Job]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    @property
    def pair(self) -> Job:
        """Both prompts in one batch, the shorter one padded on the left."""
        return together(self.jobs)

    def before(self) -> Method:
        """Return the method before the LLM that the model is checked with."""
        return next(r for r in (load_reducer(name, keep=KEEP) for name in BEFORE) if not self.family.lacks(r))

    def inside(self) -> Method:
        """Return the method inside the LLM that the model is checked with.

        Raises
        ------
        UnsupportedModelError
            If the LLM has a single layer, or some that do not attend.
        """
        depth = self.jobs[0].depth
        if depth < 2:
            raise UnsupportedModelError("nothing can be dropped between the layers of an LLM that has one")
        reducer = load_reducer("fastv", keep=KEEP, layer=min(2, depth - 1))
        if lacking := self.family.lacks(reducer):
            raise UnsupportedModelError(f"fastv needs {lacking}, which the family {self.family.name!r} does not give")
        return reducer


def load_subject(name: str, device: str, dtype: str, attn: str | None) -> Subject:
    """Load or make what is to be checked.

    Parameters
    ----------
    name
        ``"nano"``, a folder, a hub id, the name of a shape of `foveate.cost.shapes`, or such a name behind ``"tiny-"``.
    device
        ``"cpu"`` or a CUDA device.
    dtype
        As in `load_model`; of random weights ``"auto"`` is bfloat16 on a GPU and float32 elsewhere.

    Raises
    ------
    FoveateError
        If there is no such model, or it cannot run there.
    """
    if attn and "flash" in attn and torch.device(device).type == "cpu":
        raise InputError(f"{attn} runs on a GPU: use --attn sdpa")
    model, jobs = _made(name, device, dtype, attn)
    if attn and "flash" in attn and model.dtype == torch.float32:
        raise InputError(f"{attn} computes in bfloat16 or float16, and the model is in float32: use --dtype bfloat16")
    return Subject(name, model, family_of(model), jobs)


def _made(name: str, device: str, dtype: str, attn: str | None) -> tuple[Any, tuple[Job, Job]]:
    shape = SHAPES.get(name.removeprefix(TINY))
    if shape is None:
        try:
            model, processor = load_model(name, dtype, device, attn)
        except UnknownNameError as error:
            raise _unknown(name, error) from error
        picture = _picture()
        pictures = zip((picture, ImageOps.mirror(picture)), QUESTIONS, strict=True)
        one, other = (prepare(model, processor, image, question, max_new_tokens=8) for image, question in pictures)
        return model, (one, other)
    kind = ("bfloat16" if torch.device(device).type == "cuda" else "float32") if dtype == "auto" else dtype
    tiny = name.startswith(TINY)
    config, processor = read_shape(tiny_shape(shape) if tiny else shape)
    torch.manual_seed(0)
    model = random_model(config, tied=False, dtype=kind, attn=attn, device=device)
    side = _side(model, tiny)
    one, other = (random_job(model, words, 8, seed, processor, side) for seed, words in enumerate(WORDS))
    return model, (one, other)


def _picture() -> Any:
    from foveate.nano import sample

    return sample().image.resize((SIDE, SIDE))


def _unknown(name: str, error: UnknownNameError) -> UnknownNameError:
    shapes = f"or a shape with random weights: {', '.join(SHAPES)}, any of them behind {TINY!r}"
    return UnknownNameError(f"{error}; {shapes}{did_you_mean(name, SHAPES)}")


def _side(model: Any, tiny: bool) -> int:
    """Return the size of the pictures in pixels, where the processor cuts them 2 x 2 tiles beside the whole."""
    vision, family = model.config.vision_config, family_of(model)
    if family.picture_grid(model) is None:
        token = math.isqrt(family.patches_per_row(model)) * int(vision.patch_size)
        return _TINY_GRID * token if tiny else SIDE // token * token
    size = vision.image_size
    return 2 * int(size if isinstance(size, int) else size[0])


def tiny_shape(shape: Shape) -> Shape:
    """Return a shape with four narrow layers in the LLM and in the vision tower, and pictures of 112 x 112 pixels."""
    config, processor = copy.deepcopy(shape.config), copy.deepcopy(shape.processor)
    text, vision = config["text_config"], config["vision_config"]
    grouped = text["num_key_value_heads"] < text["num_attention_heads"]
    text |= {
        "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": _DEPTH, "num_attention_heads": 4,
        "num_key_value_heads": 2 if grouped else 4, "head_dim": _WIDTH // 4,
    }  # fmt: skip
    if "rope_parameters" in text:
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    square = isinstance(vision.get("image_size"), list)
    small = {
        "hidden_size": _WIDTH, "embed_dim": _WIDTH, "out_hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": _DEPTH, "depth": _DEPTH, "num_attention_heads": 4, "num_heads": 4,
        "image_size": [_TINY_SIDE, _TINY_SIDE] if square else _TINY_SIDE, "fullatt_block_indexes": [1, 3],
        "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    vision |= {key: value for key, value in small.items() if key in vision}
    tiles = [[rows * _TINY_SIDE, columns * _TINY_SIDE] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    further: dict[str, dict[str, Any]] = {
        "llava_next": {"image_grid_pinpoints": tiles},
        "llava_onevision": {"image_grid_pinpoints": tiles},
        "internvl": {"image_seq_length": 16},
        "gemma3": {"mm_tokens_per_image": 16},
    }
    config |= further.get(config["model_type"], {})
    if "size" in processor:
        processor["size"] = {"height": _TINY_SIDE, "width": _TINY_SIDE}
    return Shape(config, processor)


def together(jobs: Sequence[Job]) -> Job:
    """Put prompts of one model, whose pictures are alike in size, into one batch, padded on the left."""
    first, ids = jobs[0], [job.inputs["input_ids"] for job in jobs]
    width = max(row.shape[1] for row in ids)
    inputs: dict[str, Any] = {}
    for key in first.inputs:
        parts = [job.inputs[key] for job in jobs]
        if all(x.shape == row.shape for x, row in zip(parts, ids, strict=True)):
            fill = pad_id(first.model) if key == "input_ids" else 0
            parts = [_padded(x, width, fill) for x in parts]
        inputs[key] = torch.cat(parts)
    return replace(first, inputs=inputs, spans=first.family.spans(first.model, inputs))


def _padded(row: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(row, (width - row.shape[1], 0), value=fill)


def answers_for(job: Job, length: int) -> Tensor:
    """Return an answer for each prompt of a job, ``[B, length]``: words of the prompt itself.

    That it is the same for every run, whatever the model would say, lets the runs be compared token by token.
    """
    placeholders = torch.zeros_like(job.inputs["input_ids"], dtype=torch.bool)
    for span in job.spans:
        placeholders[span.sample, span.columns.to(placeholders.device)] = True
    special = {pad_id(job.model), *_ends(job.model)}
    rows = []
    for ids, hidden in zip(job.inputs["input_ids"], placeholders, strict=True):
        words = [word for word in ids[~hidden].tolist() if word not in special]
        rows.append((words * length)[-length:])
    return torch.tensor(rows, device=job.inputs["input_ids"].device)


def _ends(model: Any) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [int(ends)]
