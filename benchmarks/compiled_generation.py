"""Times `generate` with a cache that grows against steps that are compiled on a static one.

    python benchmarks/compiled_generation.py --device cuda --preset i3-200m

On a CUDA device the compiled step is a CUDA graph. Both begin with the same prompt and take turns,
one whole greedy text each; what is compiled is compiled before. Before timing, the logits of the
first two tokens, of the prompt and of a step, are held against each other.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from measuring import median_ratio, report, summary, time_alternating
from transformers import AutoModelForCausalLM, CompileConfig

from i3lm.presets import load_preset


def check(growing: Callable, compiled: Callable, tolerance: float) -> None:
    """Refuses to time steps whose logits are wrong."""
    outputs = [
        run(new=2, output_logits=True, return_dict_in_generate=True) for run in (growing, compiled)
    ]
    for name, a, b in zip(("prompt", "step"), *(o.logits for o in outputs), strict=True):
        difference = ((a - b).abs().max() / a.abs().max().clamp_min(1)).item()
        print(f"checked: the logits of a {name} differ by {difference:.1e}")
        if not difference <= tolerance:
            raise SystemExit(f"more than {tolerance}: not timed")


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="i3-80m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are generated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", help="append the JSON line to this file")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = load_preset(options.preset).config(
        max_position_embeddings=options.context + options.new
    )
    models = {"fp32": AutoModelForCausalLM.from_config(config).to(options.device).eval()}
    models["bf16"] = copy.deepcopy(models["fp32"]).bfloat16()
    shape = (options.batch, options.context)
    ids = torch.randint(0, config.vocab_size, shape, device=options.device)
    mask = torch.ones_like(ids)

    runs: dict[str, Callable] = {}
    for precision, model in models.items():
        for name in ("growing", "compiled"):
            changes = {}
            if name == "compiled":
                compiling = CompileConfig(fullgraph=True)  # mode "reduce-overhead"
                # By itself `generate` compiles on accelerators only.
                compiling._compile_all_devices = options.device == "cpu"
                changes = {"cache_implementation": "static", "compile_config": compiling}

            def run(model=model, changes=changes, new=options.new, **more):
                return model.generate(
                    ids, attention_mask=mask, do_sample=False, pad_token_id=0, eos_token_id=None,
                    max_new_tokens=new, **changes, **more,
                )  # fmt: skip

            runs[f"{precision} {name}"] = run
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 5e-2)):
        check(runs[f"{precision} growing"], runs[f"{precision} compiled"], tolerance)
    seconds = time_alternating(runs, options.repeats)
    results = {}
    for name in runs:
        figures = summary(seconds[name])
        tokens = options.batch * options.new
        figures["tokens_per_second"] = round(1e3 * tokens / figures["median_ms"], 1)
        if name.endswith("compiled"):
            other = name.replace("compiled", "growing")
            figures["times_the_growing"] = median_ratio(seconds[other], seconds[name])
        results[name] = figures
        print(f"{name:>13}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    setting = {key: vars(options)[key] for key in ("preset", "device", "batch", "context", "new")}
    report("compiled_generation", {**setting, "results": results}, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
