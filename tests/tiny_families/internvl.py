"""InternVL: tiles of 4 x 4 tokens in one run, the overview last."""

from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from tiny_families.base import IMAGE, Tiny, picture, text_shape

START, END, TOKENS = 111, 112, 16


class TinyInternVL(Tiny):
    name = "internvl"
    visuals = (1, 3, 5)
    whole_grid = (4, 4)

    def build(self):
        vision = InternVLVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32,
            patch_size=4, use_qk_norm=True, norm_type="rms_norm", layer_scale_init_value=1.0,
        )  # fmt: skip
        return InternVLForConditionalGeneration(
            InternVLConfig(
                vision_config=vision, text_config=Qwen2Config(**text_shape()), image_token_id=IMAGE,
                image_seq_length=TOKENS, tie_word_embeddings=False,
            )
        )  # fmt: skip

    def place(self, what, generator):
        ids = [START, *[IMAGE] * TOKENS * what, END]
        return {"ids": ids, "pixel_values": [picture(generator, what, 3, 32, 32)]}


TINY = TinyInternVL()
