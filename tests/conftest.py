"""What the tests of the command line and of the training loop share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read by the libraries when they are imported. The command line sets them for its own process.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set it to 0 for tests marked network

TINY_MODEL = {
    "hidden_size": 16,
    "layer_types": "linear_attention, full_attention",
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}

# 60 steps are one epoch and a part of the second.
TINY_TRAINING = [
    "--model.config", json.dumps(TINY_MODEL),
    "--tokenizer.source", "character",
    "--data.source", "stories", "--data.size", "32", "--data.held_out_fraction", "0.1",
    "--training.max_steps", "60", "--training.batch_size", "8",
    "--training.learning_rate", "0.01", "--training.warmup_steps", "5",
    "--training.precision", "fp32", "--training.device", "cpu",
    "--training.log_every", "1", "--training.evaluate_every", "20",
    "--training.save_every", "10", "--training.keep_checkpoints", "10",
    "--sample.every", "30", "--sample.max_new_tokens", "20",
]  # fmt: skip

Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps tokenizers that tests train out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs torch and numba on one thread: tiny models only lose by more."""
    import numba
    import torch

    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.fixture(scope="session")
def process_environment(_own_cache: None) -> dict[str, str]:
    """The environment of an `i3lm` process in a test: one thread, and only its own verbosity."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        environment.pop(name)
    return environment


@pytest.fixture(scope="session")
def i3lm(process_environment: dict[str, str]) -> Process:
    """Runs `i3lm` with some arguments in a process of its own, to its end."""

    def run(*arguments: object, **settings) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "i3lm", *map(str, arguments)]
        settings = {"env": process_environment, "text": True, "timeout": 120, **settings}
        return subprocess.run(command, capture_output=True, **settings)

    return run


@pytest.fixture(scope="session")
def tiny_process(
    i3lm: Process, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """The finished process that trained `tiny_run`."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    finished = i3lm("train", "--output", output, "--json", *TINY_TRAINING)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="session")
def tiny_run(tiny_process: subprocess.CompletedProcess[str]) -> Path:
    """The folder of a tiny run of 60 steps. Tests that change it copy it first."""
    return Path(json.loads(tiny_process.stdout)["output"])
