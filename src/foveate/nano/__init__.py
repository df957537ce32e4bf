"""nano: a small, genuinely trained vision-language model with scenes to test it on.

A stock LLaVA (CLIP tower with ``[CLS]``, MLP projector, Llama decoder) of 5 million parameters whose answers depend on
its 256 visual tokens, so that pruning shows in its accuracy. Everything is in the package; nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from PIL import Image

from foveate.nano.objects import SceneObject
from foveate.nano.questions import QUESTION_KINDS, Question
from foveate.nano.scenes import Scene, scene, scenes

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS: Final = Path(__file__).with_name("weights")
SAMPLE: Final = Path(__file__).with_name("sample.png")

__all__ = [
    "QUESTION_KINDS",
    "SAMPLE",
    "WEIGHTS",
    "Question",
    "Sample",
    "Scene",
    "SceneObject",
    "load",
    "sample",
    "scene",
    "scenes",
]


class Sample(NamedTuple):
    """An image with a question that nano answers rightly, also with ``VisPruner(keep=32)``."""

    image: Image.Image
    question: str
    answer: str


def sample() -> Sample:
    """Return the sample of the demo.

    Returns
    -------
    Sample
        A validation scene, 192 x 192 pixels, its question and the right answer.
    """
    about = json.loads(SAMPLE.with_suffix(".json").read_text())
    with Image.open(SAMPLE) as image:
        return Sample(image.convert("RGB"), about["question"], about["answer"])


def load(dtype: torch.dtype | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the shipped model and its processor.

    Parameters
    ----------
    dtype : torch.dtype, optional
        Default float32; the stored weights are float16.

    Returns
    -------
    model : LlavaForConditionalGeneration
        In evaluation mode, on the CPU.
    processor : LlavaProcessor
        Takes ``images`` and ``text`` such as ``"<image> what color is the star?"``.

    Examples
    --------
    >>> model, processor = load()
    >>> model.config.vision_feature_layer
    -2
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=dtype or torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(WEIGHTS)
