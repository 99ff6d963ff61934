"""Command line and config files -> settings.

A command's settings are one flat dataclass, whose fields are its options: defaults < config files < --key=value.
A config file is plain Python that assigns some of the same names:

    python train.py configs/train_shakespeare_char.py --batch_size=32 --compile=False
"""

import ast
import difflib
import inspect
import io
import numbers
import os
import runpy
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kqv import ROOT
from kqv.errors import UserError, one_line_errors

Settings = TypeVar("Settings")
TYPE_NAMES = {bool: "True | False", int: "int", float: "float", str: "text", type(None): "None"}

# -- one value ---------------------------------------------------------------------------------------------------------


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def convert(key: str, value: Any, kind: Any) -> Any:
    """`value` (text of a flag, or any object of a config file) as type `kind`. Raises UserError if it is none."""
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # a config file's np.int64(8)
        value = value.item()
    text = isinstance(value, str)
    for member in members(kind):
        if get_origin(member) is Literal and value in get_args(member):
            return value
        if member is type(None) and (value is None or (text and value.lower() == "none")):
            return None
        if member is bool and str(value).lower() in ("true", "false", "1", "0") and isinstance(value, (str, bool)):
            return str(value).lower() in ("true", "1")
        if member in (int, float) and not isinstance(value, bool) and isinstance(value, (str, int, member)):
            try:
                return member(value)
            except (ValueError, OverflowError):
                continue
        if member is str and text:
            return value
        if get_origin(member) is tuple and isinstance(value, (list, tuple, str)):
            return (value,) if text else tuple(convert(key, item, str) for item in value)
    raise UserError(f"{key}={value!r}: expected {describe_type(kind)}")


def describe_type(kind: Any) -> str:
    """The accepted values of a type, for error messages and --help."""
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return "text, or a list of texts"
    return " | ".join(TYPE_NAMES.get(member) or describe_type(member) for member in members(kind))


def unknown_setting(key: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(key, known, n=1)
    return UserError(
        f"unknown setting {key!r}" + (f": did you mean {close[0]!r}?" if close else "; --help lists them all")
    )


# -- config files and flags --------------------------------------------------------------------------------------------


def read_config_file(path: str, kinds: dict[str, Any]) -> dict[str, Any]:
    """The settings that a config file assigns, without its imports, functions, loop variables and _names."""
    found = next((p for p in (Path(path), ROOT / "configs" / Path(path).name) if p.is_file()), None)
    if found is None or found.suffix != ".py":
        raise UserError(f"no config file {path!r}; settings are given as --key=value")
    try:
        tree = ast.parse(found.read_bytes(), filename=path)
        assigned = runpy.run_path(str(found))
    except (Exception, SystemExit) as error:  # it is the user's own program, so it can raise anything
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    own = names_of_its_own(tree)
    values = {}
    for key, value in assigned.items():
        if key.startswith("_") or key in own or (callable(value) and key not in kinds):
            continue
        try:
            if key not in kinds:
                raise unknown_setting(key, list(kinds))
            values[key] = convert(key, value, kinds[key])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return values


def names_of_its_own(tree: ast.Module) -> set[str]:
    """Names in a config file that are not settings: its imports, and the variables of its `for` and `with`."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            own |= {name.asname or name.name.split(".")[0] for name in node.names}
        for target in getattr(node, "target", None), getattr(node, "optional_vars", None):
            if target is not None and not isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
                own |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return own


def split_arguments(arguments: list[str], kinds: dict[str, Any]) -> tuple[list[str], list[tuple[str, str]]]:
    """The words without --, and (key, text) of each flag, in order.

    --batch_size=8, --batch-size 8, --compile, --no-compile and --compile False are all accepted.
    """
    booleans = {key for key, kind in kinds.items() if bool in members(kind)}
    queue, words, flags = list(arguments), [], []
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("-"):
            words.append(argument)
            continue
        if not argument.startswith("--"):
            raise UserError(f"unknown option {argument!r}; settings are given as --key=value")
        key, equals, text = argument[2:].partition("=")
        key = key.replace("-", "_")
        if not equals and key in booleans:  # --compile, or --compile False
            has_value = bool(queue) and queue[0].lower() in ("true", "false", "auto")
            equals, text = "=", queue.pop(0) if has_value else "True"
        elif not equals and key.removeprefix("no_") in booleans:  # --no-compile
            key, equals, text = key.removeprefix("no_"), "=", "False"
        if key not in kinds:
            raise unknown_setting(key, list(kinds))
        if not equals:
            if not queue:
                raise UserError(f"--{key} needs a value: {describe_type(kinds[key])}")
            text = queue.pop(0)
        flags.append((key, text))
    return words, flags


def parse(cls: type[Settings], arguments: list[str], doc: str = "") -> tuple[Settings, dict[str, str]]:
    """A `cls` from defaults < config files < flags, and where each value came from.

    Origins are "default", the path of a config file, or "flag". Raises UserError; `--help` prints `doc` and exits.
    Arguments without -- are config files, or the values of the field that `cls.POSITIONAL` names.
    """
    positional = getattr(cls, "POSITIONAL", None)
    hints = get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in fields(cls) if field.name != positional}
    if "--help" in arguments:
        print_help(cls, doc)
        sys.exit(0)
    words, flags = split_arguments(arguments, kinds)
    values, origin = {}, dict.fromkeys(kinds, "default")
    if positional and words:
        values[positional], origin[positional] = tuple(words), "flag"
    for path in words if not positional else []:
        found = read_config_file(path, kinds)
        values |= found
        origin |= dict.fromkeys(found, path)
    for key, text in flags:
        repeated = get_origin(kinds[key]) is tuple and origin[key] == "flag"
        value = convert(key, text, kinds[key])
        values[key], origin[key] = (values[key] + value if repeated else value), "flag"
    return cls(**values), origin


def print_help(cls: type, doc: str) -> None:
    """Print every option with its type, default and meaning, laid out by Typer, under the name of its class."""
    import typer

    hints, positional = get_type_hints(cls, include_extras=True), getattr(cls, "POSITIONAL", None)
    words = typer.Argument(metavar="[CONFIG.py]...", help="config files; later wins")
    if positional:
        words = typer.Argument(metavar=f"{positional.upper()}...", help=get_args(hints[positional])[1])
    options, defaults = {"words": Annotated[list[str] | None, words]}, {"words": None}
    for field in fields(cls):
        if field.name != positional:
            kind, help_text = get_args(hints[field.name])
            heading = next(base.__name__ for base in cls.__mro__ if field.name in vars(base).get("__annotations__", {}))
            option = {"help": help_text, "metavar": describe_type(kind), "rich_help_panel": heading}
            options[field.name] = Annotated[str | None, typer.Option(f"--{field.name}", **option)]
            repeated = get_origin(kind) is tuple
            defaults[field.name] = None if repeated else str(field.default).replace("\n", "\\n")

    def command(**_: Any) -> None:
        """Typer reads the options from a function's signature: this one is never called."""

    command.__signature__ = inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=defaults[name])
        for name, annotation in options.items()
    )
    command.__annotations__ = options
    app = typer.Typer(add_completion=False)
    app.command(help=doc)(command)
    typer.main.get_command(app).main(["--help"], prog_name=Path(sys.argv[0]).name, standalone_mode=False)


# -- a command's start -------------------------------------------------------------------------------------------------


def parse_command_line(cls: type[Settings], doc: str) -> tuple[Settings, dict[str, str]]:
    """The settings in sys.argv. From here on Ctrl-C ends in one line, also while torch is imported."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # train.py and sample.py set it before their imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook = lambda kind, *rest: (
        print("error: interrupted", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    )
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us: `>&-`, cron
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that its encoding lacks becomes "?"
            stream.reconfigure(errors="replace")
    with one_line_errors():
        return parse(cls, sys.argv[1:], doc)


def run(main: Callable[[Settings, dict[str, str]], None], cls: type[Settings]) -> None:
    """Call main(settings, origin) with the settings in the command line; main's docstring heads --help."""
    settings = parse_command_line(cls, inspect.getdoc(main))
    with one_line_errors():
        main(*settings)
