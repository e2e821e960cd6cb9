"""Kills a training run again and again, resumes it, and compares it with one that was left alone.

    python -m tests.training.torture --kills 20 --seed 0 --folder FOLDER -- TRAIN OPTIONS

trains FOLDER/straight, and FOLDER/killed with `kill -9` at random instants: of the time that a
run takes, where text is tokenized into stores (each run has its own, FOLDER/killed.tokens) and
workers start; and of its batches, wherever they come in that time. The exit status is 0 if
batches, losses, samples and weights are the same, bit for bit.

For longer torture, with streams, workers and an epoch's end in it:

    python -m tests.training.torture --kills 500 --folder FOLDER -- --config configs/any.yaml \\
        --data.mixture '[{"source": "stories", "size": 5000}, {"source": "pydocs"}]' \\
        --data.rows stream --data.streaming true --data.workers 2 --training.device cpu \\
        --training.max_steps 500 --training.save_every 20 --training.log_every 1

`--workers 0 2` gives the resumed runs these numbers of workers in turn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from itertools import count
from pathlib import Path

TIMES = {
    "tokens_per_second", "step_seconds", "data_wait_fraction", "memory_bytes", "mfu",
}  # fmt: skip
MODELS = ("best/model.safetensors", "last/model.safetensors", "samples.jsonl")
# Of a checkpoint: what the next step depends on, where it is not hidden in a pickle.
STATES = ("model.safetensors", "carried_state.safetensors", "data.json", "progress.json")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[])
    parser.add_argument("options", nargs="+")
    given = parser.parse_args()
    # What takes long to import is imported once; a child is a copy of this process.
    import i3lm.training.run  # noqa: F401 (for the children)

    straight, killed = given.folder / "straight", given.folder / "killed"
    attempts = count()

    def train(run: Path) -> int:
        options = [*given.options, "--data.cache", f"{run}.tokens"]
        if given.workers:
            workers = given.workers[next(attempts) % len(given.workers)]
            options += ["--data.workers", str(workers)]
        return start(run, options)

    began = time.monotonic()
    assert os.waitpid(train(straight), 0)[1] == 0, Path(f"{straight}.log").read_text()
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s without a kill", flush=True)
    draw = random.Random(given.seed)
    batches = len(_lines(_batches(straight)))
    kills, wrong = 0, []
    while kills < given.kills and not wrong:
        child = train(killed)
        began = time.monotonic()
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, seconds))
        else:
            left = batches - len(set(_lines(_batches(killed))))
            wait_for_batches(child, killed, draw.randint(1, max(1, left)))
            time.sleep(draw.uniform(0, 0.05))
        after = time.monotonic() - began
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            kills += 1
            print(f"killed after {after:.2f} s, at {_position(killed)}", flush=True)
            continue
        # It had ended: another one is begun.
        assert status == 0, Path(f"{killed}.log").read_text()
        wrong = differences(straight, killed)
        shutil.rmtree(killed)
        shutil.rmtree(f"{killed}.tokens", ignore_errors=True)
        _batches(killed).unlink()
    if not wrong:
        assert os.waitpid(train(killed), 0)[1] == 0, Path(f"{killed}.log").read_text()
        wrong = differences(straight, killed)
    print("\n".join(wrong) or "the same, bit for bit")
    return 1 if wrong else 0


def start(run: Path, options: list[str]) -> int:
    """Begins or resumes a run in a child process, and gives its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        note_batches(_batches(run))
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        from i3lm.cli import main as i3lm

        status = i3lm(["train", "--output", str(run), *options, *resume])
    finally:
        # Not os._exit alone, which would leave workers to find out for themselves.
        from i3lm.data.streams import _close_all

        _close_all()
        os._exit(status)


def note_batches(path: Path) -> None:
    """Makes the trainer of this process write down each batch that it trains on, as a checksum."""
    from i3lm.training.trainer import I3Trainer

    train = I3Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(inputs):
            digest.update(inputs[name].cpu().numpy().tobytes())
        # Which batch of which step; one write, so that a kill leaves whole lines.
        line = f"{self.state.global_step} {len(self._batches)} {digest.hexdigest()}\n"
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())
        return train(self, model, inputs, *args, **kwargs)

    I3Trainer.training_step = training_step


def wait_for_batches(child: int, run: Path, number: int) -> None:
    """Waits until a process has trained on so many batches, or has ended."""
    before = len(_lines(_batches(run)))
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, child, ended) is None:
        if len(_lines(_batches(run))) - before >= number:
            return
        time.sleep(0.002)


def _batches(run: Path) -> Path:
    """Where `note_batches` writes."""
    return Path(f"{run}.batches")


def _position(run: Path) -> str:
    saved = [path.name for path in (run / "checkpoints").glob("*")]
    lines = run / "metrics.jsonl"
    checkpoints = ", ".join(sorted(saved)) or "no checkpoint"
    return f"{len(_lines(lines))} lines of metrics with {checkpoints}"


def differences(straight: Path, killed: Path) -> list[str]:
    """What is not the same in two runs, times left out."""
    newest = max((straight / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    states = [f"checkpoints/{newest.name}/{name}" for name in STATES]
    wrong = [
        f"{name} differs"
        for name in (*MODELS, *states)
        if _content(straight / name) != _content(killed / name)
    ]
    # A batch of a step is the same in every attempt.
    batches = [_lines(_batches(run)) for run in (straight, killed)]
    if set(batches[0]) != set(batches[1]):
        wrong.append(f"{len(set(batches[0]) ^ set(batches[1]))} batches differ")
    records = [_records(run / "metrics.jsonl") for run in (straight, killed)]
    if len(records[0]) != len(records[1]):
        wrong.append(f"{len(records[0])} lines of metrics against {len(records[1])}")
    for ours, theirs in zip(*records, strict=False):
        if ours != theirs:
            wrong.append(f"{ours} against {theirs}")
    return wrong


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _records(path: Path) -> list[dict]:
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in _lines(path)
    ]


if __name__ == "__main__":
    sys.exit(main())
