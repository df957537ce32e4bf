"""Videos from folders of frames and from animated pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageSequence, UnidentifiedImageError

from foveate.core.errors import InputError
from foveate.core.grids import middle
from foveate.measure.loading import open_image, upright_rgb


def open_video(path: str | Path, frames: int) -> list[Image.Image]:
    """Read frames of a video as 8-bit RGB, spread evenly over it.

    Parameters
    ----------
    path
        A folder of pictures, which are taken in the order of their names (``2.png`` before ``10.png``), or an animated
        GIF, WebP or PNG file.
    frames
        How many frames to take: the middle of each of as many equal parts. All of a video that has no more.

    Raises
    ------
    InputError
        If there is no such video, it has no frame or frames of different sizes, or one cannot be read.
    """
    if frames < 1:
        raise InputError(f"a video has at least one frame: frames={frames} is too few")
    source = Path(path)
    if not source.exists():
        raise InputError(f"no video at {str(path)!r}: pass a folder of pictures, or an animated GIF, WebP or PNG file")
    pictures = _of_folder(source, frames) if source.is_dir() else _of_file(source, frames)
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise InputError(f"the frames in {str(path)!r} have different sizes, {shown}: make them alike")
    return pictures


def _of_folder(folder: Path, frames: int) -> list[Image.Image]:
    known = Image.registered_extensions()
    files = sorted((f for f in folder.iterdir() if f.suffix.lower() in known and f.is_file()), key=_by_number)
    if not files:
        raise InputError(f"the folder {str(folder)!r} holds no picture: the frames of a video are files such as 1.png")
    return [open_image(files[i]) for i in _spread(len(files), frames)]


def _by_number(file: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort numbers in names by their value."""
    parts: list[str] = []
    for letter in file.stem:
        if parts and parts[-1][-1].isdecimal() == letter.isdecimal():
            parts[-1] += letter
        else:
            parts.append(letter)
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts], file.name


def _of_file(file: Path, frames: int) -> list[Image.Image]:
    try:
        with Image.open(file) as animation:
            wanted = set(_spread(getattr(animation, "n_frames", 1), frames))
            return [upright_rgb(frame) for i, frame in enumerate(ImageSequence.Iterator(animation)) if i in wanted]
    except UnidentifiedImageError as error:
        raise InputError(
            f"{str(file)!r} is no animation that Pillow can read: save the frames of the video as pictures in a folder"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the video {str(file)!r}: {error}") from error


def _spread(size: int, count: int) -> list[int]:
    """Return `count` indices spread evenly over `size`, or all of them."""
    return [middle(i, count, size) for i in range(count)] if count < size else list(range(size))
