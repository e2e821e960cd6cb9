"""The causal i3 models: recurrent layers below, attention above, in any order you name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from i3lm.layers import (
    CausalSelfAttention,
    ChannelMix,
    FeedForward,
    HybridMixer,
    Linear,
    LowRankLinear,
    RotaryEmbedding,
    TimeMix,
    parameter_groups,
)
from i3lm.layers.attention import KeyValueStore, Rotation
from i3lm.layers.decoding_step import DecodingStep, Pieces, Plan, Stretch
from i3lm.layers.time_mix import TimeMixState
from i3lm.models.i3.cache_i3 import (
    FEED_FORWARD_SHIFT,
    MIXER_SHIFT,
    RECURRENCE,
    CarriedRow,
    CarriedState,
    I3Cache,
    KnowsLength,
    read_state,
    write_state,
)
from i3lm.models.i3.configuration_i3 import I3Config
from i3lm.models.i3.decoding_i3 import TokenByKernels, begin_token, next_logits
from i3lm.models.i3.generation_i3 import I3GenerationMixin
from i3lm.models.i3.initialization_i3 import initialize_original, initialize_rwkv
from i3lm.models.i3.masks_i3 import causal_masks, mask_of_layer, padding_mask
from i3lm.models.i3.packing_i3 import (
    check_reset,
    count_within_documents,
    document_starts,
    first_seen,
)
from i3lm.ops import linear, linear_cross_entropy
from i3lm.ops.decoding_step import FEW_ROWS, decoding_kernels

# Norm and module of each half of a layer; `attention` is in hybrid layers alone.
_HALVES = (
    ("mixer_norm", "mixer"),
    ("attention_norm", "attention"),
    ("feed_forward_norm", "feed_forward"),
)

# What transformers called the cache before 5.24 is taken as long as its own models take it.
_takes_old_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")

# Document starts and padding, as the recurrent ops take them.
_Marks = dict[str, Tensor | None]


class I3DecoderLayer(GradientCheckpointingLayer):
    """One layer, pre-LN: ``x + mixer(norm(x))``, maybe attention likewise, then feed-forward."""

    def __init__(self, config: I3Config, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None  # the configuration itself sets both
        assert config.intermediate_size is not None
        C, eps = config.hidden_size, config.layer_norm_eps
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.mixer_norm = nn.LayerNorm(C, eps=eps)
        if self.layer_type in ("full_attention", "sliding_attention"):
            self.mixer: nn.Module = CausalSelfAttention(
                C, config.num_attention_heads, config.low_rank
            )
        elif config.recurrence == "rwkv4":
            self.mixer = TimeMix(C)
        else:
            self.mixer = HybridMixer(C, config.state_size)
        if self.layer_type == "hybrid":
            self.attention_norm = nn.LayerNorm(C, eps=eps)
            self.attention = CausalSelfAttention(C, config.num_attention_heads, config.low_rank)
        self.feed_forward_norm = nn.LayerNorm(C, eps=eps)
        if isinstance(self.mixer, TimeMix):
            self.feed_forward: nn.Module = ChannelMix(C, config.intermediate_size)
        else:
            self.feed_forward = FeedForward(C, config.intermediate_size, config.low_rank)

    def forward(
        self,
        hidden_states: Tensor,
        causal_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cache: Cache | None = None,
        rotation: Rotation | None = None,
        first: Tensor | None = None,
        reset: Tensor | None = None,
        carried_row: CarriedRow | None = None,
        step: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Maps (B, T, C) to (B, T, C), reading and writing its states; by `step` if one is given.

        The layer is called in that case too, so that what hooks on it is told.
        """
        if step is not None:
            return step(hidden_states)
        x = hidden_states
        store = None
        if cache is not None:
            store = self._store(cache, alone=causal_mask is None and x.shape[1] > 1)
        # Gradient checkpointing takes the cache away, and leaves the carried states.
        states = cache if carried_row is None else carried_row
        marks = {"reset": reset, "mask": padding_mask}
        seen = {"mask": causal_mask, "store": store, "rotation": rotation, "first": first}
        normed = self.mixer_norm(x)
        if isinstance(self.mixer, CausalSelfAttention):
            x = x + self.mixer(normed, **seen)
        else:
            x = x + self._recur(normed, marks, states)
        if self.layer_type == "hybrid":
            x = x + self.attention(self.attention_norm(x), **seen)
        return x + self._feed_forward(self.feed_forward_norm(x), marks, states)

    def _store(self, cache: Cache, *, alone: bool) -> KeyValueStore:
        """Keeps keys and values in the cache; `alone` where the causal rule says what is seen."""
        update = partial(cache.update, layer_idx=self.layer_idx)
        if not alone or not cache.is_compileable:
            return update

        def store(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            # The cache was empty, and what lies behind the new tokens is room.
            keys, values = update(key, value)
            return keys[:, :, : key.shape[2]], values[:, :, : key.shape[2]]

        return store

    def _recur(self, x: Tensor, marks: _Marks, states: Cache | CarriedRow | None) -> Tensor:
        state: Any = read_state(states, self.layer_idx, RECURRENCE)
        if not isinstance(self.mixer, TimeMix):  # a hybrid mixer, perhaps inside an adapter
            mixed, state = self.mixer(x, state, **marks)
            write_state(states, self.layer_idx, RECURRENCE, state)
            return mixed
        if state is not None:
            shift = read_state(states, self.layer_idx, MIXER_SHIFT)
            state = None if shift is None else TimeMixState(shift, state)
        mixed, state = self.mixer(x, state, **marks)
        write_state(states, self.layer_idx, RECURRENCE, state.sums)
        write_state(states, self.layer_idx, MIXER_SHIFT, state.shift)
        return mixed

    def _feed_forward(self, x: Tensor, marks: _Marks, states: Cache | CarriedRow | None) -> Tensor:
        if not isinstance(self.feed_forward, ChannelMix):
            return self.feed_forward(x)
        state = read_state(states, self.layer_idx, FEED_FORWARD_SHIFT)
        output, state = self.feed_forward(x, state, **marks)
        write_state(states, self.layer_idx, FEED_FORWARD_SHIFT, state)
        return output


class I3PreTrainedModel(PreTrainedModel):
    """What the i3 models share: configuration, initialisation, what transformers may do."""

    config_class = I3Config
    config: I3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["I3DecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    # Decays and bonuses sit in exponents: bfloat16's 8 bits would move them visibly.
    _keep_in_fp32_modules_strict = ["time_decay", "time_first"]
    _can_record_outputs = {"hidden_states": I3DecoderLayer}
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: I3Config) -> None:
        super().__init__(config)
        self._decoding_step = DecodingStep(_HALVES)

    def plan_step(self, kernels: ModuleType) -> Plan | None:
        """Gives what the kernels of a decoding step compute, perhaps with embeddings and head."""
        return self._decoding_step.plan(self._pieces, kernels)

    def _pieces(self) -> Pieces:
        raise NotImplementedError

    def _apply(self, *args: Any, **kwargs: Any) -> I3PreTrainedModel:
        self._decoding_step.forget()
        return super()._apply(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize_original(module, self.config.initializer_range)
        if self.config.initialization == "rwkv" and isinstance(module, I3DecoderLayer):
            parts = [module.mixer, getattr(module, "attention", None), module.feed_forward]
            initialize_rwkv(
                [part for part in parts if part is not None],
                module.layer_idx,
                len(self.config.layer_types or ()),
            )

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Gives the trainable parameters in groups for an optimizer, matrices alone decaying.

        Every group has a ``role`` besides: see `i3lm.layers.parameter_groups`.
        """
        return parameter_groups(self, weight_decay, head=self.get_output_embeddings())

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers, modules without parameters of their own are passed over;
        # a layer is one, and its initialisation depends on where it stands.
        super()._initialize_weights(module, is_custom_code=False)


class I3Model(I3PreTrainedModel):
    """Token embeddings and positions, the layers, and the last LayerNorm."""

    def __init__(self, config: I3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_embedding: RotaryEmbedding | None = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "rope":
            assert config.rope_parameters is not None  # the configuration itself sets them
            self.rotary_embedding = RotaryEmbedding(
                config.hidden_size // config.num_attention_heads,
                config.rope_parameters["rope_theta"],
            )
        self.layers = nn.ModuleList(
            I3DecoderLayer(config, index) for index in range(len(config.layer_types or ()))
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @_takes_old_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        reset: Tensor | None = None,
        carried_state: CarriedState | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Gives the hidden state of every token.

        Args:
            input_ids: Token ids, shape (B, T).
            attention_mask: 1 at real tokens and 0 at padding, shape (B, S) with S counting the
                tokens already in the cache too; or the masks that
                `create_masks_for_generate` makes.
            position_ids: Positions, shape (B, T) or (1, T); by default they count the real
                tokens of a document.
            cache: States and keys of earlier tokens.
            inputs_embeds: Embeddings to use in place of `input_ids`, shape (B, T, C).
            use_cache: Whether to return the states that continue this call (never in training,
                nor with `reset` or `carried_state`).
            reset: True at the first token of each document of a packed row, bool, shape (B, T):
                states are zero before it, attention does not see past it, positions count from
                it. Not with a cache.
            carried_state: States of recurrent layers from the row before, and for the row after.
                Not with a cache.

        Raises:
            ValueError: Both or neither of ids and embeddings, an id outside the vocabulary, more
                tokens than there are positions, masks without the positions that belong to
                them, or a `reset` or `carried_state` that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        B, T, _ = inputs_embeds.shape
        prepared: dict[str, Tensor | None] | None = None
        if isinstance(attention_mask, dict):
            prepared, attention_mask = attention_mask, None
        starts = carried_row = None
        if reset is not None:
            check_reset(reset, (B, T), attention_mask)
            starts = document_starts(reset)
        if carried_state is not None:
            carried_row = carried_state.begin_row(B)
        if reset is not None or carried_state is not None:
            self._check_no_cache(cache)
        elif use_cache and cache is None and not self.training:
            cache = I3Cache(self.config)
        seen = cache.get_seq_length() if cache is not None else 0
        positions = self.config.position_embedding_type
        if position_ids is None and positions != "none":
            if prepared is not None:
                raise ValueError("masks that were made before need position_ids beside them")
            position_ids = self._positions(attention_mask, seen, starts, inputs_embeds)
            self._check_length(seen + T, position_ids)

        padding = padding_mask(attention_mask, T)
        first: dict[str, Tensor] = {}
        masks: dict[str, Tensor | None] = {}
        if prepared is not None:
            masks, padding = prepared, prepared.get("linear_attention")
        elif starts is not None and padding is None:
            first = first_seen(starts, self.config.sliding_window)
        else:
            masks = causal_masks(self.config, inputs_embeds, attention_mask, cache, starts)
        hidden_states, rotation = inputs_embeds, None
        if positions == "learned":
            hidden_states = inputs_embeds + self.embed_positions(position_ids)
        elif self.rotary_embedding is not None:
            exact = inputs_embeds.dtype == torch.float64
            rotation = self.rotary_embedding(
                position_ids, torch.float64 if exact else torch.float32
            )
        kinds, token = self.config.layer_types or (), None
        stretches: Sequence[Stretch] = [Stretch(range(len(kinds)), None)]
        if padding is None and isinstance(cache, I3Cache):
            by_layer = [mask_of_layer(masks, kind) for kind in kinds]
            token = self._by_kernels(hidden_states, cache, by_layer, rotation)
            stretches = stretches if token is None else token.plan.stretches
        for stretch in stretches:
            by_kernels = None
            if token is not None and stretch.halves is not None:
                by_kernels = partial(token.run, stretch)
                if not stretch.is_watched:
                    hidden_states = by_kernels(hidden_states)
                    continue
            for layer in stretch.layers:
                hidden_states = self.layers[layer](
                    hidden_states,
                    causal_mask=mask_of_layer(masks, kinds[layer]),
                    padding_mask=padding,
                    cache=cache,
                    rotation=rotation,
                    first=first.get(kinds[layer]),
                    reset=reset,
                    carried_row=carried_row,
                    step=by_kernels,
                )
        if isinstance(cache, KnowsLength):
            cache.count_tokens(T)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)

    def _by_kernels(
        self,
        x: Tensor,
        cache: I3Cache,
        masks: list[Tensor | None],
        rotation: Rotation | None,
    ) -> TokenByKernels | None:
        """What computes layers for one new token by kernels, where they serve it."""
        kernels = decoding_kernels(x, x.dtype)
        plan = None if kernels is None else self.plan_step(kernels)
        if kernels is None or plan is None:
            return None
        return begin_token(kernels, plan, cache, (len(x), x.shape[-1]), masks, rotation)

    def _pieces(self) -> Pieces:
        return Pieces(self, (self.layers,))

    def _positions(
        self, attention_mask: Tensor | None, seen: int, starts: Tensor | None, embeds: Tensor
    ) -> Tensor:
        """Positions (B, T) or (1, T) that count the real tokens of each document."""
        T = embeds.shape[1]
        if attention_mask is None or attention_mask.dim() != 2:
            positions = (torch.arange(T, device=embeds.device) + seen).unsqueeze(0)
        else:
            positions = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -T:]
        return positions if starts is None else count_within_documents(positions, starts)

    def _check_no_cache(self, cache: Cache | None) -> None:
        if cache is not None:
            raise ValueError(
                "reset and carried_state are for whole rows, and which documents the keys in "
                "the cache are of is not known: leave out one or the other"
            )

    def _check_ids(self, input_ids: Tensor) -> None:
        # On an accelerator the check would stall every step, and the device reports it itself.
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
            return
        if input_ids.numel() <= FEW_ROWS:  # the least work for a token
            ids = input_ids.flatten().tolist()
            low, high = min(ids), max(ids)
        else:
            low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary: ids run from 0 "
                f"to {self.config.vocab_size - 1}; the tokenizer does not fit this model"
            )

    def _check_length(self, length: int | Tensor, position_ids: Tensor) -> None:
        limit = self.config.position_limit
        if isinstance(length, Tensor) and torch.compiler.is_compiling():
            return  # a static cache counts by a tensor, and a graph does not branch on its number
        if limit is None or length <= limit:
            return
        length = int(position_ids.max()) + 1  # padding takes no position, and documents restart
        if length > limit:
            raise ValueError(
                f"{length} tokens are more than max_position_embeddings ({limit}) allows: give "
                "at most that many, or let generate() slide its window"
            )


class I3ForCausalLM(I3PreTrainedModel, I3GenerationMixin):
    """An i3 model with a head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: I3Config) -> None:
        super().__init__(config)
        self.model = I3Model(config)
        self.vocab_size = config.vocab_size
        if config.low_rank is None:
            self.lm_head: nn.Module = Linear(config.hidden_size, config.vocab_size)
        else:
            self.lm_head = LowRankLinear(config.hidden_size, config.vocab_size, config.low_rank)
        self.post_init()

    @_takes_old_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        shift_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        reset: Tensor | None = None,
        carried_state: CarriedState | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Gives logits (B, T, V), and the mean loss in nats per token where labels are given.

        Args:
            labels: Token ids to predict, shape (B, T), shifted inside: labels equal to
                `input_ids` train next-token prediction. -100 is ignored.
            shift_labels: Labels that are one step ahead already, shape (B, T); they come first.
            logits_to_keep: Compute logits only for this many last positions; 0 means all.
            skip_logits: Give the loss alone, computed piece by piece, so that the logits of the
                whole batch never exist.

        The other arguments are those of `I3Model.forward`.
        """
        others = (inputs_embeds, labels, shift_labels, reset, carried_state)
        plain = not (kwargs or skip_logits) and all(other is None for other in others)
        if plain and input_ids is not None and isinstance(logits_to_keep, int):
            logits = next_logits(self, input_ids, attention_mask, position_ids, cache)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, cache=cache)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            reset=reset,
            carried_state=carried_state,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if skip_logits:
            return CausalLMOutputWithPast(
                loss=self._loss_in_pieces(hidden_states, labels, shift_labels),
                cache=outputs.cache,
                hidden_states=outputs.hidden_states,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels,
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pieces(self) -> Pieces:
        model, embeddings = self.model, [self.model.embed_tokens]
        if self.config.position_embedding_type == "learned":
            embeddings.append(model.embed_positions)
        return Pieces(self, (model, model.layers), tuple(embeddings), model.norm, self.lm_head)

    def _loss_in_pieces(
        self, hidden_states: Tensor, labels: Tensor | None, shift_labels: Tensor | None
    ) -> Tensor:
        if shift_labels is None:
            if labels is None:
                raise ValueError("skip_logits leaves only the loss: give labels or shift_labels")
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        head: Any = self.lm_head
        hidden = hidden_states.flatten(0, 1)
        if isinstance(head, LowRankLinear):
            hidden, weight = linear(hidden, head.lora_B), head.lora_A
        else:
            weight = head.weight
        # Where memory counts more than time; an accelerator multiplies small pieces badly.
        recompute = (
            self.training and self.is_activation_checkpointing and hidden.device.type == "cpu"
        )
        labels = shift_labels.flatten()
        return linear_cross_entropy(hidden, weight, head.bias, labels, recompute=recompute)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Writes weights, configuration and generation settings into a folder."""
        # Settings marked as made from a configuration lose context_overflow when read back.
        self.generation_config._from_model_config = None
        super().save_pretrained(*args, **kwargs)
