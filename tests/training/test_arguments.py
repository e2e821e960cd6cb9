"""The device that transformers' Trainer is told to use, on machines that this one is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from transformers.training_args import ParallelMode

from i3lm.device import resolve_device
from i3lm.errors import ConfigurationError
from i3lm.training.arguments import training_arguments
from i3lm.training.options import TrainingOptions


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch):
    """Makes torch say that there are two GPUs; gives the list of those made current."""
    current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    yield current
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(folder: Path, device: torch.device):
    settings = {"precision": "fp32", "max_steps": 100, "resumed": False}
    options = TrainingOptions(learning_rate=1e-3, warmup_steps=20)
    return training_arguments(folder, options, device=device, **settings)


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_one_process_uses_the_one_gpu_asked_for(
    two_gpus: list[torch.device], tmp_path: Path, name: str, index: int
):
    made = arguments(tmp_path, resolve_device(name))
    expected = torch.device("cuda", index)
    assert made.device == expected
    assert made.n_gpu == 1  # more would train with nn.DataParallel
    assert made.parallel_mode is ParallelMode.NOT_PARALLEL
    assert made.train_batch_size == made.per_device_train_batch_size
    assert PartialState().device == expected  # where accelerate moves the batches
    assert Accelerator().device == expected
    assert two_gpus[-1] == expected


def test_cpu_is_the_cpu_however_many_gpus_there_are(two_gpus: list, tmp_path: Path):
    made = arguments(tmp_path, resolve_device("cpu"))
    assert (made.device, made.n_gpu) == (torch.device("cpu"), 0)
    assert PartialState().device == torch.device("cpu")
    assert two_gpus == []


def test_a_named_gpu_keeps_its_number_and_becomes_the_current_one(two_gpus: list):
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 1)]
    with pytest.raises(ConfigurationError, match=r"^device 'cuda:2' is not there: this machine has "
                                                 r"cuda:0, cuda:1$"):  # fmt: skip
        resolve_device("cuda:2")


def test_how_to_compute():
    rates = {"learning_rate": 1e-3, "warmup_steps": 20}
    plain = TrainingOptions(**rates)
    asked = TrainingOptions(**rates, compile=True)
    for options, expected in ((plain, False), (asked, True)):
        made = training_arguments(
            Path("run"), options, precision="fp32", device=torch.device("cpu"), max_steps=9,
            resumed=False,
        )  # fmt: skip
        assert made.torch_compile is expected
