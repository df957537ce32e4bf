"""`foveate run` on tiny models with their real processors, saved as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Processor,
    LightOnOcrProcessor,
    Ovis2Processor,
    PaliGemmaProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

import tiny

MARKERS = {111: "[IMG_BREAK]", 112: "[IMG_END]", 113: "<boi>", 114: "<eoi>"}
OVIS = {111: "<IMG_START>", 112: "<IMG_GRID>", 113: "<IMG_COL>", 114: "<IMG_ROW>", 115: "<IMG_END>", 121: "<image>"}
NAMES = {
    "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "boi_token": "<boi>", "eoi_token": "<eoi>",
}  # fmt: skip


def tokenizer(image: str = "[IMG]", markers: dict[int, str] = MARKERS) -> Any:
    """Make a tokenizer of words whose ids are those of the tiny models."""
    words = dict(enumerate(["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "?"]))
    words = {i: f"w{i}" for i in range(tiny.TINIES["llava"].original.config.text_config.vocab_size)} | words
    words |= {**markers, tiny.IMAGE: image}
    made = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([image, *markers.values()])
    named = {name: word for name, word in NAMES.items() if word in markers.values()}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": image, **named},
    )  # fmt: skip


def pixtral(block: int) -> Any:
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 4 * block, "width": 4 * block})
    return PixtralProcessor(images, tokenizer(), patch_size=4, spatial_merge_size=block)


def light_on() -> Any:
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 4, "width": 4})
    return LightOnOcrProcessor(images, tokenizer(), patch_size=4, spatial_merge_size=2)


def gemma3() -> Any:
    images = Gemma3ImageProcessorPil(size={"height": 64, "width": 64})
    return Gemma3Processor(images, tokenizer(), image_seq_length=64)


def ovis2() -> Any:
    images = Ovis2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6)
    return Ovis2Processor(images, tokenizer("<IMG_ATOM>", OVIS), image_seq_length=16)


def paligemma() -> Any:
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 64
    return PaliGemmaProcessor(images, tokenizer("<image>"))


PROCESSORS = {
    "mistral3": lambda: pixtral(2),
    "pixtral": lambda: pixtral(1),
    "gemma3": gemma3,
    "ovis2": ovis2,
    "paligemma": paligemma,
    "generic": light_on,
}


no_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="PixtralProcessor needs torchvision")


@pytest.fixture(
    params=[pytest.param(n, marks=[no_torchvision] if n in ("mistral3", "pixtral") else []) for n in PROCESSORS]
)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    net = tiny.model(request.param)
    net.generation_config.suppress_tokens = None
    net.save_pretrained(tmp_path / "model")
    PROCESSORS[request.param]().save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


def test_run_and_compare(foveate: Any, model: tuple[str, Path], photo: Path) -> None:
    name, folder = model
    method = "random" if name == "generic" else "vispruner"
    options = ("--method", method, "--keep", 12, "--max-new-tokens", 3, "--repeats", 1, "--compare", "--json")
    result = foveate("run", photo, "what is this ?", "--model", folder, *options)
    assert result.code == 0, result.err
    assert result.json["tokens"]["after"] == 12
    assert all(flops > 0 for flops in result.json["flops"].values())
    # Without a grid, and beside itself, no baseline runs.
    compared = [row["method"].partition("(")[0].lower() for row in result.json.get("compare", [])]
    baselines = ["random", "uniform", "pool", "downsample"][: 3 if name == "ovis2" else 4]
    assert compared == ([] if name == "generic" else ["unpruned", method, *baselines])
    assert ("pool is left out" in result.err) == (name == "generic")
    drawn = result.json["overlay"]
    assert (drawn is None) == (name == "generic")
    assert name == "generic" or Path(drawn).is_file()
    table = foveate("run", photo, "what is this ?", "--model", folder, *options[:-1])
    assert table.code == 0
    assert ("none: it is not known" in table.out) == (name == "generic")


def test_models_that_are_refused_before_they_are_loaded(foveate: Any, photo: Path, tmp_path: Path) -> None:
    for model_type, message in (("bert", "does not answer questions about images"), ("pix2struct", "lacks")):
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        (folder / "model.safetensors").touch()
        result = foveate("run", photo, "what ?", "--model", folder)
        assert (result.code, result.out) == (2, "")
        assert message in result.err
        assert "llava_next" in result.err
