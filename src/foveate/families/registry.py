"""Families by name: those of foveate, and those of other packages by the entry-point group ``foveate.families``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from foveate.core.errors import FoveateError, UnsupportedModelError
from foveate.families.base import Family
from foveate.families.classes import refusal
from foveate.families.generic import Generic

ENTRY_POINTS = "foveate.families"
KINDS = ("image", "video")

F = TypeVar("F", bound=type[Family])

_registry: dict[str, Family] = {}
_GENERIC = Generic()


def register_family(cls: F) -> F:
    """Register a family by its name, as a class decorator.

    Raises
    ------
    FoveateError
        If the class is no `Family` or leaves out what one must say, its name is not lower case or taken, or a model
        type is another family's and no ``matches`` of its own tells the two apart.
    """
    _check_class(cls)
    _check_name(cls)
    _check_model_types(cls)
    _check_inputs(cls)
    _registry[cls.name] = cls()
    return cls


def _check_class(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Family)):
        raise FoveateError(f"a family is a class derived from foveate.families.Family, not {cls!r}")
    if inspect.isabstract(cls):
        raise FoveateError(
            f"the family {cls.__qualname__} lacks {', '.join(sorted(cls.__abstractmethods__))}: write them"
        )


def _check_name(cls: type[Family]) -> None:
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or name != name.lower() or not name.replace("_", "").isalnum():
        raise FoveateError(
            f"the name of a family has lower-case letters, digits and '_': {cls.__qualname__} is called {name!r}"
        )
    if name == Generic.name or (name in _registry and _origin(type(_registry[name])) != _origin(cls)):
        taken = ".".join(_origin(Generic if name == Generic.name else type(_registry[name])))
        raise FoveateError(f"the family name {name!r} of {cls.__qualname__} is taken by {taken}: choose another")


def _check_model_types(cls: type[Family]) -> None:
    types = getattr(cls, "model_types", None)
    if not isinstance(types, tuple) or not types or not all(isinstance(t, str) and t for t in types):
        raise FoveateError(
            f"model_types of the family {cls.name!r} is a tuple of values of config.model_type, at least one, such as "
            f"({cls.name!r},): not {types!r}"
        )
    if "matches" in vars(cls):
        return
    for other in _registry.values():
        if other.name != cls.name and (shared := [t for t in types if t in other.model_types]):
            raise FoveateError(
                f"the model type {shared[0]!r} of the family {cls.name!r} is taken by the family {other.name!r}: "
                "override matches to tell their configurations apart"
            )


def _check_inputs(cls: type[Family]) -> None:
    inputs = getattr(cls, "inputs", None)
    if not isinstance(inputs, Mapping) or not inputs or not set(inputs.values()) <= set(KINDS):
        raise FoveateError(
            f"inputs of the family {cls.name!r} says which model inputs hold pixels, and of what kind, such as "
            f"{{'pixel_values': 'image'}}, or 'video': not {inputs!r}"
        )


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def all_families() -> dict[str, Family]:
    """Return the families by name, those of other packages among them and the generic one last."""
    _add_plugins()
    return {**_registry, Generic.name: _GENERIC}


@cache  # reading the metadata of all installed packages is slow, and every call of `family_of` comes here
def _add_plugins() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        _add_plugin(point)


def _add_plugin(point: EntryPoint) -> None:
    """Register a family of another package; one that cannot be used is left out with a warning that names it."""
    try:
        cls = point.load()
        _check_class(cls)
        if (name := getattr(cls, "name", None)) != point.name:
            raise FoveateError(f"the class is called {name!r}: give the entry point the same name")
        register_family(cls)
    except Exception as error:  # whatever the other package raises
        warnings.warn(f"the family {point.name!r} of {point.value!r} is left out: {error}", stacklevel=4)


def list_families() -> list[str]:
    """Return the names of the supported model families."""
    return list(all_families())


def family_of(model: Any) -> Family:
    """Return the family of a model, by its configuration.

    A model of no family belongs to the generic one if its ``forward`` takes encoded images.

    Raises
    ------
    UnsupportedModelError
        If no family knows the model and it lacks what the generic family needs; the message says what.
    """
    config = getattr(model, "config", None)
    return family_of_class(type(model), config).of(model)


def family_of_class(model_class: type, config: Any) -> Family:
    """Return the family that models of a class with a configuration belong to, as far as that can tell.

    Raises
    ------
    UnsupportedModelError
        As in `family_of`.
    """
    # The latest first: a family that shares a model type with an older one says in `matches` which models are its own.
    for family in reversed(all_families().values()):
        if family.matches(config):
            if not hasattr(model_class, "generate"):
                raise UnsupportedModelError(
                    f"{model_class.__name__} has no language-model head: pass the whole model, such as one loaded with "
                    "AutoModelForImageTextToText"
                )
            return family
    if reason := refusal(model_class, config):
        model_type = getattr(config, "model_type", None)
        raise UnsupportedModelError(
            f"{model_class.__name__} (model type {model_type!r}) belongs to no supported family; there are: "
            f"{', '.join(all_families())}; the generic family needs a model that it can hand encoded images to, and "
            f"this one {reason}"
        )
    return _GENERIC
