from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from foveate.core.errors import InputError
from foveate.measure.video import open_video


def shade(i: int) -> Image.Image:
    return Image.new("RGB", (20, 10), (10 * i, 0, 200))


def shades(frames: list[Image.Image]) -> list[int]:
    return [round(frame.getpixel((5, 5))[0] / 10) for frame in frames]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve frames whose names sort by number, and a file that is no picture."""
    for i in range(12):
        shade(i).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    return tmp_path


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(1, [6]), (2, [3, 9]), (4, [1, 4, 7, 10]), (5, [1, 3, 6, 8, 10]), (12, range(12)), (50, range(12))],
)
def test_frames_are_spread_evenly(folder: Path, count: int, wanted: list[int]) -> None:
    assert shades(open_video(folder, count)) == list(wanted)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"clip.{kind}"
    lossless = {"lossless": True} if kind == "webp" else {}
    shade(0).save(file, save_all=True, append_images=[shade(i) for i in range(1, 6)], duration=100, **lossless)
    frames = open_video(file, 3)
    assert shades(frames) == [1, 3, 5]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (20, 10))}


def test_a_still_picture_is_a_video_of_one_frame(folder: Path) -> None:
    assert shades(open_video(folder / "frame7.png", 8)) == [7]


def test_what_is_no_video_is_refused(folder: Path) -> None:
    empty = folder / "empty"
    empty.mkdir()
    mixed = folder / "mixed"
    mixed.mkdir()
    shade(1).save(mixed / "1.png")
    shade(2).resize((9, 9)).save(mixed / "2.png")
    (folder / "cut.gif").write_bytes(b"GIF89a")
    (folder / "film.mp4").write_bytes(b"no picture")
    wrong = {
        "absent": "no video at", "empty": "holds no picture", "mixed": "different sizes, 9x9, 20x10",
        "film.mp4": "save the frames", "cut.gif": "save the frames",
    }  # fmt: skip
    for name, message in wrong.items():
        with pytest.raises(InputError, match=message):
            open_video(folder / name, 4)
    with pytest.raises(InputError, match="at least one frame"):
        open_video(folder, 0)
