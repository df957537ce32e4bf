"""Exceptions: each says what was given, what is allowed and what to do instead."""

from __future__ import annotations


class FoveateError(Exception):
    """Base class of every error that foveate raises on purpose."""


class BudgetError(FoveateError, ValueError):
    """A budget that is no budget: zero, negative, a ratio above one, the wrong type."""


class UnknownNameError(FoveateError, LookupError):
    """A method, family or model name that nothing is registered under."""


class UnsupportedModelError(FoveateError, TypeError):
    """A model of no supported family, or a method that this family cannot run."""


class InputError(FoveateError, ValueError):
    """Model inputs that do not fit together, such as placeholders without an image."""


class ContractError(FoveateError, TypeError):
    """A method that declares or returns what no engine can apply, or other than what it promised."""


class AttachError(FoveateError, RuntimeError):
    """A model that cannot be attached to now, for instance because it already is."""
