"""Times the recurrences: every implementation, forward and forward + backward.

    python benchmarks/ops.py --op wkv --lengths 64 512 4096 --channels 768

Each implementation is held against the reference (a loop in float64) on a short sequence first;
one that disagrees is not timed. ``matmul x2`` is two 768 -> 3072 products in bfloat16 on the same
tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measuring import median_ratio, report, summary, time_alternating

from i3lm.ops import state_space, wkv
from i3lm.ops.self_check import RECURRENCES, TOLERANCE, example_inputs, largest_difference


def run(function: Callable, inputs: list[torch.Tensor], name: str, backward: bool) -> list:
    """One pass, and the gradients where `backward`."""
    with torch.set_grad_enabled(backward):
        output, _ = function(*inputs, implementation=name)
    if not backward:
        return [output]
    return [output, *torch.autograd.grad(output.sum(), inputs)]


def fla_rwkv4(inputs: list[torch.Tensor], backward: bool) -> list:
    """The same recurrence by flash-linear-attention, whose bonus has the other sign."""
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    key, value, decay, first = inputs
    state = torch.zeros(key.shape[0], 3, 1, key.shape[2], device=key.device)
    state[:, 2] = -1e38
    with torch.set_grad_enabled(backward):
        # It takes the logarithm of the rate and applies -exp itself.
        output, _ = fused_recurrent_rwkv4(torch.log(-decay), -first, key, value, state)
    if not backward:
        return [output]
    return [output, *torch.autograd.grad(output.sum(), inputs)]


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=("wkv", "state_space"), default="wkv")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 4096, 16384])
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--state-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", choices=("fla",), help="for wkv on a GPU")
    parser.add_argument("--implementations", nargs="+", default=None)
    parser.add_argument("--output", help="append the JSON line to this file")
    options = parser.parse_args()

    function: Callable = {"wkv": wkv, "state_space": state_space}[options.op]
    op = RECURRENCES[options.op]
    candidates = options.implementations or op.names
    names = []
    for name in candidates:
        refusal = op.named(name).refuses(torch.device(options.device), torch.float32)
        if refusal is not None:
            print(f"{name}: {refusal}")
        elif (difference := largest_difference(options.op, name, options.device)) > TOLERANCE:
            print(f"{name}: differs from the reference by {difference:.1e}; not timed")
        else:
            names.append(name)

    rows = []
    with_peer = options.peer == "fla" and options.op == "wkv"
    columns = [*names, *(["fla"] if with_peer else []), "matmul x2"]
    print(f"{'steps':>6} {'pass':<18} " + " ".join(f"{name:>12}" for name in columns))
    for steps in options.lengths:
        shape = (options.batch, steps, options.channels)
        drawn = example_inputs(options.op, *shape, state_size=options.state_size)
        inputs = [x.float().to(options.device).requires_grad_() for x in drawn]
        tokens = torch.randn(options.batch * steps, 768, device=options.device).bfloat16()
        matrix = torch.randn(3072, 768, device=options.device).bfloat16()
        for backward in (False, True):
            runs: dict[str, Callable] = {
                name: (lambda n=name, i=inputs, b=backward: run(function, i, n, b))
                for name in names
            }
            if with_peer:
                runs["fla"] = lambda i=inputs, b=backward: fla_rwkv4(i, b)
            runs["matmul x2"] = lambda x=tokens, w=matrix: (x @ w.T, x @ w.T)
            seconds = time_alternating(runs, options.repeats)
            label = "forward+backward" if backward else "forward"
            cells = " ".join(f"{summary(s)['median_ms']:>9.2f} ms" for s in seconds.values())
            print(f"{steps:>6} {label:<18} {cells}")
            rows.append({
                "steps": steps, "pass": label,
                **{name: summary(s) for name, s in seconds.items()},
                "ratio_to_matmul_x2": {
                    name: median_ratio(seconds[name], seconds["matmul x2"]) for name in names
                },
            })  # fmt: skip
    shape = {"batch": options.batch, "channels": options.channels}
    report(f"ops/{options.op}", {**shape, "rows": rows}, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
