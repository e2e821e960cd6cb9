"""The loop around the training loop: signals, numbers that go wrong, and what compiling may say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from i3lm.errors import ConfigurationError, KernelError
from i3lm.files import append_line
from i3lm.processes import is_first
from i3lm.training.checkpoints import checkpoint_step, latest_checkpoint, load_state
from i3lm.training.guards import NonFiniteError
from i3lm.training.interrupts import StopOnSignal
from i3lm.training.trainer import I3Trainer

MOST_RESTORES = 3


def train_guarded(
    trainer: I3Trainer,
    checkpoint: Path | None,
    *,
    restore: bool,
    metrics: Path,
    report: Callable[[str], None],
) -> None:
    """Trains to the end, to a signal, or to numbers that go wrong for good.

    Args:
        trainer: What trains.
        checkpoint: Where to begin; None for the beginning.
        restore: Whether to go back to the newest checkpoint where a gradient is not finite, and
            on without the data that led there, `MOST_RESTORES` times at most.
        metrics: The file that gets a line for every such return.
        report: Takes lines for the person who waits.

    Raises:
        Interrupted: A signal ended the run, and it is saved.
        ConfigurationError: A gradient is not finite, and the run cannot go on.
        KernelError: torch.compile failed.
    """
    folder = Path(trainer.args.output_dir)
    if checkpoint is not None:
        _tell_of_other_processes(checkpoint, trainer.args.world_size, report)
    with StopOnSignal(report) as stop, _naming_the_compiler():
        trainer.add_callback(stop)
        for restores in range(1, MOST_RESTORES + 2):
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                break
            except NonFiniteError as found:
                checkpoint = latest_checkpoint(folder, report)
                if not restore or checkpoint is None or restores > MOST_RESTORES:
                    raise _give_up(found, checkpoint, restores - 1, trainer) from found
                line = f"{found}; back to {checkpoint.name} and on without the data of its steps"
                report(f"warning: {line} ({restores} of {MOST_RESTORES} times)")
                record = {"step": checkpoint_step(checkpoint), "restored_from_step": found.step}
                if is_first():
                    append_line(metrics, json.dumps({**record, "reason": found.where}))
                trainer.skip_data(found.step)
        if trainer.data_ended:
            report(
                f"the sources ended at step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}: the run ends here"
            )
            return
        stop.check(trainer.state.global_step, trainer.state.max_steps)


def _tell_of_other_processes(
    checkpoint: Path, processes: int, report: Callable[[str], None]
) -> None:
    before = len(load_state(checkpoint, "progress")["losses_since_log"])
    if before != processes:
        report(
            f"{checkpoint.name} was saved by {before} processes, and now there are {processes}: "
            "the run goes on, but random states and the order of sums differ, so its losses are "
            "not bit for bit those of a run that stayed as it was"
        )


def _give_up(
    found: NonFiniteError, checkpoint: Path | None, restores: int, trainer: I3Trainer
) -> ConfigurationError:
    rate = f"begin another run with a training.learning_rate below {trainer.args.learning_rate:g}"
    if checkpoint is None:
        return ConfigurationError(f"{found}; no checkpoint was saved before: {rate}")
    if restores:
        return ConfigurationError(
            f"{found}, for all that the run went back {restores} times; {checkpoint} is whole: "
            f"{rate}"
        )
    return ConfigurationError(
        f"{found}; {checkpoint} is whole: resume from it with --training.on_nan restore, or {rate}"
    )


@contextmanager
def _naming_the_compiler() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).split())[:200]
            raise KernelError(
                f"training.compile: torch.compile failed ({reason}); leave it out, or give it the "
                "C++ compiler that it needs on a CPU"
            ) from error
        raise
