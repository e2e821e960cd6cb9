"""``i3lm generate``"""

from __future__ import annotations


def generate(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    context_overflow: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    json: bool = False,
) -> None:
    """Continues a prompt.

    i3lm generate runs/quickstart --prompt "Once upon a time" --temperature 0.7

    Args:
        checkpoint: A checkpoint folder, or the output folder of a run (its best model).
        prompt: The text to continue.
        max_new_tokens: Most tokens to add.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw among this many likeliest tokens; 0 means all.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Seed of the draws.
        context_overflow: Past the context of a model with learned positions: error refuses at
            once, window computes each token anew from the last that fit, shift drops the oldest
            half whenever the context is full. By default, the model's own setting (window where
            it has none), and prompts must fit.
        device: cpu, cuda (or one GPU by its number, such as cuda:1), mps, or auto for the fastest
            there is.
        precision: fp32, bf16, fp16 or auto.
        json: Print prompt, text, counts and time as one JSON object.
    """
    from i3lm.cli.running import print_json
    from i3lm.device import resolve_device, resolve_precision
    from i3lm.inference import SamplingOptions
    from i3lm.inference.loading import check_room, load_checkpoint, make_generator

    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed, context_overflow)
    where = resolve_device(device)
    model, tokenizer = load_checkpoint(checkpoint, where)
    generator = make_generator(model, tokenizer, resolve_precision(precision, where))
    check_room(model, len(generator.encode_prompt(prompt, context_overflow)), max_new_tokens)
    completion = generator.complete(prompt, options)
    if json:
        print_json({
            "prompt": prompt, "text": completion.text,
            "prompt_tokens": completion.prompt_tokens, "new_tokens": completion.new_tokens,
            "seconds": round(completion.seconds, 4),
            "tokens_per_second": round(completion.tokens_per_second, 2),
        })  # fmt: skip
        return
    print(prompt + completion.text)
