"""Ovis 2: each token is a mixture of the words of a visual vocabulary; an overview and tiles between markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.core.spans import Crop, Span
from foveate.families.batches import one_row_per_token
from foveate.families.layout import Layout
from foveate.families.merged import MergedFamily, mean_of_blocks


@dataclass(frozen=True, eq=False)
class MarkedSpan(Span):
    """A span of a model that takes the embeddings of its image markers together with the image.

    Attributes
    ----------
    markers
        ``[M, D]``: embeddings of the indicator tokens, from the visual vocabulary.
    """

    markers: Tensor | None = None


class Ovis2(MergedFamily):
    """Ovis 2.

    The indicator tokens (``<IMG_START>``, ``<IMG_GRID>``, ``<IMG_COL>``, ``<IMG_ROW>``, ``<IMG_END>``) are ids of the
    text and stay; they also say which pictures are the overview and the tiles of one image.
    """

    name = "ovis2"
    model_types = ("ovis2",)
    inputs: ClassVar = {"pixel_values": "image"}
    notes = "overview and tiles are crops; indicator tokens are text and stay"

    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        side = _token_side(model)
        size, layouts, first = side * side, [], 0
        for rows, columns in self._tiles(model, inputs["input_ids"].cpu(), size):
            boxes = [(0.0, 0.0, 1.0, 1.0)]
            boxes += [
                (j / columns, i / rows, (j + 1) / columns, (i + 1) / rows) for i in range(rows) for j in range(columns)
            ]
            crops = tuple(
                Crop(torch.arange(i * size, (i + 1) * size), (side, side), box, encoder_row=first + i)
                for i, box in enumerate(boxes)
            )
            layouts.append(Layout(len(crops) * size, (len(crops), side, side), crops))
            first += len(crops)
        if first != len(inputs["pixel_values"]):
            raise InputError(
                f"the prompts hold placeholders for {first} overviews and tiles, but {len(inputs['pixel_values'])} "
                "pictures were passed: put one image token per image in the text and let the processor expand it"
            )
        return layouts

    def _tiles(self, model: Any, ids: Tensor, size: int) -> list[tuple[int, int]]:
        """Return the rows and columns of tiles of each image, zero of both if it is an overview alone."""
        start, _, column, row, _ = model.config.visual_indicator_token_ids
        tiles: list[tuple[int, int]] = []
        for prompt in ids:
            image = (prompt == start).cumsum(0)  # which image of the prompt each column belongs to
            groups = int(image[-1]) + 1

            def count(token: int, prompt: Tensor = prompt, image: Tensor = image, groups: int = groups) -> list[int]:
                return image[prompt == token].bincount(minlength=groups).tolist()  # type: ignore[no-any-return]

            tokens = zip(count(model.config.image_token_id), count(row), count(column), strict=True)
            for number, (placeholders, breaks, bars) in enumerate(tokens):
                pictures = placeholders // size
                if number == 0:  # without markers each picture is an image
                    tiles += [(0, 0)] * pictures
                elif pictures == 1:
                    tiles.append((0, 0))
                elif pictures:
                    rows = breaks + 1
                    tiles.append((rows, bars // rows + 1))
        return tiles

    def patches_per_row(self, model: Any) -> int:
        return int(model.config.vision_config.hidden_stride) ** 2

    def encoder(self, model: Any) -> nn.Module:
        return model.model.vision_tower  # type: ignore[no-any-return]

    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        side, stride = _patch_side(model), model.config.vision_config.hidden_stride
        return mean_of_blocks(values, (side, side), stride).flatten(0, 1)

    def spans(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
        vision = model.config.vision_config
        ids = torch.arange(vision.vocab_size - vision.num_visual_indicator_tokens, vision.vocab_size)
        markers = model.model.visual_embeddings_table(ids.to(inputs["input_ids"].device))
        return tuple(MarkedSpan(**vars(span), markers=markers) for span in super().spans(model, inputs))

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        # Imported where it is needed: it brings the whole model along.
        from transformers.models.ovis2.modeling_ovis2 import BaseModelOutputWithVisualIndicatorFeatures as Output

        (markers,) = {span.markers for span in spans if isinstance(span, MarkedSpan)}
        return {"image": Output(pooler_output=one_row_per_token(embeds), visual_indicator_features=markers)}


def _patch_side(model: Any) -> int:
    """Return how many patches a picture is high and wide."""
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size)


def _token_side(model: Any) -> int:
    """Return how many tokens a picture is high and wide."""
    return _patch_side(model) // int(model.config.vision_config.hidden_stride)
