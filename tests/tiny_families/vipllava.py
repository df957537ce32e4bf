"""VipLLaVA: one picture of 8 x 8 patches, features of three layers, the last of which is not the one named last."""

from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from tiny_families.base import IMAGE, Tiny, clip_config, llama_config, picture

LAYERS = [-2, -3, 1]


class TinyVipLlava(Tiny):
    name = "vipllava"
    packs_features = False
    visuals = ("image", "image", "image")

    def build(self):
        # Older versions of transformers call the option vision_feature_layers.
        option = "vision_feature_layer" if hasattr(VipLlavaConfig, "vision_feature_layer") else "vision_feature_layers"
        return VipLlavaForConditionalGeneration(
            VipLlavaConfig(
                vision_config=clip_config(num_hidden_layers=4), text_config=llama_config(), image_token_index=IMAGE,
                image_seq_length=64, **{option: LAYERS},
            )
        )  # fmt: skip

    def place(self, what, generator):
        return {"ids": [IMAGE] * 64, "pixel_values": [picture(generator, 1, 3, 32, 32)]}


TINY = TinyVipLlava()
