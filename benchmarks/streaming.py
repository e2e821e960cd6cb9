"""Times the tokens of one endless text, and the memory, for a model whose positions do not end.

    python benchmarks/streaming.py

Before timing, tokens read one by one are held against one pass over the whole text. At every mark
the long stream takes turns with a fresh one at its 100th token, so that the machine's moods hit
both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from measuring import report

from i3lm import I3Config, I3ForCausalLM, SamplingOptions, TextGenerator
from i3lm.planning import count_parameters
from i3lm.tokenizers import train_tokenizer

PROMPT = "once upon a time"


def make_generator(options: argparse.Namespace) -> TextGenerator:
    """A model with random weights, which never ends a document by itself."""
    tokenizer = train_tokenizer("character", ["abcdefghijklmnopqrstuvwxyz ,.!?"])
    tokenizer.eos_token = None
    slides = "sliding_attention" in options.layer_types
    torch.manual_seed(0)
    config = I3Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        layer_types=options.layer_types,
        num_attention_heads=options.hidden_size // 32,
        max_position_embeddings=options.window,
        position_embedding_type="rope" if slides else "none",
        sliding_window=options.window if slides else None,
        initialization="original",
    )
    return TextGenerator(I3ForCausalLM(config).eval(), tokenizer)


@torch.no_grad()
def check(model: I3ForCausalLM, tokens: int) -> None:
    """Refuses to time a model that decodes other logits than one pass over the text gives."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    whole, cache, differences = model(ids).logits, None, []
    for t in range(tokens):
        output = model(ids[:, t : t + 1], cache=cache)
        cache = output.cache
        differences.append((output.logits[:, 0] - whole[:, t]).abs().max())
    worst = torch.stack(differences).max().item()  # NaN if one is
    if not worst <= 1e-4:
        raise SystemExit(f"decoded logits differ by {worst} from those of one pass: not timed")
    print(f"checked: {tokens} tokens decode as one pass reads them, within {worst:.1e}")


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("memory is read from /proc, which this system does not have")


def start(generator: TextGenerator) -> Iterator[str]:
    """A stream without end, one piece per token."""
    return generator.stream(PROMPT, SamplingOptions(None, temperature=1.0, top_k=0))


def skip(stream: Iterator[str], tokens: int) -> None:
    """Draws some tokens."""
    for _ in islice(stream, tokens):
        pass


def seconds_of(stream: Iterator[str]) -> float:
    """How long the next token takes."""
    began = time.perf_counter()
    next(stream)
    return time.perf_counter() - began


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer-types", default="2 x linear_attention, sliding_attention")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--marks", type=int, nargs="+", default=[100, 5_000, 50_000, 100_000])
    parser.add_argument("--counted", type=int, default=100, help="tokens timed at a mark")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="append the JSON line to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    generator = make_generator(options)
    check(generator.model, 4 * options.window)
    stream, position, rows = start(generator), 0, []
    for mark in options.marks:
        skip(stream, mark - options.counted // 2 - position)
        fresh = start(generator)
        skip(fresh, 100 - options.counted // 2)
        turns = [(seconds_of(stream), seconds_of(fresh)) for _ in range(options.counted)]
        position = mark + options.counted - options.counted // 2
        late, early = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
        row = {
            "position": mark,
            "median_ms": round(1e3 * late, 4),
            "token_100_median_ms": round(1e3 * early, 4),
            "ratio": round(late / early, 3),
            "resident_mib": round(resident_mib(), 1),
        }
        rows.append(row)
        print(
            f"token {mark:>9,}: {row['median_ms']:.3f} ms, {row['ratio']:.3f} times the 100th of "
            f"a fresh stream, {row['resident_mib']:.1f} MiB resident"
        )
    names = ("layer_types", "hidden_size", "window", "marks", "counted")
    setting = {name: vars(options)[name] for name in names}
    parameters = count_parameters(generator.model.config)
    report("streaming", {**setting, "parameters": parameters, "tokens": rows}, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
