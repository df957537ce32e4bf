"""What scenes show and questions are about."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.nano.drawing import SIDE
from foveate.nano.vocabulary import REGIONS


@dataclass(frozen=True)
class SceneObject:
    """One object that questions may ask about.

    Attributes
    ----------
    kind : str
        One of ``KINDS``.
    color : str
        One of ``COLORS``.
    box : tuple of int
        Left, top, right, bottom in pixels; right and bottom are exclusive.
    digit : int or None
        What is written on a sign.
    angle : float
        Rotation in radians.
    shade : float
        Brightness factor of the colour.
    """

    kind: str
    color: str
    box: tuple[int, int, int, int]
    digit: int | None = None
    angle: float = 0.0
    shade: float = 1.0

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box, x and y in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def region(self) -> str:
        """Word of the 3 x 3 cell that the centre lies in."""
        x, y = self.center
        return REGIONS[int(y * 3 / SIDE) * 3 + int(x * 3 / SIDE)]
