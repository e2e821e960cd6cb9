"""Times the recurrences: every implementation, forward and forward + backward.

    python benchmarks/ops.py --op wkv --lengths 64 512 4096 --channels 768

Each implementation is held against the reference (a loop in float64) on a short sequence first, and
so is the peer; one that disagrees is not timed. ``matmul x2`` is two 768 -> 3072 products in
bfloat16 on the same tokens. Memory is what forward + backward takes at most beside the inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measuring import median_ratio, peak_resident_mib, report, summary, time_alternating
from torch import Tensor

from i3lm.device import keep_freed_memory
from i3lm.ops import state_space, wkv
from i3lm.ops.self_check import RECURRENCES, TOLERANCE, example_inputs, largest_difference

DOORS: dict[str, Callable] = {"wkv": wkv, "state_space": state_space}
SEQUENCES = {"wkv": 2, "state_space": 1}  # how many of an op's inputs come in the model's dtype
# bfloat16 has 8 bits, and the peer keeps its states in them.
TOLERANCES = {torch.float32: TOLERANCE, torch.bfloat16: 5e-2}
FEWEST_REPEATS = 3

Run = Callable[[list[Tensor], bool], list[Tensor]]


@functools.cache
def ones(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gradient of a sum as it comes in a model: numbers that lie in memory."""
    return torch.ones(shape, dtype=dtype, device=device)


def with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of its sum."""
    gradient = ones(output.shape, output.dtype, output.device)
    return [output, *torch.autograd.grad(output, inputs, gradient)]


def ours(op: str, name: str) -> Run:
    """One pass of an implementation, with the gradients where asked for."""

    def run(inputs: list[Tensor], backward: bool) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            output, _ = DOORS[op](*inputs, implementation=name)
        return with_gradients(output, inputs) if backward else [output]

    return run


def fla_rwkv4(inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The same recurrence by flash-linear-attention, whose bonus has the other sign."""
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    key, value, decay, first = inputs
    state = torch.zeros(key.shape[0], 3, 1, key.shape[2], device=key.device)
    state[:, 2] = -1e38
    with torch.set_grad_enabled(backward):
        # It takes the logarithm of the rate and applies -exp itself.
        output, _ = fused_recurrent_rwkv4(torch.log(-decay), -first, key, value, state)
    return with_gradients(output, inputs) if backward else [output]


def draw(
    op: str, shape: tuple[int, int, int], state_size: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Inputs as a model gives them: sequences in a dtype, parameters in float32."""
    drawn = example_inputs(op, *shape, state_size=state_size)
    dtypes = [dtype] * SEQUENCES[op] + [torch.float32] * (len(drawn) - SEQUENCES[op])
    return [x.to(device, d).requires_grad_() for x, d in zip(drawn, dtypes, strict=True)]


def difference(run: Run, op: str, dtype: torch.dtype, device: str) -> float:
    """How far output and gradients are from the reference in float64, relative to each's size."""
    inputs = draw(op, (2, 100, 40), 32, dtype, device)
    truth = [x.detach().cpu().double().requires_grad_() for x in inputs]
    pairs = zip(ours(op, "reference")(truth, True), run(inputs, True), strict=True)
    differences = [
        (a - b.cpu().double()).abs().max() / a.abs().max().clamp_min(1) for a, b in pairs
    ]
    return torch.stack(differences).max().item()  # NaN if any is


def contestants(options: argparse.Namespace, dtype: torch.dtype) -> tuple[dict[str, Run], bool]:
    """What runs here and agrees with the reference, and whether all that runs does."""
    op, device = RECURRENCES[options.op], torch.device(options.device)
    found: dict[str, Run] = {}
    right: dict[str, Run] = {}
    for name in options.implementations or op.names:
        refusal = op.named(name).refuses(device, torch.float32)
        if refusal is not None:
            print(f"{name}: {refusal}")
            continue
        found[name] = ours(options.op, name)
    if options.peer == "fla" and options.op == "wkv":
        found["fla"] = fla_rwkv4
    for name, run in found.items():
        try:
            error = difference(run, options.op, dtype, options.device)
            marked = 0.0 if name == "fla" else largest_difference(options.op, name, device)
        except Exception as failure:  # whatever one raises, the others are still measured
            print(f"{name}: {type(failure).__name__}: {failure}; not timed")
            continue
        if error <= TOLERANCES[dtype] and marked <= TOLERANCE:
            right[name] = run
        else:
            print(
                f"{name}: differs from the reference by {error:.1e} in {dtype}, and by "
                f"{marked:.1e} in float32 with documents and padding; not timed"
            )
    return right, len(right) == len(found)


def peak_memory_mib(run: Callable[[], Any], device: str) -> float | None:
    """What a run takes at most beyond what is there before it; None where nothing tells."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count as there
    forget.write_text("5")  # the peak so far: man proc_pid_clear_refs
    before = peak_resident_mib()
    run()
    return round(peak_resident_mib() - before, 1)


def time_row(runs: dict[str, Callable], options: argparse.Namespace) -> dict[str, list[float]]:
    """Times in turn, fewer times where a turn takes long."""
    turn = sum(sum(seconds) for seconds in time_alternating(runs, 1).values())
    affordable = max(FEWEST_REPEATS, int(options.seconds / turn))
    return time_alternating(runs, min(options.repeats, affordable), warmup=0)


def measure(options: argparse.Namespace, dtype: torch.dtype) -> tuple[list[dict[str, Any]], bool]:
    """A row for each length and pass in one dtype, and whether all that runs here is right."""
    names, all_right = contestants(options, dtype)
    columns = [*names, "matmul x2"]
    print(f"{str(dtype).removeprefix('torch.')}\n{'steps':>6} {'pass':<18} ", end="")
    print(" ".join(f"{name:>12}" for name in columns))
    rows = []
    for steps in options.lengths:
        shape = (options.batch, steps, options.channels)
        inputs = draw(options.op, shape, options.state_size, dtype, options.device)
        tokens = torch.randn(options.batch * steps, 768, device=options.device).bfloat16()
        matrix = torch.randn(3072, 768, device=options.device).bfloat16()
        for backward in (False, True):
            runs: dict[str, Callable] = {
                name: lambda run=run, i=inputs, b=backward: run(i, b) for name, run in names.items()
            }
            runs["matmul x2"] = lambda x=tokens, w=matrix: (x @ w.T, x @ w.T)
            seconds = time_row(runs, options)
            label = "forward+backward" if backward else "forward"
            cells = " ".join(f"{summary(s)['median_ms']:>9.2f} ms" for s in seconds.values())
            print(f"{steps:>6} {label:<18} {cells}")
            row: dict[str, Any] = {
                "steps": steps,
                "pass": label,
                "dtype": str(dtype).removeprefix("torch."),
                **{name: summary(s) for name, s in seconds.items()},
                "ratio_to_matmul_x2": ratios(seconds, "matmul x2"),
            }
            if "fla" in names:
                row["ratio_to_fla"] = ratios(seconds, "fla")
            if backward:
                row["peak_memory_mib"] = {
                    name: peak_memory_mib(runs[name], options.device) for name in names
                }
            rows.append(row)
    return rows, all_right


def ratios(seconds: dict[str, list[float]], other: str) -> dict[str, float]:
    """How many times as long as `other` everything else takes."""
    return {name: median_ratio(s, seconds[other]) for name, s in seconds.items() if name != other}


def versions(*packages: str) -> dict[str, str | None]:
    """The installed versions; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main() -> int:
    """Runs the benchmark; 1 where an implementation or the peer fails or disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=tuple(DOORS), default="wkv")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 4096, 16384])
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--state-size", type=int, default=32)
    parser.add_argument("--dtypes", choices=("float32", "bfloat16"), nargs="+", default=["float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=60,
        help=f"for the repeats of a row, of which there are {FEWEST_REPEATS} at least",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", choices=("fla",), help="for wkv on a GPU")
    parser.add_argument("--implementations", nargs="+", default=None)
    parser.add_argument("--output", help="append the JSON line to this file")
    options = parser.parse_args()

    keep_freed_memory()  # as `i3lm train` does: else each long tensor is new pages
    measured = [measure(options, getattr(torch, name)) for name in options.dtypes]
    rows = [row for found, _ in measured for row in found]
    setting = {name: vars(options)[name] for name in ("device", "batch", "channels")}
    if options.op == "state_space":
        setting["state_size"] = options.state_size
    setting["versions"] = versions("triton", "fla-core")
    report(f"ops/{options.op}", {**setting, "rows": rows}, options.output)
    return 0 if all(right for _, right in measured) else 1


if __name__ == "__main__":
    raise SystemExit(main())
