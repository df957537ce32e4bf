"""Loading: models by name, folder or hub id, images from files, and prompts for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from foveate.core.errors import FoveateError, InputError, UnknownNameError, UnsupportedModelError
from foveate.families import all_families, family_of, family_of_class

IMAGE, VIDEO, QUESTION = "<image>", "<video>", "{question}"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# transformers breaks these sentences over several lines.
_LACKING = re.compile(
    r"(\w+) requires (?:the )?(?:🤗 )?([\w .-]+?)(?: library)?(?: >= \S+)?[,.]?\s+(?:[Bb]ut|which|it was)\s"
)
_PIP = re.compile(r"pip\s+install\s+(?:-U\s+)?([^\s`]+)")
_EXTRAS = {"torchvision": "foveate[torchvision]"}  # it must fit torch, as the processors of pictures and videos need it
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# A PyTorch without CUDA asserts that it has it.
_LOADING_ERRORS = (
    OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AssertionError, SafetensorError,
)  # fmt: skip


def load_model(
    name: str, dtype: str = "auto", device_map: str | None = None, attn: str | None = None
) -> tuple[Any, Any]:
    """Load a model that a family supports, be it the generic one, and its processor.

    Parameters
    ----------
    name
        ``"nano"``, a folder, or a hub id, which is fetched unless it is in the cache.
    dtype
        ``"auto"`` (that of the checkpoint), ``"float32"``, ``"bfloat16"``, ``"float16"``.
    device_map
        As in `transformers`; by default the whole model goes to the GPU if there is one.
    attn
        Attention implementation, such as ``"sdpa"``; by default that of `transformers`.

    Returns
    -------
    tuple
        The model in evaluation mode, and the processor.

    Raises
    ------
    InputError
        If the type of numbers is none of these, or nothing can run on the device.
    UnknownNameError
        If there is no such model.
    UnsupportedModelError
        If it belongs to no supported family.
    FoveateError
        If it cannot be loaded, for instance because its weights are pickled.
    """
    kind = _torch_dtype(dtype)
    _check_device(device_map)
    if name == "nano":
        return _load_nano(kind, device_map, attn)
    _check_name(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise UnknownNameError(f"no usable model at {name!r}: {first_line(error)}") from error
    model_class = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    if model_class is None:
        raise UnsupportedModelError(
            f"{name!r} is a model of type {config.model_type!r}, which does not answer questions about images: "
            f"pass one of a supported family, {', '.join(all_families())}"
        )
    family_of_class(model_class, config)
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=kind, use_safetensors=True, output_loading_info=True, trust_remote_code=False,
            device_map=device_map or _default_device(), **({"attn_implementation": attn} if attn else {}),
        )  # fmt: skip
    except _LOADING_ERRORS as error:
        raise FoveateError(f"cannot load {name!r}: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise FoveateError(f"{name!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    family_of(model)
    return model.eval(), processor


def _torch_dtype(dtype: str) -> Any:
    if dtype not in _DTYPES:
        raise InputError(f"dtype is {', '.join(map(repr, _DTYPES[:-1]))} or {_DTYPES[-1]!r}, not {dtype!r}")
    return "auto" if dtype == "auto" else getattr(torch, dtype)


def _check_device(device_map: Any) -> None:
    try:
        kind = torch.device(device_map).type if isinstance(device_map, str) else None
    except RuntimeError:  # "auto" and the like, or nonsense, which loading tells apart
        return
    if kind == "meta":
        raise InputError("device_map='meta' loads no weights, and nothing can run there: pass 'auto', 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device_map={device_map!r}, but PyTorch finds no CUDA device: pass 'cpu', or leave it out")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_nano(dtype: Any, device_map: str | None, attn: str | None) -> tuple[Any, Any]:
    import foveate.nano as nano

    if not nano.WEIGHTS.is_dir():
        raise FoveateError(
            f"the weights of nano are missing from {str(nano.WEIGHTS)!r}: install foveate anew, or make them with "
            "`foveate nano train` and pass the folder as the model"
        )
    try:
        model, processor = nano.load()
        if attn:
            model.set_attn_implementation(attn)
        device = device_map if device_map not in (None, "auto") else _default_device()
        model = model.to(device) if dtype == "auto" else model.to(device, dtype)
    except _LOADING_ERRORS as error:
        raise FoveateError(f"cannot load 'nano' that way: {first_line(error)}") from error
    return model.eval(), processor


def _check_name(name: str) -> None:
    folder = Path(name)
    if not folder.exists():
        if _HUB_ID.fullmatch(name):
            return
        raise UnknownNameError(
            f"no model {name!r}: pass 'nano', a folder with config.json, or a hub id such as llava-hf/llava-1.5-7b-hf"
        )
    if not (folder / "config.json").is_file():
        raise UnknownNameError(f"no model in {name!r}: a model folder holds config.json and *.safetensors")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise FoveateError(
            f"{name!r} holds pickled weights only ({pickles[0]}), and unpickling can run any code: "
            "save the model again with save_pretrained, which writes safetensors"
        )
    raise FoveateError(f"{name!r} holds no weights: a model folder holds config.json and *.safetensors")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, or which package to install if one is lacking."""
    if lacking := _LACKING.search(str(error)):
        named, hint = lacking[2].strip(), _PIP.search(str(error))
        package = _EXTRAS.get(named.lower()) or (hint[1] if hint else named.lower())
        return f"{lacking[1]} needs {named}, which is not installed: pip install '{package}'"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, more than eight bits are scaled down, and the
    first frame of an animation is taken.

    Raises
    ------
    InputError
        If the file is missing or is no readable image.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no image file at {str(path)!r}")
    try:
        with Image.open(file) as image:
            image.load()
            return upright_rgb(image)
    except UnidentifiedImageError as error:
        raise InputError(f"{str(path)!r} is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {str(path)!r}: {first_line(error)}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a picture as 8-bit RGB, turned as its EXIF data says, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than eight bits by the range of the narrowest format that holds its values."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max())
    ranges = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((limit for limit in ranges if top <= limit), top)
    return Image.fromarray((values.clip(0, white) * (255.0 / white)).round().astype(np.uint8))


def prompt_for(processor: Any, question: str, template: str | None = None, images: int = 1, video: bool = False) -> str:
    """Put a question about images, a video or both into a prompt.

    Parameters
    ----------
    template
        Text with ``{question}`` and, for each picture, ``<image>``, for a video ``<video>``. By default the
        processor's chat template, or, without one, lines with the tokens of the images and the video, and the question.
    images
        Number of images.
    """
    counts = {IMAGE: images, VIDEO: int(video)}
    tokens = {IMAGE: getattr(processor, "image_token", IMAGE), VIDEO: getattr(processor, "video_token", VIDEO)}
    if not question.strip():
        raise InputError("the question is empty: ask something about the image")
    for placeholder, token in tokens.items():
        if placeholder in question or token in question:
            raise InputError(
                f"the question holds the placeholder {token!r}, which stands for the {placeholder[1:-1]}: leave it out"
            )
    if template is not None:
        for placeholder, wanted in counts.items():
            if (found := template.count(placeholder)) != wanted:
                needs = {0: "it needs none", 1: "it needs one"}.get(wanted, f"it needs {wanted}")
                raise InputError(f"the prompt template holds {found} {placeholder} placeholders: {needs}")
        if QUESTION not in template:
            raise InputError(f"the prompt template has no place for the question: write {QUESTION} into it")
        for placeholder, token in tokens.items():
            template = template.replace(placeholder, token)
        return template.replace(QUESTION, question)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * images + [{"type": "video"}] * video + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(chat, add_generation_prompt=True))
    return "\n".join([*(token for placeholder, token in tokens.items() for _ in range(counts[placeholder])), question])


def model_inputs(
    processor: Any, images: Image.Image | Sequence[Image.Image], prompt: str, video: Sequence[Image.Image] = ()
) -> Any:
    """Run the processor on one or more images, the frames of a video, and a prompt.

    A prompt that brings its own beginning-of-text token, as many chat templates do, does not get a second one.

    Raises
    ------
    InputError
        If the processor takes no videos, or not so many images.
    """
    bos = getattr(processor.tokenizer, "bos_token", None)
    visuals: dict[str, Any] = {}
    if isinstance(images, Image.Image):
        visuals["images"] = images
    elif images:
        visuals["images"] = list(images)
    if video:
        if getattr(processor, "video_processor", None) is None:
            raise InputError(f"{type(processor).__name__} takes no videos: pass the frames as images")
        visuals |= {"videos": [np.stack([np.asarray(frame) for frame in video])], "do_sample_frames": False}
    special = not (bos and prompt.startswith(bos))
    try:
        return processor(**visuals, text=prompt, return_tensors="pt", add_special_tokens=special)
    except _LOADING_ERRORS as error:
        raise InputError(f"{type(processor).__name__} does not take these pictures: {first_line(error)}") from error


def encoder_view(processor: Any, image: Image.Image, kind: str = "image") -> Image.Image:
    """Return the part of an image, or of a frame of a ``"video"``, that the vision encoder sees, in full resolution.

    CLIP's processor cuts the middle out of an image that is not square; LLaVA-NeXT's does not.
    """
    settings = processor.image_processor if kind == "image" else processor.video_processor
    size, crop = getattr(settings, "size", None) or {}, getattr(settings, "crop_size", None) or {}
    cuts = getattr(settings, "do_center_crop", False) and not getattr(settings, "image_grid_pinpoints", None)
    shortest = size.get("shortest_edge")
    if not (cuts and shortest and crop.get("height") and crop.get("width")):
        return image
    scale = min(image.size) / shortest
    width, height = (
        max(1.0, min(side, crop[key] * scale)) for key, side in zip(("width", "height"), image.size, strict=True)
    )
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))
