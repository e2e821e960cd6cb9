"""The command line: a table of commands, each in a file of its own.

Nothing heavy is imported before the command is known.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from i3lm import __version__

# Command -> what it does. The module i3lm.cli.COMMAND has a function COMMAND.
COMMANDS = {
    "train": "train a new model, or fine-tune a checkpoint",
    "generate": "continue a prompt",
    "chat": "talk to a model",
    "evaluate": "loss, perplexity and bits per byte on a text",
    "convert": "turn a checkpoint of open-i3 into one of ours",
    "merge": "merge a low-rank adapter into its base",
    "quantize": "make a checkpoint with int8 weights, for fast decoding on a CPU",
    "verify": "hold a checkpoint's ways of computing the same thing against each other",
    "models": "list the members of the family",
    "doctor": "what this machine has, which kernels run, and whether they are right",
    "quickstart": "train a small model in minutes and see what it learned",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the arguments name and gives the exit status."""
    status = 0
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()  # here, so that a reader that went away is noticed here
    except BrokenPipeError:
        # As with other tools, `i3lm ... | head` is no error.
        _drop_output()
        return 0
    except OSError as error:  # of that flush: a command reports its own
        _drop_output()
        if status == 0:
            print(f"i3lm: error: the output cannot be written: {error}", file=sys.stderr)
        return status or 2
    return status


def _drop_output() -> None:
    """Lets what is left in the output's buffer go nowhere: nothing more can be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"i3lm {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see i3lm --help"
        print(f"i3lm: error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    from i3lm.cli.running import run_command

    function = getattr(importlib.import_module(f"i3lm.cli.{name}"), name)
    return run_command(name, function, arguments[1:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: i3lm COMMAND [OPTIONS]\n\n"
        "Train, evaluate and use the i3 family of hybrid language models.\n\n"
        f"commands:\n{table}\n\n"
        "i3lm COMMAND --help tells more; i3lm --version prints the version.\n"
        "The i3 architecture is by FlameF0X and i3-lab: https://github.com/FlameF0X/open-i3"
    )
