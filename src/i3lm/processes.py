"""One run in several processes, as launchers such as torchrun and accelerate start them.

Every process does the same, on rows of its own; the first one alone writes and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from i3lm.errors import ConfigurationError, ProcessError

T = TypeVar("T")

# The first process may tokenize for hours while the others wait. A process that died is noticed
# by the launcher, which ends the others.
LONGEST_WAIT = timedelta(days=2)


def process_rank() -> tuple[int, int]:
    """The number of this process and how many there are, as the launcher says it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return process_rank()[0] == 0


def join_processes(device: torch.device) -> torch.device:
    """Connects this process to the others of the run, and gives the device that is its own.

    Args:
        device: The device that was asked for; of the kind ``cuda`` each process has another.

    Raises:
        ConfigurationError: There is no device of its own for this process.
    """
    if process_rank()[1] == 1:
        return device
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise ConfigurationError(
                f"process {local + 1} on this machine has no GPU of its own: there are {count}; "
                "start at most as many processes"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ConfigurationError(
            f"training.device ({device}) serves one process: use cpu or cuda, or start one process"
        )
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    return device


@contextmanager
def first_goes_first() -> Iterator[None]:
    """A block that the first process goes through alone, and then the others.

    So what the first one puts into a cache, the others find there.
    """
    if process_rank()[1] == 1:
        yield
        return
    if not is_first():
        distributed.barrier()
    yield
    if is_first():
        distributed.barrier()


def from_first(give: Callable[[], T]) -> T:
    """Calls `give` in the first process, and gives what it gave to all of them."""
    if process_rank()[1] == 1:
        return give()
    box: list[Any] = [give() if is_first() else None]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """Gives the values that the processes have, in the order of their numbers, to all of them."""
    world = process_rank()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Raises a ProcessError where another process can no longer be reached."""
    try:
        yield
    except RuntimeError as error:
        # gloo's own errors have no class of their own.
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise ProcessError(
                "another process of this run has ended, or cannot be reached; start all of them "
                "again with --resume"
            ) from error
        raise


def is_first_to_fail() -> bool:
    """Whether no other process of the run has failed before this one.

    The processes ask the launcher's store, which outlives each of them. The one that failed first
    says why; that the others then lose their connection to it tells nobody anything.
    """
    if process_rank()[1] == 1:
        return True
    try:
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        return store.add(f"i3lm/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, RuntimeError):  # a launcher without a store that can be asked
        return True
