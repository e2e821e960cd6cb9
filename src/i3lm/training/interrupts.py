"""SIGINT and SIGTERM: the first saves and stops the run, the second stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from i3lm.errors import Interrupted


class StopOnSignal(TrainerCallback):
    """Ends a run at the end of the step in which a signal arrives, with a checkpoint.

    As a context manager it takes the signals over. Python gives them to the main thread alone;
    elsewhere, and where the parent process had them ignored (as under nohup), they stay as they
    are. Under a launcher all processes stop at the same step, one after the signal.

    Args:
        report: Takes one line when the first signal arrives.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._votes: torch.Tensor | None = None

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            line = f"{self.received.name}: saving after this step; once more stops at once"
            # From another thread: this one may be in the middle of printing.
            threading.Thread(target=self.report, args=[line]).start()
            return
        self.__exit__()  # a third one does what it always does
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Asks for a checkpoint and the end of the run, if a signal has arrived."""
        number = int(self.received or 0)
        if args.world_size > 1:
            number = self._agree(number, args.device)
        if number:
            self.received = signal.Signals(number)
            control.should_save = control.should_training_stop = True

    def _agree(self, number: int, device: torch.device) -> int:
        """The signal that any process had one step ago: what is known by now, without waiting."""
        known = 0 if self._votes is None else int(self._votes)
        self._votes = torch.tensor(number, device=device)
        torch.distributed.all_reduce(self._votes, torch.distributed.ReduceOp.MAX)
        return known

    def check(self, step: int, last_step: int) -> None:
        """Ends a run that a signal stopped, unless its last step was done anyway.

        Raises:
            Interrupted: A signal ended the run.
        """
        if self.received is not None and step < last_step:
            raise Interrupted(
                self.received,
                f"stopped by {self.received.name} at step {step} of {last_step}, which is saved; "
                "give the same command with --resume to go on",
            )
