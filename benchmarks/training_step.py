"""Times whole training steps of a preset, beside the original and beside a peer.

    python benchmarks/training_step.py --preset i3-80m --original PATH_OF_OPEN_I3 --peer gpt2

A step is forward, loss, backward, clipping and AdamW. Each contestant has a process, and they take
turns of one step that is not timed and one that is: the first step after a pause takes some 15 %
longer, and training has no pauses. Before timing, losses and gradient norms of two of our steps are
held against those of the same weights with the plainest implementation of every op and the plain
loss. The original runs as released, which is float32, and for bf16 once more under autocast; the
peer runs in our precision and, as our training does, keeps freed memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import (
    median_ratio,
    peak_resident_mib,
    report,
    summary,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config

from i3lm.device import keep_freed_memory
from i3lm.ops.dispatch import use_implementation
from i3lm.ops.self_check import CHECKS
from i3lm.ops.speed import measure_matmul_flops
from i3lm.planning import count_parameters, training_flops_per_token
from i3lm.presets import load_preset
from i3lm.training.gradient_checkpointing import checkpoint_gradients
from i3lm.training.optimizers import (
    STATE_DTYPES,
    OnePassAdamW,
    leave_gradients_small,
    make_optimizer,
)


class Step:
    """One contestant: a model, its optimizer, and a fixed batch.

    Args:
        model: The model in training mode.
        loss: Gives the loss of a batch.
        precision: ``fp32`` or ``bf16`` (autocast).
        optimizer: Its optimizer.
    """

    def __init__(self, model, loss: Callable, precision: str, optimizer) -> None:
        self.model, self.loss, self.precision = model, loss, precision
        self.optimizer = optimizer
        self.device = next(model.parameters()).device.type

    def __call__(self) -> tuple[float, float]:
        """Runs a step; gives its loss and gradient norm."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss()
        loss.backward()
        if isinstance(self.optimizer, OnePassAdamW):
            norm = self.optimizer.clip_grad_norm(1.0)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


def batch_of(config, options) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed random batch: ids and the ids one step ahead, (B, T)."""
    draw = torch.Generator().manual_seed(1)
    shape = (options.batch, options.context + 1)
    rows = torch.randint(0, config.vocab_size, shape, generator=draw).to(options.device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def ours(options) -> Step:
    """Our step, as the trainer runs it."""
    torch.manual_seed(0)
    config = load_preset(options.preset).config(max_position_embeddings=options.context)
    model = AutoModelForCausalLM.from_config(config).to(options.device).train()
    if options.gradient_checkpointing:
        checkpoint_gradients(model, True)
    optimizer = make_optimizer(
        "adamw", model, learning_rate=3e-4, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8,
        fused=True, state=options.optimizer_state,
    )  # fmt: skip
    if isinstance(optimizer, OnePassAdamW):
        leave_gradients_small(model)
    ids, labels = batch_of(config, options)
    return Step(
        model,
        lambda: model(input_ids=ids, shift_labels=labels, skip_logits=True, use_cache=False).loss,
        options.precision,
        optimizer,
    )


def check(options) -> None:
    """Refuses to time a step whose loss or gradient norm is wrong."""
    fast = ours(options)
    plain = ours(options)
    ids, labels = batch_of(fast.model.config, options)

    def plain_loss() -> torch.Tensor:
        logits = plain.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    plain.loss = plain_loss
    with use_implementation(**{name: check.op.names[-1] for name, check in CHECKS.items()}):
        expected = plain(), plain()  # the second tells of the first one's update
    got = fast(), fast()
    tolerance = 2e-2 if options.precision == "bf16" else 1e-4
    for names in zip(got, expected, strict=True):
        for what, a, b in zip(("loss", "gradient norm"), *names, strict=True):
            if not abs(a - b) <= tolerance * abs(b):
                raise SystemExit(f"{what} {a} differs from the reference's {b}: not timed")
    for step, (loss, norm) in enumerate(got):
        print(f"checked step {step + 1}: loss {loss:.5f} (reference {expected[step][0]:.5f}), "
              f"gradient norm {norm:.5f} ({expected[step][1]:.5f})", flush=True)  # fmt: skip


def load_original(checkout: str, config) -> torch.nn.Module:
    """The model of open-i3 itself, from a checkout, in its own code, shaped as a configuration."""
    kind = "80m" if config.recurrence == "state_space" else "200m"
    path = Path(checkout) / "src" / "text-generators" / kind / "train.py"
    # Its scripts import a tracker at the top that training steps do not use.
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    spec = importlib.util.spec_from_file_location(f"open_i3_{kind}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    shape = {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads, "max_seq_len": config.max_position_embeddings,
    }  # fmt: skip
    if kind == "80m":
        return module.i3Model(**shape, d_state=config.state_size)
    return module.i3HybridModel(**shape)


def original(options) -> Step:
    """The step of open-i3 itself."""
    config = load_preset(options.preset).config(max_position_embeddings=options.context)
    model = load_original(options.original, config).to(options.device).train()
    ids, labels = batch_of(config, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    return Step(model, lambda: model(ids, labels)[1], options.precision, optimizer)


def peer(options) -> Step:
    """A GPT-2 of transformers with equal width, depth, heads and vocabulary."""
    config = load_preset(options.preset).config(max_position_embeddings=options.context)
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=config.vocab_size, n_embd=config.hidden_size, n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads, n_positions=options.context, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    print(f"peer: GPT-2 with {count_parameters(shape):,} parameters")
    model = AutoModelForCausalLM.from_config(shape).to(options.device).train()
    ids, labels = batch_of(config, options)

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    return Step(model, loss, options.precision, optimizer)


CONTESTANTS = {"ours": ours, "original": original, "original-bf16": original, "peer": peer}


class Contestant:
    """A process that runs steps when told to, so that allocator and threads are its own."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()  # built, and warm

    def __call__(self) -> float:
        """Runs two steps in its process; gives the seconds of the second."""
        return float(self._ask("step"))

    def finish(self) -> dict[str, float]:
        """Ends the process; gives its peak memory and profile."""
        figures = json.loads(self._ask("finish"))
        self.process.wait()
        return figures

    def _ask(self, what: str) -> str:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):  # libraries print lines of their own
                return line.removeprefix("answer ")
        raise SystemExit("a contestant ended early; its message stands above")


def contest(name: str, options) -> None:
    """Answers questions about one contestant on standard input, in a process of its own."""
    if name in ("ours", "peer"):
        keep_freed_memory()  # as `i3lm train` does for every model
    if name == "original":
        options.precision = "fp32"  # as released
    step = CONTESTANTS[name](options)
    for _ in range(2):
        step()
    print("answer ready", flush=True)
    for question in sys.stdin:
        if question.strip() == "step":
            step()
            began = time.perf_counter()
            step()  # it ends with reading the loss, and so does the device
            print("answer", time.perf_counter() - began, flush=True)
            continue
        if options.device == "cuda":
            figures = {"peak_mib": round(torch.cuda.max_memory_allocated() / 2**20)}
        else:
            figures = {"peak_mib": round(peak_resident_mib()), "matmul_share": matmul_share(step)}
        print("answer", json.dumps(figures), flush=True)
        return


def matmul_share(step: Step) -> float:
    """Share of a step's processor time that matrix products take, attention's included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    events = recorded.key_averages()
    matmul = (
        "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product",
        "mkldnn::_linear_pointwise", "_Product", "_Narrowed",  # the last two are i3lm.ops.linear's
    )  # fmt: skip
    total = sum(event.self_cpu_time_total for event in events)
    return round(sum(e.self_cpu_time_total for e in events if e.key.startswith(matmul)) / total, 3)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="i3-80m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--original", help="path of a checkout of open-i3")
    parser.add_argument(
        "--released-only", action="store_true",
        help="leave the original under autocast out (each needs 12 GB for i3-200m at 512)",
    )  # fmt: skip
    parser.add_argument("--peer", choices=("gpt2",))
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="ours keeps layer inputs alone"
    )
    parser.add_argument(
        "--optimizer-state", choices=tuple(STATE_DTYPES), default="fp32",
        help="what ours keeps the averages of AdamW in",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="append the JSON line to this file")
    parser.add_argument("--only", choices=("check", *CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.only == "check":
        check(options)
        return 0
    if options.only:
        contest(options.only, options)
        return 0

    # In a process of its own, whose memory is free again when contestants run.
    if subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", "check"]).returncode:
        return 1
    keep_freed_memory()  # for the ceiling below
    names = ["ours"]
    if options.original:
        names += ["original"]
        if options.precision == "bf16" and not options.released_only:
            names += ["original-bf16"]
    names += ["peer"] if options.peer else []
    contestants = {name: Contestant(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            seconds[name].append(contestants[name]())
    tokens = options.batch * options.context
    config = load_preset(options.preset).config(max_position_embeddings=options.context)
    results = {}
    for name in names:
        figures = summary(seconds[name])
        figures["tokens_per_second"] = round(1e3 * tokens / figures["median_ms"])
        if name != "ours":
            figures["ours_is_times_faster"] = median_ratio(seconds[name], seconds["ours"])
        results[name] = figures | contestants[name].finish()
    # With the machine at rest: the ceiling is what the products of the step are held against.
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    ceiling = measure_matmul_flops(torch.device(options.device), dtype)
    flops = training_flops_per_token(config, options.context)
    rate = flops * results["ours"]["tokens_per_second"]
    results["ours"]["share_of_measured_matmul_peak"] = round(rate / ceiling, 3)
    for name, figures in results.items():
        print(f"{name:>13}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    setting = {
        key: vars(options)[key]
        for key in (
            "preset", "batch", "context", "precision", "device", "gradient_checkpointing",
            "optimizer_state",
        )
    }  # fmt: skip
    report("training_step", {**setting, "results": results}, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
