"""A question about images or a video, ready for a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from foveate.core.errors import UnsupportedModelError
from foveate.core.grids import middle
from foveate.core.spans import Span
from foveate.families import Family, all_families, family_of
from foveate.measure.loading import encoder_view, model_inputs, prompt_for

Say = Callable[[str], None]
"""Gets a line about what is going on."""


@dataclass(frozen=True, eq=False)
class Job:
    """A question about images or a video, ready for a model.

    Attributes
    ----------
    inputs
        What the processor returned, on the model's device and in its dtype.
    spans
        The visual tokens of the prompt.
    max_new_tokens
        Limit on the answer.
    """

    model: Any
    processor: Any
    family: Family
    inputs: dict[str, Any]
    spans: tuple[Span, ...]
    max_new_tokens: int

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens of the unpruned prompt, or of all prompts of a batch."""
        return sum(map(len, self.spans))

    def views(self, images: Sequence[Image.Image], video: Sequence[Image.Image]) -> list[list[Image.Image]]:
        """Return what the vision encoder sees of each span, of a video one picture per crop, such as for an overlay.

        Several frames that make one crop are shown by the one in their middle.
        """
        left, shown = iter(images), []
        for span in self.spans:
            crops = len(span.crops)
            pictures = (
                [next(left)] if span.kind == "image" else [video[middle(i, crops, len(video))] for i in range(crops)]
            )
            shown.append([encoder_view(self.processor, picture, span.kind) for picture in pictures])
        return shown

    @property
    def depth(self) -> int:
        """Number of layers of the LLM."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def text_tokens(self) -> int:
        """Number of the other tokens, padding among them."""
        return int(self.inputs["input_ids"].numel()) - self.visual_tokens

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.inputs["input_ids"])


def prepare(
    model: Any,
    processor: Any,
    images: Image.Image | Sequence[Image.Image],
    question: str,
    template: str | None = None,
    max_new_tokens: int = 32,
    video: Sequence[Image.Image] = (),
) -> Job:
    """Build the prompt and the model inputs for a question about one or more images, the frames of a video, or both.

    Raises
    ------
    InputError
        If the model's processor takes no videos, or not so many images.
    UnsupportedModelError
        If the model's family takes no videos.
    """
    family = family_of(model)
    if video and "video" not in family.kinds:
        able = [f.name for f in all_families().values() if "video" in f.kinds]
        raise UnsupportedModelError(
            f"models of the family {family.name!r} take no videos; those of these families do: {', '.join(able)}"
        )
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    prompt = prompt_for(processor, question, template, len(pictures), bool(video))
    inputs = dict(model_inputs(processor, images, prompt, video).to(model.device, model.dtype))
    sizes = {"image": iter(pictures), "video": iter([video[0]] if video else [])}
    spans: list[Span] = []
    for span in family.spans(model, inputs):
        shown = next(sizes[span.kind])
        spans += family.located([span], (shown.height, shown.width))
    return Job(model, processor, family, inputs, tuple(spans), max_new_tokens)
