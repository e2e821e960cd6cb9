"""From a command's arguments to its exit status."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from i3lm.errors import I3Error


def run_command(name: str, function: Callable[..., Any], arguments: list[str]) -> int:
    """Reads the arguments for a function, calls it, and turns problems into one line.

    Returns:
        0, or 2 for a problem that the user can mend, 130 after an interrupt.
    """
    debug = "--debug" in arguments
    try:
        settings = _parse(name, function, arguments)
        _quiet_libraries()
        function(**settings)
    except I3Error as error:
        return _fail(name, str(error), debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def print_json(content: Any) -> None:
    """Prints a result as one JSON object on one line."""
    print(json.dumps(content, ensure_ascii=False))


def _fail(name: str, message: str, debug: bool) -> int:
    if debug:
        raise
    print(f"i3lm {name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


# Parameters given by place rather than by name.
_POSITIONAL = ("checkpoint", "source", "out")


def _parse(name: str, function: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """Gives the function's arguments: defaults, then ``--config`` files, then options."""
    from jsonargparse import ArgumentError, Namespace

    from i3lm.errors import ConfigurationError

    parser = build_parser(name, function)
    try:
        settings = parser.instantiate_classes(parser.parse_args(arguments))
    except ArgumentError as error:
        cause = _deepest(error)
        if isinstance(cause, I3Error):
            raise cause from error
        raise ConfigurationError(_clear(str(error), parser)) from error

    def plain(value: Any) -> Any:
        return value.as_dict() if isinstance(value, Namespace) else value

    return {key: plain(settings[key]) for key in inspect.signature(function).parameters}


def build_parser(name: str, function: Callable[..., Any]) -> Any:
    """Gives the parser of a command, made from its function's signature and docstring."""
    import argparse

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the paragraphs and examples of the description as they are written."""

    parameters = inspect.signature(function).parameters
    positional = [p for p in parameters if p in _POSITIONAL]
    flags = [p for p, about in parameters.items() if about.default is False]
    documentation, _, described = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")
    parser = ArgumentParser(
        prog=f"i3lm {name}",
        usage=" ".join([f"i3lm {name}", *(p.upper() for p in positional), "[OPTIONS]"]),
        description=documentation,
        formatter_class=Formatter,
        exit_on_error=False,
        default_env=False,
    )
    if name == "train":
        parser.add_argument("--config", action="config", help="A YAML file with these options.")
    for parameter in positional:
        parser.add_argument(parameter, type=str, help=_help_of(parameter, described))
    parser.add_function_arguments(function, skip={*positional, *flags})
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=_help_of(flag, described))
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _help_of(parameter: str, described: str) -> str:
    """What the ``Args:`` section of a docstring says of a parameter."""
    text = re.search(rf"^    {parameter}: ((?:.|\n        )*)", described, re.MULTILINE)
    return _one_line(text[1]) if text else ""


def _deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def _clear(message: str, parser: Any) -> str:
    """jsonargparse's message on one line in plain words, with the option that was meant."""
    message = re.sub(r"<class '(\w+)'>", r"\1", _one_line(message))
    message = re.sub(r'^Parser key "([\w.]+)":', r"\1:", message)
    unknown = re.search(
        r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message
    )
    if unknown:
        wrong = unknown[1] or unknown[2]
        known = [action.dest for action in parser._actions]
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
        close = difflib.get_close_matches(wrong, known, n=1) or [
            by_leaf[leaf] for leaf in difflib.get_close_matches(wrong, by_leaf, n=1)
        ]
        message += f"; did you mean {close[0]}?" if close else f"; see {parser.prog} --help"
    return message


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _quiet_libraries() -> None:
    """Turns off other libraries' progress bars and advice; our own output says what happens."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
