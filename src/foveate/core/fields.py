"""The parameters of methods: each is of the type that its annotation says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from foveate.core.errors import FoveateError

_KINDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    NoneType: "None",
}


@functools.cache
def _kinds(cls: type, budgets: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """Return what fields take whose annotations are made of plain types and literals."""
    try:
        hints = get_type_hints(cls)
    except NameError:  # a name that was imported for type checkers alone
        return {}
    found = {}
    for name in {f.name for f in dataclasses.fields(cls)} - {*budgets}:
        kinds = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
        if all(kind in _KINDS or get_origin(kind) is Literal for kind in kinds):
            found[name] = kinds
    return found


def check_fields(name: str, method: object, budgets: tuple[str, ...]) -> None:
    """Raise `FoveateError` for the first parameter of a dataclass that is of another type than its annotation says.

    Parameters
    ----------
    name
        What the method is called.
    budgets
        Fields that are checked elsewhere.
    """
    cls: Any = type(method)
    for field, kinds in _kinds(cls, budgets).items():
        value = getattr(method, field)
        if not any(_fits(value, kind) for kind in kinds):
            words = [w for k in kinds for w in ([_KINDS[k]] if k in _KINDS else map(repr, get_args(k)))]
            allowed = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
            raise FoveateError(f"{name}: {field} is {allowed}, not {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
