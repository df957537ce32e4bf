"""Verdicts: what a check found, in one word and one line, and how the checks share the minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import torch

from foveate.core.errors import ContractError, FoveateError
from foveate.measure.loading import first_line

Word: TypeAlias = Literal["right", "wrong", "slower than unpruned", "measured", "not run"]
WRONG: Final = "wrong"


@dataclass(frozen=True)
class Verdict:
    """What one check found.

    Attributes
    ----------
    check
        What was checked.
    word
        The verdict.
    said
        What was found, or why nothing was.
    figures
        The numbers behind it, as JSON-compatible data.
    """

    check: str
    word: Word
    said: str
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-compatible data."""
        return {"check": self.check, "verdict": self.word, "said": self.said, **self.figures}


class Minutes:
    """The time that checks share, from now on."""

    over = "the minutes are over"
    """Why nothing more is run."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic):
        self.minutes, self._now = minutes, now
        self._start = now()

    def half(self) -> Minutes:
        """Return half of the time that is left, for some of the checks, so that others get some, too."""
        part = Minutes(self.left / 120, self._now)
        part.over = f"half of the time that was left, {self.left / 2:.0f} s, is over"
        return part

    @property
    def spent(self) -> float:
        """Seconds that have passed."""
        return self._now() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left; none are below zero."""
        return max(0.0, 60 * self.minutes - self.spent)


def judged(check: str, look: Callable[[], Verdict], minutes: Minutes) -> Verdict:
    """Run a check if there is time, and make a verdict of whatever it raises.

    What foveate refuses, and what does not fit into memory, was not run; any other error is a fault.
    """
    if not minutes.left:
        return Verdict(check, "not run", minutes.over)
    try:
        return look()
    except ContractError as error:
        return Verdict(check, WRONG, one_line(error))
    except FoveateError as error:
        return Verdict(check, "not run", one_line(error))
    except torch.OutOfMemoryError:
        return Verdict(check, "not run", "out of memory")
    except Exception as error:  # of a method, a kernel or a driver: to find it is what the check is for
        return Verdict(check, WRONG, f"{type(error).__name__}: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """Return what an error says, without the lines behind the first."""
    return first_line(error)
