"""The exceptions that a user can meet.

Every message says what was wrong, the value received, the rule, and the way out, in one line.
The command line prints that line and exits with status 2; a traceback appears only with
``--debug``.
"""

from __future__ import annotations


class I3Error(Exception):
    """A problem that the person at the keyboard can mend."""


class ConfigurationError(I3Error, ValueError):
    """An option, preset or YAML file that cannot be used as given."""


class DataError(I3Error):
    """Text that is missing, unreadable, empty or too short."""


class TokenizerError(I3Error):
    """A tokenizer that cannot be read, trained, or used with this model."""


class CheckpointError(I3Error):
    """Weights or configuration that are missing, damaged or of another model."""


class OutputError(I3Error):
    """A result that cannot be written where it was asked for."""


class KernelError(I3Error):
    """An op that has no fast implementation here, or one that computes wrongly."""


class GenerationError(I3Error, ValueError):
    """A prompt or sampling setting that generation cannot follow."""


class ProcessError(I3Error):
    """A process of a run that went away while the others waited for it."""


class SessionError(I3Error):
    """A saved conversation that is missing, damaged, or of another model."""


class Interrupted(Exception):
    """Work that a signal ended early, and that was put in safety first.

    Args:
        number: The signal.
        message: Where the work stands, and how to go on with it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
