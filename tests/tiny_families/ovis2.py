"""Ovis 2: an overview and tiles of 4 x 4 tokens of 2 x 2 patches."""

from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig

from tiny_families.base import IMAGE, VOCABULARY, Tiny, picture, text_shape

START, GRID, COLUMN, ROW, END = 111, 112, 113, 114, 115
SIDE = 4


class TinyOvis2(Tiny):
    name = "ovis2"
    visuals = ((1, 2), (2, 2), (1, 1))

    def build(self):
        vision = Ovis2VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32,
            patch_size=4, vocab_size=40, hidden_stride=2,
        )  # fmt: skip
        return Ovis2ForConditionalGeneration(
            Ovis2Config(
                vision_config=vision, text_config=Qwen2Config(**text_shape()), image_token_id=IMAGE,
                visual_indicator_token_ids=[START, GRID, COLUMN, ROW, END], vocab_size=VOCABULARY, hidden_size=32,
                tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        rows, columns = what
        one = [IMAGE] * SIDE**2
        ids, pictures = [START, *one, GRID], 1
        if rows * columns > 1:
            pictures += rows * columns
            for i in range(rows):
                for j in range(columns):
                    ids += one + [COLUMN] * (j < columns - 1)
                ids += [ROW] * (i < rows - 1)
        return {"ids": [*ids, END], "pixel_values": [picture(generator, pictures, 3, 32, 32)]}


TINY = TinyOvis2()
