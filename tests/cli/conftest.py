"""A tiny LLaVA with its processor, saved as a folder, and a way to call the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "what",
    "is",
    "this",
    "?",
    "USER",
    "ASSISTANT",
    ":",
    "a",
    "red",
    "square",
    "blue",
    "circle",
    "yes",
    "no",
    "where",
    "top",
]
CHAT = "USER: <image>\n{{ messages[0]['content'][1]['text'] }} ASSISTANT:"


def build(folder: Path, chat_template: str | None = None, seed: int = 0) -> None:
    """Save a random LLaVA of 8 x 8 visual tokens, and a word-level processor."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=7
    )
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=64)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("standin")
    build(path)
    return path


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("standin-chat")
    build(path, CHAT)
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = Image.new("RGB", (120, 80), "navy")
    ImageDraw.Draw(image).ellipse((40, 20, 80, 60), fill="gold")
    path = tmp_path_factory.mktemp("images") / "photo.png"
    image.save(path)
    return path


@pytest.fixture
def foveate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the command line in an empty folder."""
    from foveate.cli import app

    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> SimpleNamespace:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        data = json.loads(result.stdout) if "--json" in args and result.exit_code == 0 else None
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr, json=data)

    return call
