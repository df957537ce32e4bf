"""`foveate run` on several images, and on videos through the models' own processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from test_run_processors import tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaOnevisionProcessor, Qwen2_5_VLProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

import foveate as library
import tiny

FAST = ("--repeats", 1, "--max-new-tokens", 4)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    image = Image.new("RGB", (60, 90), "white")
    ImageDraw.Draw(image).rectangle((5, 50, 40, 80), fill="crimson")
    image.save(tmp_path / "second.png")
    return tmp_path / "second.png"


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Six frames of a ball that falls."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(6):
        image = Image.new("RGB", (64, 64), "navy")
        ImageDraw.Draw(image).ellipse((20, 8 * i, 36, 8 * i + 16), fill="gold")
        image.save(folder / f"{i}.png")
    return folder


def test_each_image_has_its_budget(foveate: Any, folder: Path, photo: Path, second: Path) -> None:
    args = (photo, second, "what is this ?", "--model", folder, "--keep", "16,4", "--compare", *FAST)
    data = foveate("run", *args, "--json").json
    spans = data["tokens"]["spans"]
    assert [(span["before"], span["after"]) for span in spans] == [(64, 16), (64, 4)]
    assert [len(kept) for kept in data["kept"]] == [16, 4]
    assert [row["tokens"] for row in data["compare"]] == [128] + [20] * 5
    assert Path(data["overlay"]).parent.name == "photo-vispruner"
    one = foveate("run", photo, "what is this ?", "--model", folder, "--keep", 16, "--json", *FAST).json
    assert Image.open(data["overlay"]).height > 1.5 * Image.open(one["overlay"]).height
    assert one["kept"] == data["kept"][:1]
    text = foveate("run", *args)
    assert text.code == 0, text.err
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    pictures = [Image.open(photo), Image.open(second)]
    inputs = processor(images=pictures, text="<image>\n<image>\nwhat is this ?", return_tensors="pt")
    for key, ready in (
        ("answer_unpruned", dict(inputs)),
        ("answer", library.reduce(model, inputs, "vispruner", keep=[16, 4])),
    ):
        out = model.generate(**ready, max_new_tokens=4, do_sample=False)
        assert processor.decode(out[0, ready["input_ids"].shape[1] :], skip_special_tokens=True).strip() == data[key]


def test_templates_place_each_image(foveate: Any, folder: Path, photo: Path, second: Path) -> None:
    template = "USER : a <image> {question} blue <image> ASSISTANT :"
    args = ("--model", folder, "--prompt-template", template, "--keep", 8, "--json", *FAST)
    data = foveate("run", photo, second, "what is this ?", *args).json
    assert [span["after"] for span in data["tokens"]["spans"]] == [8, 8]
    refused = foveate("run", photo, "what is this ?", *args)
    assert refused.code == 2
    assert "holds 2 <image> placeholders: it needs one" in refused.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["what ?"], "pass an image or --video"),
        (["PHOTO", "what ?", "--video", "absent"], "no video at 'absent'"),
        (["what ?", "--video", "PHOTO", "--frames", "0"], "at least one frame"),
        (["what ?", "--video", "PHOTO"], "the family 'llava' take no videos; those of these families do: video_llava"),
        (["PHOTO", "PHOTO", "PHOTO", "what ?", "--keep", "8,4"], "names 2 budgets, but a prompt holds more images"),
        (["PHOTO", "absent.png", "what ?"], "no image file at 'absent.png'"),
    ],
)
def test_bad_input_is_one_line(foveate: Any, folder: Path, photo: Path, args: list[str], message: str) -> None:
    result = foveate("run", *[photo if arg == "PHOTO" else arg for arg in args], "--model", folder, "--json", *FAST)
    assert (result.code, result.out) == (2, "")
    (line,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert message in line


def onevision() -> Any:
    from transformers import LlavaOnevisionVideoProcessor

    words = tokenizer("<image>", {tiny.VIDEO: "<video>"})
    config = tiny.TINIES["llava_onevision"].original.config
    side = config.vision_config.image_size
    images = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    videos = LlavaOnevisionVideoProcessor(size={"height": side, "width": side})
    tokens = (side // config.vision_config.patch_size) ** 2
    return LlavaOnevisionProcessor(
        images,
        words,
        videos,
        num_image_tokens=tokens,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
    )


def qwen() -> Any:
    from transformers import Qwen2VLVideoProcessor

    config = tiny.TINIES["qwen2_5_vl"].original.config
    vision = config.vision_config
    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
             "merge_size": vision.spatial_merge_size, "size": {"shortest_edge": 64, "longest_edge": 4096}}  # fmt: skip
    markers = {config.video_token_id: "<|video_pad|>", config.vision_start_token_id: "<|vision_start|>"}
    words = tokenizer("<|image_pad|>", markers)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(**sizes), words, Qwen2VLVideoProcessor(**sizes))


@pytest.mark.skipif(not is_torchvision_available(), reason="the processors of videos need torchvision")
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_videos_through_the_models_own_processor(
    foveate: Any, frames: Path, photo: Path, tmp_path: Path, name: str
) -> None:
    net = tiny.model(name)
    net.generation_config.suppress_tokens = None
    net.save_pretrained(tmp_path / "model")
    {"llava_onevision": onevision, "qwen2_5_vl": qwen}[name]().save_pretrained(tmp_path / "model")
    args = ("--model", tmp_path / "model", "--keep", 12, "--frames", 4, "--video", frames, *FAST, "--json")
    result = foveate("run", "what is this ?", *args)
    assert result.code == 0, result.err
    data = result.json
    (span,) = data["tokens"]["spans"]
    assert (span["kind"], span["after"]) == ("video", 12)
    assert span["grid"][0] == (2 if name == "qwen2_5_vl" else 4)
    assert Path(data["overlay"]).parent.name == "frames-vispruner"
    both = foveate("run", photo, "what is this ?", *args)
    assert both.code == 0, both.err
    assert [(span["kind"], span["after"]) for span in both.json["tokens"]["spans"]] == [("image", 12), ("video", 12)]
