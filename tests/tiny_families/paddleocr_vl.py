"""PaddleOCR-VL: pictures only, their patches in raster order."""

from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

from tiny_families.base import IMAGE, VIDEO
from tiny_families.mrope import END, MERGE, PATCH, START, TinyMRope, mrope_text


class TinyPaddleOcrVl(TinyMRope):
    name = "paddleocr_vl"
    visuals = (("image", 1, 6, 4), ("image", 1, 4, 6), ("image", 1, 3, 8))

    def build(self):
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 32, "patch_size": PATCH, "spatial_merge_size": MERGE,
        }  # fmt: skip
        return PaddleOCRVLForConditionalGeneration(
            PaddleOCRVLConfig(
                vision_config=vision, text_config=mrope_text(head_dim=8, tie_word_embeddings=False),
                image_token_id=IMAGE, video_token_id=VIDEO,
                vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        row = super().place(what, generator)
        pixels = [x[:, : 3 * PATCH**2].reshape(-1, 3, PATCH, PATCH) for x in row["pixel_values"]]
        return {**row, "pixel_values": pixels}


TINY = TinyPaddleOcrVl()
