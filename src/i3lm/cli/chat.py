"""``i3lm chat``"""

from __future__ import annotations


def chat(
    checkpoint: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> None:
    """Talks to a model: each line you type is continued. Type quit or exit to stop.

    A base model continues text and does not know questions from answers; what it writes begins
    with your own words.

    Args:
        checkpoint: A checkpoint folder, or the output folder of a run (its best model).
        max_new_tokens: Most tokens per turn.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw among this many likeliest tokens; 0 means all.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Seed of the first turn's draws; each turn adds one.
        device: cpu, cuda, mps, or auto for the fastest there is.
        precision: fp32, bf16 or auto.
    """
    import dataclasses
    import io
    import sys

    from transformers import TextStreamer

    from i3lm.device import resolve_device, resolve_precision
    from i3lm.errors import GenerationError
    from i3lm.inference import SamplingOptions, TextGenerator
    from i3lm.inference.loading import load_checkpoint

    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed)
    where = resolve_device(device)
    model, tokenizer = load_checkpoint(checkpoint, where)
    generator = TextGenerator(model, tokenizer, resolve_precision(precision, where))
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not UTF-8 are then refused as a prompt, and the talk goes on.
        sys.stdin.reconfigure(errors="surrogateescape")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print("Type quit or exit to stop.")
    while True:
        try:
            line = input("\nUser: ").strip()
        except EOFError:
            print()
            return
        if line.lower() in ("quit", "exit"):
            return
        if not line:
            continue
        try:
            generator.encode_prompt(line)
        except GenerationError as error:
            print(error, file=sys.stderr)
            continue
        print(f"\ni3: {line}", end="", flush=True)
        completion = generator.complete(line, options, streamer)
        print(
            f"[{completion.new_tokens} tokens in {completion.seconds:.2f} s, "
            f"{completion.tokens_per_second:.1f} tokens/s]"
        )
        options = dataclasses.replace(options, seed=options.seed + 1)
