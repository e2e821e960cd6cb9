"""Text in, text out, on top of transformers' `generate`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from i3lm.errors import GenerationError


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn.

    Args:
        max_new_tokens: Most tokens to add to the prompt.
        temperature: Divides the logits; below 1 is safer, above 1 wilder, 0 always takes the
            likeliest token.
        top_k: Draw among this many likeliest tokens only; 0 means all.
        top_p: Draw among the likeliest tokens that together have this probability; 1 means all.
        seed: Seed of the draws.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            ("temperature", self.temperature >= 0, "must be 0 (always the likeliest) or above"),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or above"),
            ("seed", 0 <= self.seed < 2**32, "must be between 0 and 2^32 - 1"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise GenerationError(f"{name} ({getattr(self, name)}) {rule}")

    def generation_config(self, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """The same settings in the form that `generate` takes."""
        settings: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            settings = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
            }
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            **settings,
        )


@dataclass(frozen=True)
class Completion:
    """A prompt, what the model added, and how long that took."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, the reading of the prompt included."""
        return self.new_tokens / max(self.seconds, 1e-9)


class TextGenerator:
    """A model and its tokenizer, ready to continue prompts.

    Args:
        model: A causal language model on its device.
        tokenizer: The tokenizer it was trained with.
        precision: ``fp32`` or ``bf16`` (autocast).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str = "fp32"
    ) -> None:
        self.model, self.tokenizer, self.precision = model, tokenizer, precision

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids that the model reads for a prompt, which it takes as the start of a document.

        Raises:
            GenerationError: The prompt has no tokens, more than the model's context, or bytes
                that are not UTF-8.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise GenerationError(
                f"the prompt is not UTF-8 text (character {error.start + 1} cannot be encoded): "
                "set the terminal to UTF-8, or leave that character out"
            ) from error
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if self.tokenizer.eos_token_id is not None:
            ids = [self.tokenizer.eos_token_id, *ids]  # as between documents in training
        if not ids:
            raise GenerationError("the prompt is empty: give at least one character")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            raise GenerationError(
                f"the prompt has {len(ids)} tokens, and this model's context is {limit}: shorten "
                "the prompt"
            )
        return ids

    @torch.inference_mode()
    def complete(
        self, prompt: str, options: SamplingOptions, streamer: BaseStreamer | None = None
    ) -> Completion:
        """Continues a prompt.

        Past the model's context length, its window slides: each further token is computed from
        the last tokens that fit.

        Args:
            prompt: The text to continue.
            options: How to draw.
            streamer: Receives the tokens as they come.
        """
        ids = self.encode_prompt(prompt)
        device = self.model.device
        inputs = torch.tensor([ids], device=device)
        was_training = self.model.training
        self.model.eval()
        autocast = torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else None
        started = time.perf_counter()
        try:
            # The draws must not disturb a training run's own random state.
            with torch.random.fork_rng(), autocast or nullcontext():
                torch.manual_seed(options.seed)
                output = self.model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=options.generation_config(self.tokenizer),
                    streamer=streamer,
                )
        finally:
            self.model.train(was_training)
        seconds = time.perf_counter() - started
        new = output[0, len(ids) :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Completion(prompt, text, len(ids), len(new), seconds)
