"""Text in, text out, on top of transformers' `generate`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from i3lm.device import autocast
from i3lm.errors import GenerationError
from i3lm.models.i3 import I3Config
from i3lm.models.i3.generation_i3 import CONTEXT_OVERFLOWS, check_context, count_visible


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn.

    Args:
        max_new_tokens: Most tokens to add to the prompt; None for a stream without end.
        temperature: Divides the logits; below 1 is safer, above 1 wilder, 0 always takes the
            likeliest token.
        top_k: Draw among this many likeliest tokens only; 0 means all.
        top_p: Draw among the likeliest tokens that together have this probability; 1 means all.
        seed: Seed of the draws.
        context_overflow: What to do past the context of a model with learned positions:
            ``error``, ``window`` or ``shift`` (see `I3GenerationMixin`). With None, the model's
            own setting holds for new tokens, and a prompt must fit.
    """

    max_new_tokens: int | None = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    context_overflow: str | None = None

    def __post_init__(self) -> None:
        new = self.max_new_tokens
        overflow = self.context_overflow
        rules = (
            ("max_new_tokens", new is None or new >= 1, "must be at least 1"),
            ("temperature", self.temperature >= 0, "must be 0 (always the likeliest) or above"),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or above"),
            ("seed", 0 <= self.seed < 2**32, "must be between 0 and 2^32 - 1"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            (
                "context_overflow",
                overflow is None or overflow in CONTEXT_OVERFLOWS,
                f"must be one of {', '.join(CONTEXT_OVERFLOWS)}",
            ),
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
        if self.context_overflow is not None:
            settings["context_overflow"] = self.context_overflow
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            **settings,
        )

    def warpers(self) -> LogitsProcessorList:
        """What changes the logits (1, V) before a draw, as in `generate`."""
        warpers = LogitsProcessorList()
        if self.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature > 0 and self.top_k > 0:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.temperature > 0 and self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


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
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str = "fp32"
    ) -> None:
        self.model, self.tokenizer, self.precision = model, tokenizer, precision

    def encode_prompt(self, prompt: str, context_overflow: str | None = None) -> list[int]:
        """The ids that the model reads for a prompt, which it takes as the start of a document.

        Args:
            prompt: The text.
            context_overflow: ``window`` and ``shift`` allow more tokens than the context has.

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
        limit = self._context_limit()
        if limit is not None and len(ids) > limit and context_overflow in (None, "error"):
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

        Args:
            prompt: The text to continue.
            options: How to draw.
            streamer: Receives the tokens as they come.

        Raises:
            GenerationError: The prompt cannot be read, or does not fit with policy ``error``.
        """
        if options.max_new_tokens is None:
            raise GenerationError("max_new_tokens (None) has no end: give a number, or use stream")
        ids = self._encode_and_check(prompt, options)
        started = time.perf_counter()
        output = self.generate_ids(ids, options, streamer=streamer)
        seconds = time.perf_counter() - started
        new = output.sequences[0, len(ids) :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Completion(prompt, text, len(ids), len(new), seconds)

    @torch.inference_mode()
    def generate_ids(
        self,
        ids: list[int],
        options: SamplingOptions,
        cache: Cache | None = None,
        streamer: BaseStreamer | None = None,
    ) -> GenerateDecoderOnlyOutput:
        """Continues ids by `generate`, and gives its sequences (1, T) and its cache.

        Args:
            ids: The ids to continue, those that the cache covers included.
            options: How to draw.
            cache: The model's state after some of the ids, or None.
            streamer: Receives the tokens as they come.
        """
        inputs = torch.tensor([ids], device=self.model.device)
        settings = options.generation_config(self.tokenizer)
        settings.return_dict_in_generate = True
        if isinstance(self.model.config, I3Config):
            settings.cache_implementation = "dynamic"  # whatever the checkpoint asks for
        was_training = self.model.training
        self.model.eval()
        try:
            # The draws must not disturb a training run's own random state.
            with torch.random.fork_rng(), self._autocast():
                torch.manual_seed(options.seed)
                output = self.model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    cache=cache,
                    generation_config=settings,
                    streamer=streamer,
                )
        finally:
            self.model.train(was_training)
        assert isinstance(output, GenerateDecoderOnlyOutput)
        return output

    @torch.inference_mode()
    def stream(self, prompt: str, options: SamplingOptions) -> Iterator[str]:
        """Yields the text that `complete` gives, one piece per token, as the tokens come.

        With `max_new_tokens` None it ends at an end token only. A token costs the same time
        and memory however many came before (`generate` copies the whole text for each), where
        positions do not end and attention slides, and with learned positions by ``shift`` and
        ``window``. A piece is empty while a character is unfinished; one that the last token
        leaves unfinished is left out.

        Args:
            prompt: The text to continue.
            options: How to draw.

        Raises:
            GenerationError: As for `complete`.
        """
        ids = self._encode_and_check(prompt, options)
        decoder = DecodeStream(skip_special_tokens=True)
        was_training = self.model.training
        self.model.eval()
        try:
            for token in self._draw_tokens(ids, options):
                yield decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        finally:
            self.model.train(was_training)

    def _draw_tokens(self, ids: list[int], options: SamplingOptions) -> Iterator[int]:
        limit = getattr(self.model.config, "position_limit", None)
        overflow = self._context_overflow(options)
        warpers, device = options.warpers(), self.model.device
        random = torch.Generator(device).manual_seed(options.seed)
        ends = self.tokenizer.eos_token_id
        recent = deque(ids, maxlen=limit or 0)  # what may have to be read again
        unread = torch.tensor([ids], device=device)
        length, dropped, drawn = len(ids), 0, 0
        cache: Cache | None = None
        while options.max_new_tokens is None or drawn < options.max_new_tokens:
            if limit is not None and length > limit:
                visible = count_visible(length, limit, overflow)
                if length - visible > dropped:
                    unread = torch.tensor([list(recent)[-visible:]], device=device)
                    dropped, cache = length - visible, None
            keeps = limit is None or length <= limit or overflow == "shift"
            with self._autocast():
                output = self.model(unread, cache=cache, use_cache=keeps, logits_to_keep=1)
            cache = output.cache
            logits = warpers(unread, output.logits[:, -1].float())
            if options.temperature > 0:
                unread = torch.multinomial(logits.softmax(dim=-1), 1, generator=random)
            else:
                unread = logits.argmax(dim=-1, keepdim=True)
            token = int(unread)
            length, drawn = length + 1, drawn + 1
            recent.append(token)
            yield token
            if token == ends:
                return

    def _autocast(self) -> AbstractContextManager:
        return autocast(self.model.device, self.precision)

    def _context_limit(self) -> int | None:
        """The most tokens that have a position, or None where positions do not end."""
        config = self.model.config
        if isinstance(config, I3Config):
            return config.position_limit
        return getattr(config, "max_position_embeddings", None)

    def _context_overflow(self, options: SamplingOptions) -> str:
        own = getattr(self.model.generation_config, "context_overflow", None)
        return options.context_overflow or own or "window"

    def _encode_and_check(self, prompt: str, options: SamplingOptions) -> list[int]:
        """The ids of a prompt that fits, together with the tokens asked for."""
        given, kind = options.context_overflow, self.model.config.model_type
        if kind != "i3" and given in ("window", "shift"):
            raise GenerationError(
                f"context_overflow ({given}) is for models of the i3 family, not {kind}: leave "
                "it out"
            )
        ids, limit = self.encode_prompt(prompt, given), self._context_limit()
        if limit is None or self._context_overflow(options) != "error":
            return ids
        if options.max_new_tokens is None:
            raise GenerationError(
                f"a stream without end goes past this model's context of {limit}: give "
                "max_new_tokens, or set context_overflow to window or shift"
            )
        try:
            check_context(len(ids), options.max_new_tokens, limit)
        except ValueError as error:
            raise GenerationError(str(error)) from error
        return ids
