"""Where a run starts: preset or checkpoint, tokenizer, model, and the kernels it runs on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from i3lm import __version__
from i3lm.device import seed_everything
from i3lm.errors import ConfigurationError, KernelError, OutputError
from i3lm.files import write_folder
from i3lm.inference.loading import check_tokenizer_fits, find_checkpoint, load_model
from i3lm.layers import HybridMixer, TimeMix
from i3lm.ops.dispatch import SLOW
from i3lm.ops.state_space import STATE_SPACE
from i3lm.ops.wkv import WKV
from i3lm.presets import Preset, list_presets, load_preset, make_config
from i3lm.tokenizers import (
    TOKENIZER_KINDS,
    load_tokenizer,
    tokenizer_fingerprint,
    train_character_tokenizer,
    train_tokenizer,
)
from i3lm.training.data import default_cache, open_source, training_texts
from i3lm.training.options import DataOptions, ModelOptions, TokenizerOptions

# Most documents that a tokenizer is trained on where a set is streamed.
STREAM_TOKENIZER_DOCUMENTS = 100_000


@dataclass(frozen=True)
class Starting:
    """Where a run starts: a preset to draw weights for, or a checkpoint to fine-tune."""

    preset: Preset
    checkpoint: Path | None


def resolve_start(options: ModelOptions) -> Starting:
    """Finds the preset or checkpoint that the options name.

    Raises:
        ConfigurationError, CheckpointError: There is none, or the options contradict each other.
    """
    if options.source is None:
        make_config(options.config, where="model.config")
        return Starting(Preset("new model", model=options.config), None)
    # A preset's name means the preset, whatever lies in the working folder.
    if options.source not in list_presets() and Path(options.source).is_dir():
        if options.config:
            raise ConfigurationError(
                f"model.config ({', '.join(options.config)}) cannot change the checkpoint "
                f"{options.source}: leave it out, or start from a preset"
            )
        return Starting(Preset("checkpoint"), find_checkpoint(options.source))
    preset = load_preset(options.source)
    merged = {**preset.model, **options.config}
    preset = Preset(
        preset.name, preset.description, preset.tokenizer, preset.lowercase, model=merged
    )
    # A bad configuration is refused before any text is read.
    make_config(
        merged, where=f"{options.source} with model.config" if options.config else options.source
    )
    return Starting(preset, None)


def make_tokenizer(
    options: TokenizerOptions, start: Starting, data: DataOptions
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, or trains it on the training documents (once: it is cached)."""
    source = options.source or (
        str(start.checkpoint) if start.checkpoint is not None else start.preset.tokenizer
    )
    if source not in TOKENIZER_KINDS:
        for name in ("vocab_size", "lowercase"):
            if getattr(options, name) is not None:
                raise ConfigurationError(
                    f"tokenizer.{name} ({getattr(options, name)}) cannot change the tokenizer "
                    f"{source}: leave it out, or train one with tokenizer.source "
                    f"{', '.join(TOKENIZER_KINDS)}"
                )
        return load_tokenizer(source)
    if options.lowercase is not None and source != "character":
        raise ConfigurationError(
            f"tokenizer.lowercase ({options.lowercase}) applies to the character tokenizer, not "
            f"to {source}: leave it out"
        )
    size = options.vocab_size
    if size is None and source == "bpe" and start.checkpoint is None:
        size = start.preset.config().vocab_size
    lowercase = start.preset.lowercase if options.lowercase is None else options.lowercase
    most = options.documents or (STREAM_TOKENIZER_DOCUMENTS if data.streaming else None)
    sources = [open_source(one).fingerprint() for one in data.all_sources()]
    key = json.dumps([__version__, source, size, lowercase, data.held_out_fraction, most, sources])
    folder = (
        default_cache() / "tokenizers" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    )
    if (folder / "tokenizer.json").exists():
        return load_tokenizer(folder)
    texts = training_texts(data, most)
    if source == "character" and size is None:
        tokenizer = train_character_tokenizer(texts, lowercase=lowercase)
    else:
        tokenizer = train_tokenizer(source, texts, vocab_size=size)
    # Without the cache the next run takes a little longer; that is no reason to stop this one.
    with contextlib.suppress(OutputError):
        write_folder(folder, lambda part: tokenizer.save_pretrained(part))
    return tokenizer


def choose_kernels(
    model: PreTrainedModel, device: torch.device, *, strict: bool
) -> list[tuple[str, str, str]]:
    """Gives (op, implementation, reason) for every recurrence in the model.

    Raises:
        KernelError: `strict`, and one of them would run in its slower form.
    """
    layers = {type(module) for module in model.modules()}
    found = []
    for layer, op in ((TimeMix, WKV), (HybridMixer, STATE_SPACE)):
        if layer not in layers:
            continue
        choice = op.choose(device, torch.float32)
        name = choice.implementation.name
        if strict and name in SLOW:
            raise KernelError(
                f"{op.name} would run as {name} on {device} ({choice.reason}), and "
                "training.strict_kernels is set: leave it out, or choose another device"
            )
        found.append((op.name, name, choice.reason))
    return found


def make_model(
    start: Starting, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PreTrainedModel:
    """Draws a new model whose vocabulary is the tokenizer's, or loads the checkpoint.

    Raises:
        CheckpointError, TokenizerError: As for `load_model` and `check_tokenizer_fits`.
        ConfigurationError: A peer of another architecture that does not run, or is not causal.
    """
    if start.checkpoint is not None:
        model = load_model(start.checkpoint)
        check_tokenizer_fits(model, tokenizer, where=str(start.checkpoint))
        return model
    seed_everything(seed)
    config = start.preset.config(vocab_size=len(tokenizer))
    for role in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, role, getattr(tokenizer, role))
    config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    if config.model_type == "i3":
        return AutoModelForCausalLM.from_config(config)
    try:
        model = AutoModelForCausalLM.from_config(config)
        causal = _is_causal(model)
    except Exception as error:  # every architecture has its own way to refuse its fields
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigurationError(
            f"a model of type {config.model_type} with these fields does not run: {reason}; "
            "change model.config"
        ) from error
    if not causal:
        raise ConfigurationError(
            f"a model of type {config.model_type} with these fields sees the tokens that it is "
            "to predict: choose a causal one (some types have a field is_decoder to set)"
        )
    return model


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether the last token leaves the logits before it alone; generates a few tokens as well."""
    model.eval()
    V, T = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None) or 8
    ids = torch.arange(min(T, 8)).remainder(V).unsqueeze(0)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % V
    before, after = (model(input_ids=i, use_cache=False).logits[0] for i in (ids, changed))
    model.generate(ids[:, :1], max_new_tokens=2, do_sample=False, eos_token_id=None)
    model.train()
    moved = (before - after)[:-1].abs().max()
    return bool(moved <= 1e-5 * before.abs().max())  # sums may differ in their last bits
