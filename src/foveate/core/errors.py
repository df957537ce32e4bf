"""Exceptions: each says what was given, what is allowed and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FoveateError(Exception):
    """Base class of every error that foveate raises on purpose."""


class BudgetError(FoveateError, ValueError):
    """A budget that is no budget: zero, negative, a ratio above one, the wrong type."""


class UnknownNameError(FoveateError, LookupError):
    """A method, family or model name that nothing is registered under."""

    @classmethod
    def among(cls, fault: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Return the error for a name that is none of the known ones; a `fault` is "no method is called"."""
        known = list(known)
        return cls(f"{fault} {name!r}; there are: {', '.join(known)}{did_you_mean(name, known)}")


class UnsupportedModelError(FoveateError, TypeError):
    """A model of no supported family, or a method that this family cannot run."""


class InputError(FoveateError, ValueError):
    """Model inputs that do not fit together, such as placeholders without an image."""


class ContractError(FoveateError, TypeError):
    """A method that declares or returns what no engine can apply, or other than what it promised."""


class AttachError(FoveateError, RuntimeError):
    """A model that cannot be attached to now, for instance because it already is."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the known name that a mistyped one resembles most, as the end of a message, or an empty text.

    Examples
    --------
    >>> did_you_mean("vispuner", ["divprune", "vispruner"])
    "; did you mean 'vispruner'?"
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
