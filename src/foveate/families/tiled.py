"""Families that cut a picture into square tiles of equal length and merge neighbouring patches before the LLM."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from foveate.core.errors import InputError
from foveate.core.spans import Span
from foveate.families.batches import joined_outputs
from foveate.families.layout import Grid, Layout, crop_layout, located, tile_boxes
from foveate.families.merged import MergedFamily, mean_of_blocks


class TiledFamily(MergedFamily):
    """Every tile, and the overview if there are several, is a crop; text may stand between tiles of one picture.

    The inputs do not say which tiles make up a picture: the text between their placeholders does. Where it does not
    tell how the tiles are arranged either, their boxes are `None` until the picture's size is known (see `located`).
    """

    inputs: ClassVar[Mapping[str, str]] = {"pixel_values": "image"}
    overview: ClassVar[Literal["first", "last"]] = "last"
    """Where the overview stands among the crops of a picture of several tiles."""
    resizes = True
    notes = "tiles and overview are crops; pruned behind the projector, which merges patches"

    @abstractmethod
    def block(self, model: Any) -> int:
        """Return how many rows (and columns) of patches make up a token."""

    def patches_per_row(self, model: Any) -> int:
        return self.block(model) ** 2

    @abstractmethod
    def same_picture(self, gap: Sequence[int], end: int | None) -> bool:
        """Return whether two tiles belong to one picture.

        Parameters
        ----------
        gap
            The ids between their placeholders.
        end
            The id behind the last tile of the prompt, which ends a picture.
        """

    @abstractmethod
    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        """Encode pictures ``[R, 3, height, width]`` to what is merged and projected, ``[R, S, C]``."""

    def merge(self, model: Any, blocks: Tensor) -> Tensor:
        """Merge and project squares of patches ``[M, block ** 2, C]`` to tokens ``[M, 1, D]`` (or ``[M, D]``)."""
        return model.model.multi_modal_projector(blocks)  # type: ignore[no-any-return]

    def arrangement(self, gaps: Sequence[Sequence[int]], end: int | None) -> Grid | None:
        """Return the rows and columns of tiles of a picture from the ids between them, `None` if they do not tell."""
        return None

    def encoder(self, model: Any) -> nn.Module | None:
        return model.model.vision_tower  # type: ignore[no-any-return]

    def tile(self, model: Any, inputs: Mapping[str, Any]) -> Grid:
        """Return the rows and columns of tokens of a tile."""
        (height, width), (h, w) = inputs["pixel_values"].shape[-2:], self.patch_size(model)
        return height // h // self.block(model), width // w // self.block(model)

    def layouts(self, model: Any, inputs: Mapping[str, Any], kind: str) -> list[Layout]:
        grid = self.tile(model, inputs)
        layouts: list[Layout] = []
        row = 0
        for tiles, arranged in self._pictures(model, inputs["input_ids"], math.prod(grid)):
            layouts.append(crop_layout(grid, row, tile_boxes(tiles, self.overview, arranged)))
            row += tiles
        return layouts

    def _pictures(self, model: Any, ids: Tensor, size: int) -> list[tuple[int, Grid | None]]:
        """List the pictures of all prompts: how many tiles each has, and how they are arranged if that is known."""
        token, found = self.token_id(model, "image"), []
        for row in ids.tolist():
            places = [i for i, x in enumerate(row) if x == token]
            first, last = places[::size], places[size - 1 :: size]
            if len(first) != len(last) or any(b - a != size - 1 for a, b in zip(first, last, strict=True)):
                raise InputError(
                    f"a prompt holds {len(places)} image placeholder tokens in runs that are no multiple of the {size} "
                    "of a tile: put one image token per image in the text and let the model's processor expand it"
                )
            if not places:
                continue
            end = row[last[-1] + 1] if last[-1] + 1 < len(row) else None
            pictures: list[list[list[int]]] = [[]]  # for each picture the gaps between its tiles
            for a, b in zip(last[:-1], first[1:], strict=True):
                gap = row[a + 1 : b]
                if self.same_picture(gap, end):
                    pictures[-1].append(gap)
                else:
                    pictures.append([])
            found += [(len(gaps) + 1, self.arrangement(gaps, end) if gaps else (1, 1)) for gaps in pictures]
        return found

    def to_tokens(self, model: Any, inputs: Mapping[str, Any], kind: str, values: Tensor) -> Tensor:
        (height, width), block = self.tile(model, inputs), self.block(model)
        return mean_of_blocks(values, (height * block, width * block), block).flatten(0, 1)

    def encode_at(
        self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Span], grids: Sequence[Sequence[Grid]]
    ) -> list[list[Tensor]]:
        pixels = self.pictures(inputs)
        return [
            [self._smaller(model, pixels[c.encoder_row], grid) for c, grid in zip(span.crops, sizes, strict=True)]
            for span, sizes in zip(spans, grids, strict=True)
        ]

    def pictures(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the pixels of all tiles in the order of the prompts, ``[R, 3, height, width]``."""
        return inputs["pixel_values"]  # type: ignore[no-any-return]

    def _smaller(self, model: Any, picture: Tensor, grid: Grid) -> Tensor:
        (h, w), block = grid, self.block(model)
        size = [side * block * patch for side, patch in zip(grid, self.patch_size(model), strict=True)]
        small = nn.functional.interpolate(picture[None].float(), size=size, mode="bicubic", antialias=True)
        patches = self.patches(model, small.to(model.dtype))[0]
        # The models merge whole squares of patches alone; taken by itself, each token's block is one.
        blocks = patches.reshape(h, block, w, block, -1).transpose(1, 2).reshape(h * w, block * block, -1)
        return self.merge(model, blocks).reshape(h * w, -1)

    def encoder_outputs(self, spans: Sequence[Span], embeds: Sequence[Tensor]) -> dict[str, Any]:
        return joined_outputs(spans, embeds)

    def located(self, spans: Sequence[Span], size: tuple[int, int]) -> tuple[Span, ...]:
        return located(spans, size, self.overview)


def vision_layer(model: Any) -> int:
    """Return the index of the encoder layer that ``config.vision_feature_layer`` reads."""
    layer, depth = model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers
    layers = [layer] if isinstance(layer, int) else layer
    return max(i if i >= 0 else depth + 1 + i for i in layers) - 1
