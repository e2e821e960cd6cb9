"""``i3lm doctor``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from i3lm.ops.dispatch import Implementation
    from i3lm.ops.self_check import Check


def doctor(json: bool = False) -> None:
    """Shows what this machine has, which kernels run on it, and whether they are right.

    Prints versions, processor and devices, the matrix and memory speed measured just now, and for
    each op the kernel chosen and why; every kernel that can run here is held against the
    reference.

    Args:
        json: Print everything as one JSON object.
    """
    from i3lm.cli.running import print_json
    from i3lm.errors import KernelError

    facts = {
        "versions": _versions(),
        "processor": _processor(),
        "speed": _speed(),
        "kernels": _kernels(),
    }
    if json:
        print_json(facts)
    else:
        _print(facts)
    wrong = [
        f"{op}/{name} on {device}"
        for device, ops in facts["kernels"].items()
        for op, about in ops.items()
        for name, check in about["checks"].items()
        if check.get("passed") is False
    ]
    if wrong:
        raise KernelError(
            f"{', '.join(wrong)} fails or disagrees with the reference on this machine: "
            "choose another kernel, and please report this with the output of i3lm doctor --json"
        )


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in ("i3lm", "torch", "transformers", "accelerate", "tokenizers", "numba", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
        if package == "numba":
            found["numba_threading_layer"] = _threading_layer()
    return found


def _threading_layer() -> str:
    """What runs the threads of numba's kernels: omp, tbb, or its own slower workqueue."""
    import torch

    from i3lm.ops.dispatch import numba_refuses

    refusal = numba_refuses(torch.device("cpu"), torch.float32)  # which starts them
    if refusal is not None:
        return f"none ({refusal})"
    import numba

    return numba.threading_layer()


def _processor() -> dict[str, Any]:
    import os

    import torch

    from i3lm.device import has_fast_bf16

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_bf16": has_fast_bf16(torch.device("cpu")),
        "gpus": gpus,
    }


def _devices() -> list[Any]:
    """The processor, and the GPU where there is one."""
    import torch

    from i3lm.device import resolve_device

    cpu, best = torch.device("cpu"), resolve_device()
    return [cpu] if best == cpu else [cpu, best]


def _speed() -> dict[str, dict[str, float]]:
    """Measured ceilings of each device: matrix products in GFLOP/s, copying in GB/s."""
    import torch

    from i3lm.ops.speed import measure_copy_bytes, measure_matmul_flops, vendor_bf16_flops

    found = {}
    for device in _devices():
        figures = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            flops = measure_matmul_flops(device, dtype)
            figures[f"matmul_{name}_gflops"] = round(flops / 1e9, 1)
        promised = vendor_bf16_flops(device)
        if promised is not None:
            figures["vendor_bf16_gflops"] = promised / 1e9
        figures["copy_gb_per_second"] = round(measure_copy_bytes(device) / 1e9, 1)
        found[str(device)] = figures
    return found


def _kernels() -> dict[str, dict[str, dict[str, Any]]]:
    return {str(device): _kernels_on(device) for device in _devices()}


def _kernels_on(device: Any) -> dict[str, dict[str, Any]]:
    from i3lm.ops.self_check import CHECKS

    found: dict[str, dict[str, Any]] = {}
    for name, check in CHECKS.items():
        choice = check.op.choose(device, check.dtype)
        found[name] = {
            "dtype": str(check.dtype).removeprefix("torch."),
            "chosen": choice.implementation.name,
            "reason": choice.reason,
            "tolerance": check.tolerance,
            "checks": {
                implementation.name: _check(check, implementation, device)
                for implementation in check.op.implementations
            },
        }
    return found


def _check(check: Check, implementation: Implementation, device: torch.device) -> dict[str, Any]:
    import math

    from i3lm.ops.self_check import largest_difference

    refusal = implementation.refuses(device, check.dtype)
    if refusal is not None:
        return {"refuses": refusal}
    try:
        difference = largest_difference(check.op.name, implementation.name, device)
    except Exception as error:  # a broken installation may raise anything: it is the answer
        return {"failed": f"{type(error).__name__}: {error}", "passed": False}
    if not math.isfinite(difference):  # for which JSON has no word
        return {"failed": "gives NaN or infinity", "passed": False}
    return {"difference": difference, "passed": difference <= check.tolerance}


def _print(facts: dict[str, Any]) -> None:
    for title in ("versions", "processor"):
        print(title)
        _print_figures(facts[title])
    for device, figures in facts["speed"].items():
        print(f"speed on {device}")
        _print_figures(figures)
    for device, ops in facts["kernels"].items():
        print(f"kernels on {device}")
        for op, about in ops.items():
            print(f"  {op}: {about['chosen']} in {about['dtype']} ({about['reason']})")
            for name, check in about["checks"].items():
                print(f"    {name:<11} {_verdict(check, about['tolerance'])}")


def _print_figures(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        text = ", ".join(value) or "none" if isinstance(value, list) else value
        print(f"  {name:<22} {text}")


def _verdict(check: dict[str, Any], tolerance: float) -> str:
    if "refuses" in check:
        return f"cannot run here: {check['refuses']}"
    if "failed" in check:
        return f"FAILED: {check['failed']}"
    verdict = "agrees with" if check["passed"] else "DISAGREES with"
    return (
        f"{verdict} the reference: largest difference {check['difference']:.1e}, "
        f"tolerance {tolerance:.0e}"
    )
