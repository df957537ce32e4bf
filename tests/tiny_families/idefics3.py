"""Idefics3: rows and columns of tiles of 4 x 4 tokens with markers, the overview last; one picture has padding."""

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from tiny_families.base import IMAGE, Tiny, llama_config, picture

AROUND, TILE, OVERVIEW, BREAK, BREAKS, TOKENS = 111, 112, 113, 114, 115, 16
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip


class TinyIdefics3(Tiny):
    name = "idefics3"
    visuals = ((1, 2), "padded", (2, 1))
    whole_grid = (4, 4)

    def build(self):
        return Idefics3ForConditionalGeneration(
            Idefics3Config(vision_config=VISION, text_config=llama_config(), image_token_id=IMAGE, scale_factor=2)
        )

    def place(self, what, generator):
        rows, columns = (0, 0) if what == "padded" else what
        ids = []
        for row in range(rows):
            for _ in range(columns):
                ids += [AROUND, TILE, *[IMAGE] * TOKENS]
            ids.append(BREAK if row < rows - 1 else BREAKS)
        ids += [AROUND, OVERVIEW, *[IMAGE] * TOKENS, AROUND]
        tiles = rows * columns + 1
        mask = torch.ones(tiles, 32, 32, dtype=torch.long)
        if what == "padded":
            mask[:, 20:] = 0
        return {"ids": ids, "pixel_values": [picture(generator, tiles, 3, 32, 32)], "pixel_attention_mask": [mask]}

    def collate(self, inputs):
        rows = {key: [torch.cat(row) if row else None for row in given] for key, given in inputs.items()}
        most = max(len(x) for x in rows["pixel_values"] if x is not None)
        out = {}
        for key, given in rows.items():
            like = next(x for x in given if x is not None)
            out[key] = like.new_zeros(len(given), most, *like.shape[1:])
            for i, x in enumerate(given):
                if x is not None:
                    out[key][i, : len(x)] = x
        return out


TINY = TinyIdefics3()
