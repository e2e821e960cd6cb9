"""From a command's arguments to its exit status."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from i3lm.errors import I3Error, Interrupted


def run_command(name: str, function: Callable[..., Any], arguments: list[str]) -> int:
    """Reads the arguments for a function, calls it, and turns problems into one line.

    Returns:
        What the function gives, 0 for None; 2 for a problem that the user can mend; after a
        signal 128 and its number, as shells have it: 130 for an interrupt.
    """
    debug = "--debug" in arguments
    try:
        settings = _parse(name, function, arguments)
        _quiet_libraries()
        _tell_of_compiling()
        status = function(**settings)
        sys.stdout.flush()  # here, so that output that cannot be written is noticed here
    except I3Error as error:
        return _fail(name, str(error), debug)
    except BrokenPipeError:
        raise
    except OSError as error:  # what the machine refused, in the words that it gave
        return _fail(name, f"{error}; --debug shows where", debug)
    except SystemExit as stop:  # how the parser ends after --help
        return int(stop.code or 0)
    except Interrupted as stop:
        _say(f"i3lm {name}: {stop}")
        return 128 + stop.number
    except KeyboardInterrupt:
        _say(f"i3lm {name}: interrupted")
        return 130
    except Exception:
        # A defect: its trace is shown, once where several processes
        # train together; the others end with a status that tells the launcher so.
        if _speaks():
            raise
        return 1
    return status or 0


def print_json(content: Any) -> None:
    """Prints a result as one JSON object on one line."""
    print(json.dumps(content, ensure_ascii=False))


def _fail(name: str, message: str, debug: bool) -> int:
    if debug:
        raise
    _say(f"i3lm {name}: error: {_one_line(message)}")
    return 2


def _say(line: str) -> None:
    if _speaks():
        print(line, file=sys.stderr, flush=True)


def _speaks() -> bool:
    """Whether it is for this process to say what went wrong, where a launcher started several."""
    if "WORLD_SIZE" not in os.environ:
        return True
    from i3lm.processes import is_first_to_fail

    return is_first_to_fail()


# Parameters given by place rather than by name.
_POSITIONAL = ("checkpoint", "source", "out")


def _parse(name: str, function: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """Gives the function's arguments: defaults, then ``--config`` files, then options."""
    from jsonargparse import ArgumentError, Namespace

    from i3lm.errors import ConfigurationError

    parser = build_parser(name, function)
    try:
        settings = parser.instantiate(parser.parse_args(list(map(_as_key, arguments))))
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"a file given with the options is not UTF-8 text ({error.reason} at byte "
            f"{error.start}): convert it first, for example with: iconv -f latin1 -t utf-8"
        ) from error
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

    class Parser(ArgumentParser):
        """Shows options as they are typed, with dashes; YAML keys have underscores."""

        def format_help(self, *arguments: Any) -> str:
            text = super().format_help(*arguments)
            return re.sub(r"--[a-z][\w.]*", lambda found: _as_option(found[0]), text)

    parameters = inspect.signature(function).parameters
    positional = [p for p in parameters if p in _POSITIONAL]
    flags = [p for p, about in parameters.items() if about.default is False]
    documentation, _, described = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")
    parser = Parser(
        prog=f"i3lm {name}",
        usage=" ".join([f"i3lm {name}", *(p.upper() for p in positional), "[OPTIONS]"]),
        description=documentation,
        formatter_class=Formatter,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    if name == "train":
        parser.add_argument(
            "--config", action="config", help="A YAML file with these options; may be given again."
        )
    for parameter in positional:
        parser.add_argument(parameter, type=str, help=_help_of(parameter, described))
    parser.add_function_arguments(function, skip={*positional, *flags})
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=_help_of(flag, described))
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _as_key(argument: str) -> str:
    """``--max-new-tokens=9`` as ``--max_new_tokens=9``; anything but an option as it is."""
    option, equals, value = argument.partition("=")
    if not re.fullmatch(r"--[A-Za-z][\w.-]*", option):
        return argument
    return "--" + option[2:].replace("-", "_") + equals + value


def _as_option(key: str) -> str:
    """A key as the option that sets it is typed."""
    return "--" + key.removeprefix("--").replace("_", "-")


def _help_of(parameter: str, described: str) -> str:
    """What the ``Args:`` section of a docstring says of a parameter."""
    text = re.search(rf"^    {parameter}: ((?:.|\n        )*)", described, re.MULTILINE)
    return _one_line(text[1]) if text else ""


def _deepest(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list, such as '[first, second]'",
    "dict": "a mapping, such as '{key: value}'",
    "NoneType": "null",
}


def _clear(message: str, parser: Any) -> str:
    """jsonargparse's message on one line, as value, rule and way out."""
    message = re.sub(r"<class '(\w+)'>", r"\1", _one_line(message))
    message = re.sub(r'^Parser key "([\w.]+)": ?', r"\1: ", message)
    help_hint = f"see {parser.prog} --help"
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        option = match[1].partition("=")[0]
        if not option.startswith("-"):
            return f"unexpected argument {option!r}; {help_hint}"
        close = _nearest(option.lstrip("-"), parser)
        meant = f"did you mean {_as_option(close)}?" if close else help_hint
        return f"unknown option {_as_option(option)}; {meant}"
    if match := re.search(
        r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<key>[^']+)'", message
    ):
        key = f"{match['group']}.{match['key']}" if match["group"] else match["key"]
        close = _nearest(key, parser)
        return f"unknown key {key!r}; " + (f"did you mean {close!r}?" if close else help_hint)
    if match := re.search(r"arguments are required: (.+)", message):
        positional = [action.dest for action in parser._actions if not action.option_strings]
        names = [n.upper() if n in positional else _as_option(n) for n in match[1].split(", ")]
        verb = "is" if len(names) == 1 else "are"
        return f"{' and '.join(names)} {verb} required; {help_hint}"
    if match := re.match(r"([\w.]+): .*?Expected .*(?:Got|Given) value: (.*)", message):
        kinds = dict.fromkeys(re.findall(r"Expected an? (\w+)", message))
        rule = " or ".join(_TYPE_NAMES.get(kind, kind) for kind in kinds)
        return f"{match[1]} ({match[2]}) must be {rule}"
    if match := re.match(r"argument (--[\w.]+): expected one argument", message):
        return f"{_as_option(match[1])} needs a value; {help_hint}"
    if match := re.match(r"argument (--[\w.]+): ignored explicit argument '(.*)'", message):
        return f"{_as_option(match[1])} takes no value, but was given {match[2]!r}"
    if match := re.match(r"config: (?:File does not exist|Path is not a file): '(.*?)'", message):
        return f"{match[1]}: no such file; give the path of a YAML file with --config"
    if match := re.match(r"([\w.]+): Unable to load config '(.*?)'", message):
        return (
            f"--{match[1]} ({match[2]}) must be the path of a YAML file; one option is set with "
            f"--{match[1]}.NAME"
        )
    if match := re.match(r"Problems parsing config: (.*)", message):
        reason = match[1].replace('in "<unicode string>", ', "at ")
        return f"the file given with --config is not readable as YAML: {reason}"
    if message.startswith("Unexpected config"):
        return f"the file given with --config must be a mapping of options; {help_hint}"
    return message


def _nearest(wrong: str, parser: Any) -> str | None:
    """The option that is spelled most like a wrong one, or whose last part is."""
    known = [action.dest for action in parser._actions]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    leaf = wrong.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(wrong, known, n=1) or [
        by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1)
    ]
    return close[0] if close else None


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _quiet_libraries() -> None:
    """Turns off other libraries' progress bars and advice; our own output says what happens."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Where torchao is installed, transformers imports it, and it tells of GPU kernels it lacks.
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def _tell_of_compiling() -> None:
    """Lets a person at a terminal know why the first command on a machine takes its time."""
    logger = logging.getLogger("i3lm.ops.numba_bridge")
    if sys.stderr.isatty() and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("i3lm: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
