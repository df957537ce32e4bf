"""Drawing of objects, signs, backgrounds and clutter with Pillow alone; no font and no file is read."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from foveate.nano.vocabulary import SIGN

RGB = tuple[int, int, int]
Point = tuple[float, float]

SIDE: Final = 192
SUPERSAMPLING: Final = 4

OBJECT_RGB: Final[dict[str, RGB]] = {
    "red": (214, 40, 40),
    "orange": (243, 135, 20),
    "yellow": (244, 214, 40),
    "green": (36, 156, 62),
    "blue": (38, 92, 218),
    "purple": (128, 56, 178),
    "pink": (242, 120, 184),
    "brown": (122, 76, 40),
}
BACKGROUND_RGB: Final[dict[str, RGB]] = {
    "white": (240, 240, 240),
    "gray": (150, 150, 150),
    "black": (38, 38, 38),
    "brown": (194, 168, 138),
    "blue": (164, 194, 226),
    "green": (174, 212, 172),
    "pink": (242, 206, 218),
    "yellow": (240, 232, 176),
}
_ROWS, _COLUMNS = np.ogrid[0:SIDE, 0:SIDE]
_ROWS, _COLUMNS = _ROWS.astype(np.float32), _COLUMNS.astype(np.float32)
PATTERNS: Final = ("plain", "gradient", "stripes", "dots", "checks", "noise")


class Part(NamedTuple):
    """One filled outline or stroke of a drawing in the unit square (x right, y down).

    A part with a ``width`` is a stroke of that relative width; otherwise it is a filled polygon.
    """

    role: str
    points: tuple[Point, ...]
    width: float = 0.0


def _disc(x: float, y: float, rx: float, ry: float | None = None, start: float = 0, stop: float = 360) -> list[Point]:
    ry = rx if ry is None else ry
    steps = max(6, round(24 * (stop - start) / 360))
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _star() -> list[Point]:
    radii = (0.5, 0.2)
    angles = [math.radians(-90 + 36 * i) for i in range(10)]
    return [(0.5 + radii[i % 2] * math.cos(a), 0.52 + radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 30 for i in range(30)]
    wave = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(0.5 + 0.5 * math.sin(a) ** 3, 0.45 - w / 32) for a, w in zip(angles, wave, strict=True)]


def _body(points: list[Point]) -> Part:
    return Part("body", tuple(points))


def _dark(points: list[Point], width: float = 0.0) -> Part:
    return Part("dark", tuple(points), width)


def _light(points: list[Point], width: float = 0.0) -> Part:
    return Part("light", tuple(points), width)


def _hole(points: list[Point]) -> Part:
    return Part("hole", tuple(points))


PARTS: Final[dict[str, tuple[Part, ...]]] = {
    "circle": (_body(_disc(0.5, 0.5, 0.5)),),
    "square": (_body(_box(0.05, 0.05, 0.95, 0.95)),),
    "triangle": (_body([(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)]),),
    "star": (_body(_star()),),
    "heart": (_body(_heart()),),
    "diamond": (_body([(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)]),),
    "cross": (_body(_box(0.33, 0.02, 0.67, 0.98)), _body(_box(0.02, 0.33, 0.98, 0.67))),
    "ring": (_body(_disc(0.5, 0.5, 0.5)), _hole(_disc(0.5, 0.5, 0.27))),
    "house": (
        _body(_box(0.12, 0.42, 0.88, 1.0)),
        _dark([(0.5, 0.0), (1.0, 0.45), (0.0, 0.45)]),
        _light(_box(0.42, 0.65, 0.6, 1.0)),
    ),
    "tree": (
        _dark(_box(0.42, 0.7, 0.58, 1.0)),
        _body([(0.5, 0.0), (0.82, 0.42), (0.18, 0.42)]),
        _body([(0.5, 0.22), (0.95, 0.78), (0.05, 0.78)]),
    ),
    "fish": (
        _body(_disc(0.42, 0.5, 0.42, 0.28)),
        _body([(0.72, 0.5), (1.0, 0.2), (1.0, 0.8)]),
        _light(_disc(0.2, 0.43, 0.07)),
    ),
    "car": (
        _body([(0.22, 0.5), (0.35, 0.22), (0.7, 0.22), (0.82, 0.5)]),
        _body(_box(0.0, 0.46, 1.0, 0.74)),
        _light([(0.34, 0.46), (0.41, 0.3), (0.65, 0.3), (0.71, 0.46)]),
        _dark(_disc(0.25, 0.75, 0.14)),
        _dark(_disc(0.75, 0.75, 0.14)),
    ),
    "boat": (
        _body([(0.0, 0.66), (1.0, 0.66), (0.8, 0.98), (0.2, 0.98)]),
        _light([(0.5, 0.02), (0.9, 0.56), (0.5, 0.56)]),
        _dark([(0.42, 0.12), (0.42, 0.56), (0.12, 0.56)]),
    ),
    "cup": (
        _body([(0.05, 0.2), (0.72, 0.2), (0.64, 0.95), (0.14, 0.95)]),
        Part("body", tuple(_disc(0.7, 0.5, 0.22, 0.2, -90, 90)), 0.1),
        _light(_disc(0.385, 0.2, 0.33, 0.09)),
    ),
    "key": (
        _body(_disc(0.26, 0.5, 0.26)),
        _hole(_disc(0.24, 0.5, 0.11)),
        _body(_box(0.45, 0.42, 1.0, 0.58)),
        _body(_box(0.68, 0.5, 0.78, 0.8)),
        _body(_box(0.88, 0.5, 0.98, 0.86)),
    ),
    "umbrella": (
        _dark([(0.5, 0.4), (0.5, 0.9), (0.62, 0.95), (0.7, 0.82)], 0.08),
        _body(_disc(0.5, 0.52, 0.5, 0.5, 180, 360)),
        _light([(0.5, 0.05), (0.5, 0.5)], 0.05),
    ),
    "mushroom": (
        _light([(0.36, 0.5), (0.64, 0.5), (0.7, 1.0), (0.3, 1.0)]),
        _body(_disc(0.5, 0.55, 0.5, 0.52, 180, 360)),
        _light(_disc(0.35, 0.32, 0.09)),
        _light(_disc(0.65, 0.3, 0.08)),
    ),
    "bell": (
        _dark(_disc(0.5, 0.9, 0.12, 0.1)),
        _body([(0.5, 0.02), (0.72, 0.14), (0.78, 0.6), (0.96, 0.84), (0.04, 0.84), (0.22, 0.6), (0.28, 0.14)]),
    ),
    "flower": (
        *(
            _body(_disc(0.5 + 0.3 * math.cos(a), 0.5 + 0.3 * math.sin(a), 0.2))
            for a in np.linspace(0, 2 * np.pi, 6)[:5]
        ),
        _dark(_disc(0.5, 0.5, 0.17)),
    ),
    "rocket": (
        _dark([(0.3, 0.6), (0.08, 0.9), (0.3, 0.85)]),
        _dark([(0.7, 0.6), (0.92, 0.9), (0.7, 0.85)]),
        _body([(0.5, 0.0), (0.68, 0.25), (0.7, 0.85), (0.3, 0.85), (0.32, 0.25)]),
        _light(_disc(0.5, 0.4, 0.1)),
    ),
    SIGN: (_body(_box(0.0, 0.04, 1.0, 0.96)),),
}

DIGIT_STROKES: Final[tuple[tuple[Point, ...], ...]] = (
    tuple(_disc(0.5, 0.5, 0.3, 0.48)),
    ((0.28, 0.2), (0.55, 0.02), (0.55, 0.98)),
    (*_disc(0.5, 0.28, 0.3, 0.26, 190, 390), (0.2, 0.97), (0.84, 0.97)),
    (*_disc(0.45, 0.26, 0.32, 0.24, 200, 450), *_disc(0.45, 0.74, 0.34, 0.24, -90, 160)),
    ((0.7, 0.98), (0.7, 0.02), (0.14, 0.68), (0.9, 0.68)),
    ((0.8, 0.03), (0.26, 0.03), (0.22, 0.46), *_disc(0.48, 0.68, 0.32, 0.29, -100, 150)),
    ((0.72, 0.03), (0.38, 0.3), (0.2, 0.66), *_disc(0.5, 0.7, 0.3, 0.28, 190, 550)),
    ((0.16, 0.03), (0.84, 0.03), (0.42, 0.98)),
    (*_disc(0.5, 0.26, 0.26, 0.23, 90, 450), *_disc(0.5, 0.74, 0.31, 0.25, -90, 270)),
    ((0.28, 0.97), (0.62, 0.7), (0.8, 0.34), *_disc(0.5, 0.3, 0.3, 0.28, 10, 370)),
)


class Tile(NamedTuple):
    """A drawn object: the picture with transparency and its silhouette without holes, both ``size x size``."""

    picture: Image.Image
    silhouette: Image.Image


def _shade(rgb: RGB, factor: float) -> RGB:
    red, green, blue = (min(255, max(0, round(c * factor))) for c in rgb)
    return red, green, blue


def _place(points: tuple[Point, ...], angle: float, side: int) -> list[Point]:
    cos, sin = math.cos(angle), math.sin(angle)
    placed = []
    for x, y in points:
        dx, dy = x - 0.5, y - 0.5
        placed.append(((0.5 + cos * dx - sin * dy) * (side - 1), (0.5 + sin * dx + cos * dy) * (side - 1)))
    return placed


def draw_object(kind: str, rgb: RGB, size: int, angle: float = 0.0, digit: int | None = None) -> Tile:
    """Draw one object, smoothed by supersampling.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    rgb : tuple of int
        Colour of the body, 0 to 255.
    size : int
        Side of the square tile in pixels.
    angle : float
        Rotation in radians, clockwise; only what stays inside the tile is seen.
    digit : int, optional
        What is written on a sign.

    Returns
    -------
    Tile
        RGBA picture and L silhouette, ``size x size`` pixels each.
    """
    side = size * SUPERSAMPLING
    picture = Image.new("RGBA", (side, side), (*rgb, 0))
    silhouette = Image.new("L", (side, side), 0)
    pen, stencil = ImageDraw.Draw(picture), ImageDraw.Draw(silhouette)
    fills = {
        "body": (*rgb, 255),
        "dark": (*_shade(rgb, 0.5), 255),
        "light": (246, 246, 240, 255),
        "hole": (*rgb, 0),
    }
    for part in PARTS[kind]:
        points = _place(part.points, angle, side)
        if part.width:
            pen.line(points, fill=fills[part.role], width=round(part.width * side), joint="curve")
        else:
            pen.polygon(points, fill=fills[part.role])
            stencil.polygon(points, fill=255)
    if digit is not None:
        _draw_digit(pen, digit, angle, side, rgb)
    return Tile(picture.reduce(SUPERSAMPLING), silhouette.reduce(SUPERSAMPLING))


def _draw_digit(pen: ImageDraw.ImageDraw, digit: int, angle: float, side: int, rgb: RGB) -> None:
    ink = (250, 250, 250) if sum(rgb) < 400 else (20, 20, 20)
    strokes = tuple((0.5 + 0.62 * (x - 0.5), 0.5 + 0.72 * (y - 0.5)) for x, y in DIGIT_STROKES[digit])
    width = round(0.11 * side)
    points = _place(strokes, angle, side)
    pen.line(points, fill=(*ink, 255), width=width, joint="curve")
    for x, y in (points[0], points[-1]):
        pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=(*ink, 255))


def _wave(rng: np.random.Generator, pattern: str) -> np.ndarray:
    """Brightness of a pattern, float32 ``[192, 192]``, about -1 to 1."""
    y, x = _ROWS, _COLUMNS
    period, phase, turn = rng.uniform(12, 36), rng.uniform(0, 36), rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    if pattern == "plain":
        return np.zeros((SIDE, SIDE), np.float32)
    if pattern == "noise":
        coarse = rng.standard_normal((SIDE // 6, SIDE // 6), dtype=np.float32) * 0.6
        return coarse.repeat(6, 0).repeat(6, 1)
    along, across = cos * x + sin * y + np.float32(phase), cos * y - sin * x + np.float32(phase)
    if pattern == "gradient":
        return along / SIDE * 2 - 1
    along, across = (along / np.float32(period)) % 1 - 0.5, (across / np.float32(period)) % 1 - 0.5
    if pattern == "stripes":
        return np.sign(along)
    if pattern == "checks":
        return np.sign(along * across)
    return np.where(along**2 + across**2 < 0.04, 1.0, -0.2)


def draw_background(rng: np.random.Generator, color: str, pattern: str) -> Image.Image:
    """Draw a muted background with a faint pattern.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the pattern's phase, period and noise.
    color : str
        One of ``BACKGROUND_COLORS``.
    pattern : str
        One of ``PATTERNS``.

    Returns
    -------
    PIL.Image.Image
        RGB, 192 x 192 pixels.
    """
    light = _wave(rng, pattern) * rng.uniform(4, 11) + rng.integers(-4, 5, (SIDE, SIDE), dtype=np.int8)
    base = np.asarray(BACKGROUND_RGB[color], np.float32) + rng.uniform(-8, 8)
    return Image.fromarray(np.clip(base + light[..., None], 0, 255).astype(np.uint8))


def draw_clutter(rng: np.random.Generator, image: Image.Image, color: str, amount: int) -> None:
    """Scribble lines, arcs and blobs, which no question asks about, onto a background.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    image : PIL.Image.Image
        Changed in place.
    color : str
        The background's colour; clutter is mixed from it, so that it stays muted.
    amount : int
        Number of scribbles.
    """
    pen = ImageDraw.Draw(image)
    base = np.asarray(BACKGROUND_RGB[color], np.float64)
    for _ in range(amount):
        red, green, blue = (int(c) for c in 0.6 * base + 0.4 * rng.integers(0, 256, 3))
        ink = (red, green, blue)
        x, y, size = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(6, 34)
        style = rng.integers(4)
        points = rng.uniform(-size / 2, size / 2, (int(rng.integers(3, 7)), 2)) + np.array((x, y))
        corners = (x - size / 2, y - size / 3, x + size / 2, y + size / 3)
        if style == 0:
            pen.line([tuple(p) for p in points], fill=ink, width=int(rng.integers(1, 4)))
        elif style == 1:
            pen.arc(corners, float(rng.uniform(0, 180)), float(rng.uniform(180, 360)), fill=ink, width=2)
        elif style == 2:
            pen.polygon([tuple(p) for p in points], fill=ink)
        else:
            for dx, dy in points:
                pen.ellipse((dx - 2, dy - 2, dx + 2, dy + 2), fill=ink)
