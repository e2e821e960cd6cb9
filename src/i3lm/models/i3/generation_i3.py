"""What an i3 model does in `generate`: its cache, and going on where learned positions end."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin

from i3lm.models.i3.cache_i3 import I3Cache, I3StaticCache
from i3lm.models.i3.configuration_i3 import I3Config
from i3lm.models.i3.masks_i3 import causal_masks, padding_mask

CONTEXT_OVERFLOWS = ("error", "window", "shift")


def count_visible(length: int, limit: int, overflow: str) -> int:
    """How many of a text's last tokens predict the next one.

    ``window``: as many as fit. ``shift``: each time the context is full, its oldest half is
    dropped, so that only every half context a piece has to be read again. What is dropped
    depends on the length alone, so a text cut into pieces goes on as it does whole.

    Args:
        length: Tokens of the text.
        limit: Tokens that have a position.
        overflow: ``window`` or ``shift``.
    """
    if length <= limit:
        return length
    if overflow == "window":
        return limit
    half = (limit + 1) // 2
    drops = -(-(length - limit) // half)  # rounded up
    return length - drops * half


def check_context(prompt: int, new: int, limit: int) -> None:
    """Raises a ValueError where a prompt and new tokens go past the context (policy ``error``)."""
    if prompt + new > limit:
        raise ValueError(
            f"the prompt has {prompt} tokens and {new} more are asked for, but this model's "
            f"context is {limit}: shorten the prompt, ask for fewer, or set context_overflow to "
            "window or shift"
        )


class I3GenerationMixin(GenerationMixin):
    """transformers' `generate`, with one more setting: ``context_overflow``.

    It says what to do when learned positions run out, and is a field of the model's
    `GenerationConfig`, saved with it:

    - ``error``: refuse before computing anything, where the prompt and the tokens asked for do
      not fit.
    - ``window`` (the default): each further token is computed from the last
      `max_position_embeddings` tokens, from position 0, without cache, as the original does.
    - ``shift``: when the context is full, drop its oldest half, read the rest once more, and
      decode on with the cache.

    Without learned positions there is no end, and the setting is not looked at. A static cache
    (``cache_implementation``) keeps one context: what goes past it is refused.
    """

    config: I3Config

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        given = kwargs.pop("context_overflow", None)
        settings, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        overflow = given or getattr(settings, "context_overflow", None) or "window"
        if overflow not in CONTEXT_OVERFLOWS:
            raise ValueError(
                f"context_overflow ({overflow!r}) must be one of {', '.join(CONTEXT_OVERFLOWS)}"
            )
        settings.context_overflow = overflow
        return settings, model_kwargs

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(
            generation_config, input_ids_length, has_default_max_length
        )
        # Kept for the check below, which knows the padding but no longer this length.
        generation_config._new_tokens = generation_config.max_length - input_ids_length

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Checks that the text fits, and hands `generate` our cache in place of a plain one."""
        if model_kwargs["position_ids"].shape[1] == 0:
            raise ValueError("the prompt is empty: give at least one token")
        limit = self.config.position_limit
        if limit is not None and generation_config.context_overflow == "error":
            prompt = int(model_kwargs["position_ids"].max()) + 1
            check_context(prompt, generation_config._new_tokens, limit)
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation ({asked!r}) cannot keep the states of recurrent layers: "
                "leave it out, or give 'static'"
            )
        model_kwargs["context_overflow"] = generation_config.context_overflow
        length = model_kwargs["position_ids"].shape[1] + generation_config._new_tokens
        if generation_config.use_cache and model_kwargs.get("cache") is None:
            if asked == "static":
                room = self._static_room(length, generation_config.max_cache_len)
                model_kwargs["cache"] = I3StaticCache(self.config, room, self.device)
            else:
                model_kwargs["cache"] = I3Cache(self.config)
        cache = model_kwargs.get("cache")
        if asked == "dynamic" or (asked == "static" and isinstance(cache, I3StaticCache)):
            generation_config.cache_implementation = None  # what was made or given is it
        if isinstance(cache, I3StaticCache):
            cache.check_room(length)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )

    def _static_room(self, length: int, least: int | None) -> int:
        """The tokens that a static cache has room for, so that most calls agree in it.

        That is the context where there is one, and else a power of two: what was compiled for
        one size serves no other.
        """
        wanted = max(length, least or 0, 64)
        return self.config.position_limit or 1 << (wanted - 1).bit_length()

    @staticmethod
    def create_masks_for_generate(
        config: I3Config,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """What tokens may see and which are padding, for steps that are compiled.

        Returns:
            What `causal_masks` gives, and as ``linear_attention`` what `padding_mask` does.
        """
        T, is_prompt = inputs_embeds.shape[1], bool(is_first_iteration)
        return {
            **causal_masks(config, inputs_embeds, attention_mask, cache),
            # A token that was just drawn is no padding; one of a prompt may be.
            "linear_attention": padding_mask(attention_mask, T) if T > 1 or is_prompt else None,
        }

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs
    ) -> Any:
        if generation_config.prefill_chunk_size is not None:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    f"prefill_chunk_size ({generation_config.prefill_chunk_size}) cuts token ids "
                    "only: leave it out with inputs_embeds"
                )
            limit = self.config.position_limit
            # The cache is filled for the first time: its tensors belong to no graph.
            generation_config = copy.copy(generation_config)
            generation_config.disable_compile = True
            if limit is not None and model_kwargs["position_ids"].shape[1] > limit:
                # What is read past the context is no more than the context, at once.
                generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        context_overflow: str = "window",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Gives the inputs of the next step of `generate`."""
        limit = self.config.position_limit
        positions = kwargs.get("position_ids")
        columns = (input_ids if positions is None else positions).shape[1]
        lengths = [columns]
        if limit is not None and columns > limit and attention_mask is not None:
            lengths = attention_mask.sum(dim=1).tolist()  # padding takes no position
        if limit is None or max(lengths) <= limit:
            return super().prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_sequence_length,
                cache=cache,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **kwargs,
            )

        visible = [count_visible(length, limit, context_overflow) for length in lengths]
        kwargs.pop("position_ids", None)  # they count from the start of what is visible
        if context_overflow != "shift" or not kwargs.get("use_cache", True):
            cache = None
        kwargs["use_cache"] = cache is not None
        held = cache.get_seq_length() if cache is not None else 0
        # Every token that is decoded leaves the start of its row where it was, or drops a half.
        goes_on = not is_first_iteration and all(
            now == count_visible(length - 1, limit, context_overflow) + 1
            for now, length in zip(visible, lengths, strict=True)
        )
        if held and goes_on:
            width, embeds = held + 1, None
            input_ids = input_ids[:, -1:]
        else:
            width = max(visible)
            input_ids, embeds = self._last(input_ids, inputs_embeds, columns, width)
            if cache is not None:
                cache.reset()
        return super().prepare_inputs_for_generation(
            input_ids,
            cache=cache,
            attention_mask=_mask_of_last(visible, width, input_ids.device),
            inputs_embeds=embeds,
            is_first_iteration=embeds is not None,
            **kwargs,
        )

    def _last(
        self, input_ids: Tensor, inputs_embeds: Tensor | None, columns: int, width: int
    ) -> tuple[Tensor, Tensor | None]:
        """The last `width` of all `columns` tokens, as ids, or as embeddings where they began."""
        if inputs_embeds is not None:
            new = columns - inputs_embeds.shape[1]
            generated = self.get_input_embeddings()(input_ids[:, input_ids.shape[1] - new :])
            return input_ids, torch.cat([inputs_embeds, generated], dim=1)[:, -width:]
        if input_ids.shape[1] < width:
            raise ValueError(
                f"past the context of {self.config.max_position_embeddings} tokens, the last "
                f"{width} are read again, and only {input_ids.shape[1]} were given: pass the "
                "whole text as input_ids, with its cache"
            )
        return input_ids[:, -width:], None


def _mask_of_last(visible: list[int], width: int, device: torch.device) -> Tensor | None:
    """True at the last visible columns of every row, (B, width); None where that is all."""
    if min(visible) == width:
        return None
    starts = width - torch.tensor(visible, device=device)
    return (torch.arange(width, device=device) >= starts[:, None]).long()
