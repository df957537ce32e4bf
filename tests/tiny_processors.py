"""Real processors of families of tiles, built offline around a tokenizer of a few words."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AyaVisionProcessor, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil


def tokenizer(special: list[str]) -> Any:
    """Make a tokenizer of words that keeps line breaks."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "?", "\n", "\n\n", *special]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    spaces, breaks = pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([spaces, breaks])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=special,
    )  # fmt: skip


def aya_processor() -> Any:
    special = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL", "<image>"]
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6)
    return AyaVisionProcessor(images, tokenizer(special), patch_size=4, img_size=32, downsample_factor=2)


def idefics3_processor() -> Any:
    places = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 5)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    images = Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    return Idefics3Processor(images, tokenizer(special), image_seq_len=16)


PROCESSORS = {"aya_vision": aya_processor, "idefics3": idefics3_processor}
IMAGE_TOKENS = {"aya_vision": "<|IMG_PATCH|>", "idefics3": "<image>"}
"""What the processors expand an image to."""
