"""Kills a training run again and again, resumes it, and compares it with one that was left alone.

    python -m tests.training.torture --kills 20 --seed 0 --folder FOLDER -- TRAIN OPTIONS

trains FOLDER/straight, and FOLDER/killed with `kill -9` at random instants. The exit status is 0
if losses, samples and weights are the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

TIMES = {
    "tokens_per_second", "step_seconds", "data_wait_fraction", "memory_bytes", "mfu",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("options", nargs="+")
    given = parser.parse_args()
    # What takes long to import is imported once; a child is a copy of this process.
    import i3lm.training.run
    from i3lm.cli import main as i3lm

    straight, killed = given.folder / "straight", given.folder / "killed"

    def train(run: Path) -> int:
        child = os.fork()
        if child == 0:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 2)
            resume = ["--resume"] if (run / "config.yaml").exists() else []
            status = 1
            try:
                status = i3lm(["train", "--output", str(run), *given.options, *resume])
            finally:
                os._exit(status)
        return child

    began = time.monotonic()
    assert os.waitpid(train(straight), 0)[1] == 0, Path(f"{straight}.log").read_text()
    seconds = time.monotonic() - began
    draw = random.Random(given.seed)
    kills, wrong = 0, []
    while kills < given.kills and not wrong:
        after = draw.uniform(0, seconds)
        child = train(killed)
        time.sleep(after)
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
    if not wrong:
        assert os.waitpid(train(killed), 0)[1] == 0, Path(f"{killed}.log").read_text()
        wrong = differences(straight, killed)
    print("\n".join(wrong) or "the same, bit for bit")
    return 1 if wrong else 0


def _position(run: Path) -> str:
    saved = [path.name for path in (run / "checkpoints").glob("*")]
    lines = run / "metrics.jsonl"
    count = len(lines.read_text().splitlines()) if lines.exists() else 0
    return f"{count} lines of metrics with {', '.join(sorted(saved)) or 'no checkpoint'}"


def differences(straight: Path, killed: Path) -> list[str]:
    """What is not the same in two runs, times left out."""
    wrong = []
    for name in ("best/model.safetensors", "last/model.safetensors", "samples.jsonl"):
        if (straight / name).read_bytes() != (killed / name).read_bytes():
            wrong.append(f"{name} differs")
    records = [_records(run / "metrics.jsonl") for run in (straight, killed)]
    if len(records[0]) != len(records[1]):
        wrong.append(f"{len(records[0])} lines of metrics against {len(records[1])}")
    for ours, theirs in zip(*records, strict=False):
        if ours != theirs:
            wrong.append(f"{ours} against {theirs}")
    return wrong


def _records(path: Path) -> list[dict]:
    lines = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in TIMES} for record in lines]


if __name__ == "__main__":
    sys.exit(main())
