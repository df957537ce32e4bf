"""What the commands share: errors, JSON, folders, models and methods by name, figures with units."""

from __future__ import annotations

import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from foveate.cli.names import check_methods
from foveate.core.errors import FoveateError, InputError
from foveate.measure.files import write_text

if TYPE_CHECKING:
    from foveate.core.reducer import Method

P = ParamSpec("P")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

Rectify = Annotated[float, typer.Option(help="Strength of a bias on attention to kept tokens, such as 0.5.")]
Absorb = Annotated[bool, typer.Option("--absorb", help="Average dropped tokens into kept ones; with --rectify 1.")]

ERRORS = Console(stderr=True)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn foveate's own errors into one line on standard error and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FoveateError as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


def refuse(context: typer.Context, names: Iterable[str], because: str) -> None:
    """Raise `InputError` if one of these options was given, also with the value that it has by default."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise InputError(f"{because}: leave out --{name.replace('_', '-')}")


def command_line(context: typer.Context) -> str:
    """Write the command with the options that were given."""
    words = ["foveate", *context.command_path.split()[1:]]
    for parameter in context.command.params:
        value, source = context.params[str(parameter.name)], context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            item = item.value if isinstance(item, Enum) else item
            if isinstance(item, bool):
                words.append(parameter.opts[0] if item else (parameter.secondary_opts or [""])[0])
            else:
                words += [parameter.opts[0], str(item)]
    return shlex.join(words)


def print_json(data: Any) -> None:
    """Print the one document that ``--json`` promises."""
    print(json.dumps(data, indent=2))


def make_folder(out: Path | None, name: str) -> Path:
    """Make the folder for results: the one asked for, or a fresh one called `name` under ``runs``."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        number = 1
        while True:
            folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise InputError(f"cannot make the folder {str(out or 'runs')!r}: {error.strerror}") from error


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, and its folder if need be."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def tell(data: Any, out: Path | None, as_json: bool, show: Callable[[Any], None]) -> None:
    """Write a command's result to a file, if one was asked for, and print it: as JSON, or as `show` does."""
    if out is not None:
        write_json(out, data)
    if as_json:
        print_json(data)
    else:
        show(data)


def reducer_from(method: str, keep: str | None, settings: list[str]) -> Method:
    """Build a method from a name or a JSON file, a budget and ``name=value`` settings."""
    check_methods([method])
    from foveate.core.budget import parse_keep
    from foveate.registry import get_method, load_reducer

    config: dict[str, Any] = dict(map(_setting, settings))
    if "method" in config:
        raise InputError("--set gives parameters of the method: give its name with --method")
    if keep is not None:
        config["keep"] = parse_keep(keep)
    elif not method.endswith(".json") and not _has_budget(get_method(method), config):
        config["keep"] = 0.25
    return load_reducer(method, **config)


def _has_budget(cls: type[Method], config: dict[str, Any]) -> bool:
    """Return whether a method does without a default of the command line: it takes no budget, or knows its own."""
    if not cls.budgets or config.keys() & {*cls.budgets}:
        return True
    try:
        cls(**config)
    except (FoveateError, TypeError):
        return False
    return True


def _setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; a value that is no JSON is a word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise InputError(f"--set takes name=value, such as important_ratio=0.3, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def load(model: str, dtype: str, device_map: str | None, attn: str | None) -> tuple[Any, Any]:
    """Load a model and its processor, saying on standard error what came of it."""
    from foveate.measure.loading import load_model

    started = time.perf_counter()
    ERRORS.print(f"loading {escape(model)}", highlight=False)
    loaded, processor = load_model(model, dtype, device_map, attn)
    size, kind = loaded.num_parameters() / 1e6, str(loaded.dtype).removeprefix("torch.")
    ERRORS.print(
        f"{type(loaded).__name__}, {size:,.1f} M parameters, {kind} on {loaded.device}, attention "
        f"{loaded.config._attn_implementation}, loaded in {time.perf_counter() - started:.1f} s", highlight=False,
    )  # fmt: skip
    return loaded, processor


def fill_page(page: Path, write: Callable[[], None], fault: str, as_json: bool) -> None:
    """Run what puts results into a page, and say where they are; `fault` names unusable results."""
    try:
        write()
    except OSError as error:
        raise InputError(f"cannot use {error.filename!r}: {error.strerror}") from error
    except FoveateError:
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{fault}: {error}") from error
    if as_json:
        print_json({"page": str(page)})
    else:
        print(f"the results are in {page}")
