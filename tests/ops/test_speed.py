from __future__ import annotations

from itertools import accumulate, chain

import pytest
import torch

from i3lm.ops import speed


def test_the_ceiling_is_the_best_repeat_after_the_first(monkeypatch: pytest.MonkeyPatch):
    seconds = [0.25, 4.0, 8.0, 0.5, 2.0, 8.0, 8.0, 8.0]
    assert len(seconds) == speed.REPEATS + 1
    # The clock is asked before and after every product, and nothing passes in between.
    clock = accumulate(chain.from_iterable((0.0, second) for second in seconds))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    flops = speed.measure_matmul_flops(torch.device("cpu"), torch.float32)
    assert flops == 2 * 1024**3 / 0.5


def test_copying_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "_fastest", lambda run, device: run().nbytes / 10)
    assert speed.measure_copy_bytes(torch.device("cpu")) == 20


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_vendors_figure_is_known_by_the_exact_name(
    name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert speed.vendor_bf16_flops(torch.device("cuda")) == flops
    assert speed.vendor_bf16_flops(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_is_timed_by_its_own_clock(dtype: torch.dtype):
    device = torch.device("cuda")
    flops = speed.measure_matmul_flops(device, dtype)
    vendor = speed.vendor_bf16_flops(device)
    assert flops > 1e11
    assert vendor is None or flops < 1.1 * vendor
    assert speed.measure_copy_bytes(device) > 1e10
