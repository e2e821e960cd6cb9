"""Times the next token of one sequence, beside the original, and against the speed of memory.

    python benchmarks/decoding.py --preset i3-80m --original PATH_OF_OPEN_I3

Each contestant has read `--context` tokens and then gives one token after the other. The original
reads its whole window for each, as its `generate` does. They take turns in one process, of one
token that is not counted and one that is, since one token follows the other in use. Before timing,
our logits of a cached step are held against those of a full pass.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from measuring import median_ratio, report, summary, time_alternating
from training_step import load_original
from transformers import AutoModelForCausalLM

from i3lm.device import empty_in_large_pages
from i3lm.inference.int8_linear import use_int8_products
from i3lm.inference.loading import hold_weights_in_bf16, hold_weights_together
from i3lm.layers import Linear
from i3lm.ops.decoding_step import DECODING_STEP
from i3lm.ops.dispatch import use_implementation
from i3lm.presets import load_preset


class Decoding:
    """Our model after a prompt; every call gives one token more.

    Args:
        model: The model in evaluation mode.
        ids: The prompt, shape (1, T).
        room: Tokens after which it starts again from the prompt.
        step: The implementation of `DECODING_STEP` that is asked for, or None.
    """

    def __init__(self, model, ids: torch.Tensor, room: int, step: str | None) -> None:
        self.model, self.ids, self.room = model, ids, room
        asking = partial(use_implementation, decoding_step=step)
        self.asked: Callable = nullcontext if step is None else asking
        self.left = 0

    @torch.inference_mode()
    def __call__(self) -> None:
        """Reads one token and draws the next greedily."""
        if self.left == 0:
            raise RuntimeError("out of room: give more --context to the preset")
        with self.asked():
            output = self.model(self.token, cache=self.cache, logits_to_keep=1)
        self.token, self.left = output.logits.argmax(-1), self.left - 1

    @torch.inference_mode()
    def restart(self) -> None:
        """Reads the prompt."""
        output = self.model(self.ids, use_cache=True, logits_to_keep=1)
        self.cache, self.left = output.cache, self.room
        self.token = output.logits.argmax(-1)

    @torch.inference_mode()
    def check(self, tolerance: float) -> None:
        """Refuses to time a cached step whose logits are wrong."""
        self.restart()
        whole = self.model(torch.cat([self.ids, self.token], 1)).logits[:, -1]
        with self.asked():
            step = self.model(self.token, cache=self.cache).logits[:, -1]
        difference = ((whole - step).abs().max() / whole.abs().max().clamp_min(1)).item()
        if not difference <= tolerance:
            raise SystemExit(f"a cached step differs by {difference:.1e}: not timed")
        self.restart()


def quantized(model):
    """The model with int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(version=2), lambda module, _: isinstance(module, Linear))
    use_int8_products(model)
    return model


def matrix_bytes(model) -> int:
    """The bytes of the matrices of a model's linear maps, as they lie in memory."""
    maps = (module.stored() for module in model.modules() if isinstance(module, Linear))
    return sum(parts[0].nbytes for parts in maps if parts)


def fastest_reading(in_large_pages: bool) -> tuple[Callable, int]:
    """The fastest of three ways to touch 1 GiB, and the bytes that it moves."""
    room = empty_in_large_pages if in_large_pages else partial(torch.empty, dtype=torch.uint8)
    block, other = (room(2**30).view(torch.float32).fill_(1) for _ in range(2))
    runs: dict[str, Callable] = {
        "sum": lambda: block.sum(),
        "dot": lambda: torch.dot(block, block),
        "copy": lambda: other.copy_(block),
    }
    moved = {"sum": block.nbytes, "dot": block.nbytes, "copy": 2 * block.nbytes}
    seconds = {name: min(s) for name, s in time_alternating(runs, 5).items()}
    name = max(runs, key=lambda name: moved[name] / seconds[name])
    return runs[name], moved[name]


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="i3-80m")
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--original", help="path of a checkout of open-i3")
    parser.add_argument("--output", help="append the JSON line to this file")
    options = parser.parse_args()

    torch.manual_seed(0)
    room = 2 * options.repeats + 1  # a token that is not counted before each that is
    config = load_preset(options.preset).config(max_position_embeddings=options.context + room + 1)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, options.context))
    runs: dict[str, Callable] = {}
    models = {"fp32": model, "bf16": hold_weights_in_bf16(copy.deepcopy(model))}
    if importlib.util.find_spec("torchao"):
        models["int8"] = quantized(copy.deepcopy(model))
    for contestant in models.values():
        hold_weights_together(contestant)  # as `make_generator` does
    matrices: dict[str, int] = {}  # bytes that a token must read
    for precision, contestant in models.items():
        for step in DECODING_STEP.names:
            best = step == DECODING_STEP.names[0]  # what runs where nothing is asked for
            name = precision if best else f"{precision} by {step}"
            decoding = Decoding(contestant, ids, room, None if best else step)
            decoding.check(1e-4 if precision == "fp32" else 3e-2)
            runs[name], matrices[name] = decoding, matrix_bytes(contestant)
    if options.original:
        original = load_original(options.original, config).eval()
        for precision in ("fp32", "bf16"):

            @torch.inference_mode()
            def window(precision=precision) -> None:
                context = torch.autocast("cpu", torch.bfloat16)
                with context if precision == "bf16" else nullcontext():
                    original(ids)[0][:, -1].argmax(-1)

            runs[f"original {precision}"] = window
    # In turns with the rest: the speed of a shared machine's memory drifts by a factor of two.
    ceilings = {"bandwidth": False, "bandwidth_in_large_pages": True}
    readings = {name: fastest_reading(large) for name, large in ceilings.items()}
    touching = {name: reading for name, (reading, _) in readings.items()}
    seconds = time_alternating({**runs, **touching}, options.repeats, lead=1)
    results = {}
    for name in runs:
        figures = summary(seconds[name])
        figures["tokens_per_second"] = round(1e3 / figures["median_ms"], 1)
        for other in ("fp32", "bf16"):
            if name in models and f"original {other}" in seconds:
                ratio = median_ratio(seconds[f"original {other}"], seconds[name])
                figures[f"times_the_original_in_{other}"] = ratio
        if name in matrices:
            for ceiling, (_, moved) in readings.items():
                share = matrices[name] / moved * median_ratio(seconds[ceiling], seconds[name])
                figures[f"share_of_measured_{ceiling}"] = round(share, 3)
        if f"{name} by modules" in seconds:
            figures["times_the_modules"] = median_ratio(
                seconds[f"{name} by modules"], seconds[name]
            )
        results[name] = figures
        print(f"{name:>13}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    setting = {"preset": options.preset, "context": options.context}
    for ceiling, (_, moved) in readings.items():
        speed = moved / (summary(seconds[ceiling])["median_ms"] / 1e3)
        setting[f"{ceiling}_gb_per_second"] = round(speed / 1e9, 1)
    report("decoding", {**setting, "results": results}, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
