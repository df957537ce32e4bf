"""The methods that there are, by name: those of this package, and those that other packages declare."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import inspect
import json
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, TypeVar

from foveate.core.budget import Budget
from foveate.core.checks import check_declarations
from foveate.core.errors import BudgetError, FoveateError, InputError, UnknownNameError
from foveate.core.reducer import ENTRY_POINTS, Method

BUILT_IN: Final = ("foveate.methods",)
"""Modules whose import registers methods. They are named, not imported, as they import this one."""

M = TypeVar("M", bound=type[Method])
_registry: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Register a reducer class under a name, as a class decorator.

    Raises
    ------
    FoveateError
        If the name is not lower case, is taken, or the class is no method and frozen dataclass.
    """

    def decorate(cls: M) -> M:
        if name != name.lower() or not name.replace("_", "").replace("+", "").isalnum():
            raise FoveateError(f"a method name has lower-case letters, digits and '_': {name!r} does not")
        if not issubclass(cls, Method) or inspect.isabstract(cls):
            raise FoveateError(f"{cls.__qualname__} is no method: derive it from foveate.Reducer and write its select")
        if name in _registry and _origin(_registry[name]) != _origin(cls):
            raise FoveateError(f"the method name {name!r} is taken by {'.'.join(_origin(_registry[name]))}")
        if "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
            raise FoveateError(f"put @dataclass(frozen=True) below @register({name!r}): a reducer is its configuration")
        check_declarations(cls)
        cls.name = name
        _registry[name] = cls
        return cls

    return decorate


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _all() -> dict[str, type[Method]]:
    for module in BUILT_IN:
        importlib.import_module(module)
    for point in _plugins():
        if (point.name, point.value) not in _seen_plugins:
            _seen_plugins.add((point.name, point.value))
            _add_plugin(point)
    return _registry


@cache  # reading the metadata of all installed packages is slow, and every look-up of a method comes here
def _plugins() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))


_seen_plugins: set[tuple[str, str]] = set()


def _add_plugin(point: EntryPoint) -> None:
    """Register a method of another package; one that cannot be used is left out with a warning that names it."""
    try:
        register(point.name)(point.load())
    except Exception as error:
        warnings.warn(f"the method {point.name!r} of {point.value!r} is left out: {error}", stacklevel=4)


def list_methods(pattern: str = "*") -> list[str]:
    """Return the names of all registered methods that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter(_all(), pattern))


def get_method(name: str) -> type[Method]:
    """Return the class registered under a name.

    Raises
    ------
    UnknownNameError
        If there is none; the message lists those there are.
    """
    methods = _all()
    if name not in methods:
        raise UnknownNameError.among("no method is called", name, sorted(methods))
    return methods[name]


def parameters_without_default(name: str) -> list[str]:
    """Return what a registered method must be given beside its budget."""
    fields = dataclasses.fields(get_method(name))
    return [f.name for f in fields if f.default is dataclasses.MISSING and f.name != "keep"]


def by_default(name: str) -> Method | type[Method]:
    """Return a registered method with its defaults at some budget, or its class if it takes more or another budget."""
    method = get_method(name)
    if parameters_without_default(name):
        return method
    try:
        return method(keep=0.5) if method.budgets else method()  # type: ignore[call-arg]
    except (FoveateError, ValueError):  # of another package
        return method


def reducer_from_dict(data: dict[str, Any]) -> Method:
    """Build a reducer from the data of `Method.to_dict`."""
    if not isinstance(data, dict) or "method" not in data:
        raise FoveateError('a reducer configuration is an object with the keys "method", "keep", ...')
    if not isinstance(data["method"], str):
        raise FoveateError(f'"method" is the name of a method, such as "vispruner", not {data["method"]!r}')
    cls = get_method(data["method"])
    arguments = {key: _rich(value) for key, value in data.items() if key != "method"}
    try:
        return cls.from_arguments(arguments)
    except FoveateError:  # some of which are TypeErrors
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OSError) as error:  # also of another package's method
        raise FoveateError(_signature_help(cls, arguments, error)) from error


def load_reducer(method: str | Path | Method, **config: Any) -> Method:
    """Return a reducer from a registered name and its parameters, or from a JSON file that `Method.save` wrote.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    FoveateError
        If the file cannot be read or describes no method, or the method does not take these parameters.

    Examples
    --------
    >>> load_reducer("vispruner", keep=64)
    VisPruner(keep=64, important_ratio=0.5, step=8, order='similarity')
    """
    if isinstance(method, Method):
        return reducer_from_dict({**method.to_dict(), **config}) if config else method
    if isinstance(method, Path) or str(method).endswith(".json"):
        return reducer_from_dict({**_read(Path(method)), **config})
    return reducer_from_dict({"method": method, **config})


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the method from {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} does not describe a method: {error}") from error
    if not isinstance(data, dict):
        raise InputError(
            f'{str(path)!r} does not describe a method: it holds no object with the keys "method", "keep", ...'
        )
    return data


def _signature_help(cls: type[Method], given: dict[str, Any], error: Exception) -> str:
    known = [f.name for f in dataclasses.fields(cls)]
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    missing, unknown = [n for n in required if n not in given], [n for n in given if n not in known]
    if not missing and not unknown:
        values = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{cls.name} cannot use {values or 'its defaults'}: {error}"
    faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"does not know {', '.join(unknown)}"] * bool(unknown)
    return f"{cls.name} {' and '.join(faults)}; its parameters are: {', '.join(known)}"


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        for key, make, others in (
            ("coverage", Budget.coverage, ("per", "least", "most")),
            ("budget", Budget, ("per",)),
        ):
            if key in value:
                further = {k: v for k, v in value.items() if k != key}
                if unknown := further.keys() - {*others}:
                    raise BudgetError(
                        f"a budget with {key!r} takes {', '.join(others)} beside it, not {', '.join(sorted(unknown))}"
                    )
                return make(value[key], **further)
        if "method" in value:
            return reducer_from_dict(value)
        return {k: _rich(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_rich(v) for v in value)
    return value
