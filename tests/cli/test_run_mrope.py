"""The command line on a model with positions along three axes, and with its own processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

import foveate as library

IMAGE = "<|IMAGE_PLACEHOLDER|>"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", IMAGE, "what", "is", "this", "?", "a", "red", "square", "blue", "circle"]


@pytest.fixture(scope="module")
def ocr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random PaddleOCR-VL with 2 x 2 patches of 4 pixels per token, and its processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ocr")
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "image_size": 32,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    config = PaddleOCRVLConfig(vision_config=vision, text_config=text, image_token_id=4)
    PaddleOCRVLForConditionalGeneration(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE},
    )  # fmt: skip
    images = PaddleOCRVLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4000})
    PaddleOCRVLProcessor(images, tokenizer).save_pretrained(path)
    return path


def test_run_on_the_models_own_processor(foveate: Any, ocr: Path, photo: Path) -> None:
    args = ("--model", ocr, "--keep", 12, "--repeats", 1, "--max-new-tokens", 4, "--compare", "--json")
    result = foveate("run", photo, "what is this ?", *args)
    assert result.code == 0, result.err
    data = result.json
    (span,) = data["tokens"]["spans"]
    _, h, w = span["grid"]
    assert span["before"] == h * w > 12 == span["after"]
    assert w > h  # as the picture
    assert all(flops > 0 for flops in data["flops"].values())
    assert all(row["flops"] > 0 for row in data["compare"])
    assert Image.open(data["overlay"]).size > (100, 100)

    text = foveate("run", photo, "what is this ?", *args[:-1])
    assert text.code == 0, text.err

    model = PaddleOCRVLForConditionalGeneration.from_pretrained(ocr)
    processor = AutoProcessor.from_pretrained(ocr)
    inputs = processor(images=Image.open(photo), text=f"{IMAGE}\nwhat is this ?", return_tensors="pt")
    ready = library.reduce(model, inputs, "vispruner", keep=12)
    assert ready["position_ids"].shape == (3, 1, inputs["input_ids"].shape[1] - h * w + 12)
    for key, prompt in (("answer_unpruned", inputs), ("answer", ready)):
        out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert processor.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip() == data[key]
