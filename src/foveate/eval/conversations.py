"""Conversations with images and videos, as benchmarks state them, turned into the inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from transformers.video_utils import load_video

from foveate.core.errors import InputError
from foveate.measure.loading import IMAGE, open_image

Part: TypeAlias = Mapping[str, Any]
Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Conversation:
    """A prompt with the images and videos that its placeholders stand for, in order.

    Attributes
    ----------
    prompt
        The text for the processor, up to where the answer begins.
    images
        RGB pictures.
    videos
        Paths, or mappings with a path under ``"url"``, ``"path"`` or ``"video"``.
    """

    prompt: str
    images: tuple[Image.Image, ...]
    videos: tuple[Any, ...]

    @property
    def kinds(self) -> tuple[bool, bool]:
        """Whether there are images, and videos: prompts of one batch must agree in this."""
        return bool(self.images), bool(self.videos)


def conversation(processor: Any, messages: Sequence[Message]) -> Conversation:
    """Put messages into the processor's chat template.

    Parameters
    ----------
    messages
        Each with a ``"role"`` and a ``"content"``: a text, or parts of the types ``"text"`` (with a ``"text"``),
        ``"image"`` and ``"video"`` (with a ``"url"``: a path, or for images also a picture).

    Raises
    ------
    InputError
        If a message holds something else, or its text names another number of images than it has.
    """
    turns = [{"role": m["role"], "content": interleaved(_parts(m["content"]))} for m in messages]
    parts = [part for turn in turns for part in turn["content"]]
    images = tuple(_picture(part["url"]) for part in parts if part["type"] == "image")
    videos = tuple(part["url"] for part in parts if part["type"] == "video")
    return Conversation(_prompt(processor, turns), images, videos)


def _parts(content: Any) -> list[Part]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    for part in parts:
        if part["type"] not in ("text", "image", "video"):
            raise InputError(f"vision-language models take text, images and videos, not {part['type']!r}")
    return parts


def interleaved(content: Sequence[Part]) -> list[Part]:
    """Move the images of a message to where its text says ``<image>``, if it does.

    Raises
    ------
    InputError
        If the text names another number of images than there are.
    """
    images = [part for part in content if part["type"] == "image"]
    named = sum(part["text"].count(IMAGE) for part in content if part["type"] == "text")
    if not named:
        return list(content)
    if named != len(images):
        raise InputError(f"a message has {len(images)} images, but its text says {IMAGE} {named} times")
    remaining, out = iter(images), list[Part]()
    for part in content:
        if part["type"] == "text":
            for number, text in enumerate(part["text"].split(IMAGE)):
                out += [next(remaining)] if number else []
                out += [{"type": "text", "text": text}] if text else []
        elif part["type"] == "video":
            out.append(part)
    return out


def _picture(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, str | Path):
        return open_image(source)
    raise InputError(f"an image is a picture of Pillow or the path of its file, not {type(source).__name__}")


def _prompt(processor: Any, turns: Sequence[Message]) -> str:
    if getattr(processor, "chat_template", None):
        bare = [{**turn, "content": [_without_media(part) for part in turn["content"]]} for turn in turns]
        return str(processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=True))
    tokens = {kind: getattr(processor, f"{kind}_token", f"<{kind}>") for kind in ("image", "video")}
    parts = [part for turn in turns for part in turn["content"]]
    return "\n".join(part["text"] if part["type"] == "text" else tokens[part["type"]] for part in parts)


def _without_media(part: Part) -> Part:
    return part if part["type"] == "text" else {"type": part["type"]}


def pad_on_the_left(processor: Any) -> None:
    """Let the processor pad batches the way that generation needs."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def batch_inputs(processor: Any, batch: Sequence[Conversation], frames: int) -> Any:
    """Run the processor on conversations that have the same kinds of media.

    A prompt that brings its own beginning-of-text token, as many chat templates do, does not get a second one.

    Parameters
    ----------
    frames
        How many frames to take from each video, evenly.
    """
    bos = getattr(processor.tokenizer, "bos_token", None)
    special = not (bos and batch[0].prompt.startswith(bos))
    media: dict[str, Any] = {}
    if batch[0].images:
        media["images"] = [list(c.images) for c in batch]
    if batch[0].videos:
        clips = [read_video(video, frames) for c in batch for video in c.videos]
        media["videos"] = [clip for clip, _ in clips]
        media["video_metadata"] = [about for _, about in clips]
        media["do_sample_frames"] = False
    return processor(
        text=[c.prompt for c in batch], padding=True, return_tensors="pt", add_special_tokens=special, **media
    )


def read_video(source: Any, frames: int) -> tuple[np.ndarray, Any]:
    """Read evenly spaced frames ``[frames, height, width, 3]`` of a video file, and what is known about it.

    A video of fewer frames is read whole.
    """
    path = source
    if isinstance(source, Mapping):
        path = source.get("url") or source.get("path") or source.get("video")
        if any(key in source for key in ("video_start", "video_end")):
            raise InputError(f"clips out of a longer video are not supported: {dict(source)}")
    if not isinstance(path, str):
        raise InputError(f"a video is given by the path of its file, not by {type(path).__name__}")
    if not Path(path).is_file():
        raise InputError(f"no video file at {path!r}")

    def evenly(metadata: Any, **_: Any) -> np.ndarray:
        total = metadata.total_num_frames
        return np.linspace(0, total - 1, min(frames, total)).round().astype(int)

    try:
        clip, about = load_video(path, sample_indices_fn=evenly)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot read the video {path!r}: {error}") from error
    return np.asarray(clip), about
