"""Reading checkpoints of the original open-i3, without running anything that is in them.

The tensors alone say what the model is, except for the number of attention heads: the original's
``config.json`` is partly hard-coded, and some runs leave none.

Source of the names and files: https://github.com/FlameF0X/open-i3 (Apache-2.0).
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i3lm.errors import CheckpointError, ConfigurationError
from i3lm.models.i3.configuration_i3 import I3Config
from i3lm.models.i3.modeling_i3 import I3ForCausalLM

_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model_best.bin")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "chunk_vocab_combined.json")
# Folders of weights that the original makes inside a run's folder, where the tokenizer stays.
_RUN_SUBFOLDERS = ("checkpoints", "i3-model-artifacts")


def _affine(original: str, ours: str) -> dict[str, str]:
    return {f"{original}.{leaf}": f"{ours}.{leaf}" for leaf in ("weight", "bias")}


# Original name -> ours.
_OUTSIDE_LAYERS = {
    "embed.weight": "model.embed_tokens.weight",
    "pos_embed.weight": "model.embed_positions.weight",
    **_affine("ln_f", "model.norm"),
    **_affine("head", "lm_head"),
}
_NORMS = _affine("ln1", "mixer_norm") | _affine("ln2", "feed_forward_norm")
_FEED_FORWARD = _affine("ffn.0", "feed_forward.up") | _affine("ffn.2", "feed_forward.down")
# What the name of a layer's mixer is in the original -> the names inside that layer.
_IN_LAYER = {
    "hybrid": {
        **_NORMS,
        "hybrid.w_mix": "mixer.mix",
        **{f"hybrid.{name}": f"mixer.{name}" for name in "ABCD"},
        **_FEED_FORWARD,
    },
    "att": {
        **_NORMS,
        "att.time_decay": "mixer.time_decay",
        "att.time_first": "mixer.time_first",
        "att.time_mix_k": "mixer.time_mix_key",
        "att.time_mix_v": "mixer.time_mix_value",
        "att.time_mix_r": "mixer.time_mix_receptance",
        "att.key.weight": "mixer.key.weight",
        "att.value.weight": "mixer.value.weight",
        "att.receptance.weight": "mixer.receptance.weight",
        "att.output.weight": "mixer.output.weight",
        "ffn.time_mix_k": "feed_forward.time_mix_key",
        "ffn.time_mix_r": "feed_forward.time_mix_receptance",
        "ffn.key.weight": "feed_forward.key.weight",
        "ffn.receptance.weight": "feed_forward.receptance.weight",
        "ffn.value.weight": "feed_forward.value.weight",
    },
    "attn": {
        **_NORMS,
        **_affine("attn.qkv", "mixer.query_key_value"),
        **_affine("attn.out_proj", "mixer.output"),
        **_FEED_FORWARD,
    },
}
_RECURRENCES = {"hybrid": "state_space", "att": "rwkv4"}


@dataclass
class OriginalCheckpoint:
    """What a checkpoint of the original holds, in our terms.

    Attributes:
        weights: The file that was read.
        config: The configuration that the tensors imply.
        state_dict: The tensors under our names, float32.
        tokenizer: The tokenizer file that belongs to it, or None.
        notes: What a person should know, such as where config.json and the tensors disagree.
    """

    weights: Path
    config: I3Config
    state_dict: dict[str, Tensor]
    tokenizer: Path | None
    notes: list[str]


def read_open_i3(source: Path, num_attention_heads: int | None = None) -> OriginalCheckpoint:
    """Gives the checkpoint of the original at a path.

    Args:
        source: A folder with ``pytorch_model.bin`` (or ``pytorch_model_best.bin``), the folder of
            a 200m run (its newest ``checkpoints/model_iter_*.pt`` is read), or a file of weights.
        num_attention_heads: Heads H of the attention layers, which no tensor tells; by default
            what the checkpoint's configuration says.

    Raises:
        CheckpointError: Nothing is there, it is damaged or holds more than tensors, or it is
            another model; or the number of heads cannot be inferred.
        ConfigurationError: `num_attention_heads` does not divide the width.
    """
    weights = _find_weights(source)
    tensors, own_config, notes = _read_pickle(weights)
    stated = {weights.name: own_config, "config.json": _read_config(weights.parent)}
    mixers = _list_mixers(tensors, weights)
    names = _map_names(tensors, mixers, weights)
    sizes = _read_sizes(tensors, mixers, weights)
    notes += _disagreements(stated, sizes)
    heads = 1
    if "attn" in mixers:
        heads, more = _choose_heads(num_attention_heads, stated, sizes["hidden_size"], weights)
        notes += more
    try:
        config = I3Config(**sizes, num_attention_heads=heads, initialization="original")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{weights}: not a usable model: {error}") from error
    state_dict = {ours: _reshape(original, tensors[original]) for original, ours in names.items()}
    _check_shapes(config, state_dict, names, weights)
    return OriginalCheckpoint(weights, config, state_dict, _find_tokenizer(weights), notes)


def build_model(checkpoint: OriginalCheckpoint) -> I3ForCausalLM:
    """Gives the model, in evaluation mode; it shares the checkpoint's tensors."""
    with torch.device("meta"):  # nothing to allocate or draw: the tensors are there
        model = I3ForCausalLM(checkpoint.config)
    model.load_state_dict(checkpoint.state_dict, assign=True)
    return model.eval()


def _find_weights(source: Path) -> Path:
    """The file of weights that a path means."""
    if source.is_file():
        return source
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder; give a checkpoint of open-i3")
    for name in _WEIGHT_FILES:
        if (source / name).is_file():
            return source / name
    iterations = {
        int(match[1]): path
        for folder in (source, source / "checkpoints")
        for path in folder.glob("model_iter_*.pt")
        if (match := re.fullmatch(r"model_iter_(\d+)\.pt", path.name))
    }
    if not iterations:
        raise CheckpointError(
            f"{source}: holds no checkpoint of open-i3 (none of {', '.join(_WEIGHT_FILES)}, "
            "checkpoints/model_iter_*.pt); give such a folder or a file of weights"
        )
    return iterations[max(iterations)]


def _find_tokenizer(weights: Path) -> Path | None:
    """The tokenizer file beside the weights, or in the run's folder above them."""
    folders = [weights.parent]
    if weights.parent.name in _RUN_SUBFOLDERS:
        folders.append(weights.parent.parent)
    candidates = [folder / name for folder in folders for name in _TOKENIZER_FILES]
    return next((path for path in candidates if path.is_file()), None)


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The tensors by original name, the configuration wrapped with them, and notes."""
    content = _load_safely(path)
    own_config: Any = {}
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        own_config, content = content.get("config"), content["model_state_dict"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not named tensors; give a state dict of "
            "open-i3, or one wrapped as model_state_dict"
        )
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(
                f"{path}: {name} is of type {what}, but every entry must be a tensor of floating "
                "point numbers; give a checkpoint of an open-i3 language model"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: {name} holds infinite or undefined numbers: the training went wrong or "
                "the file is damaged; give another checkpoint"
            )
        if tensor.dtype != torch.float32 and not notes:
            notes.append(f"tensors of type {tensor.dtype} are converted to torch.float32")
        tensors[str(name)] = tensor.to(torch.float32)
    return tensors, own_config if isinstance(own_config, dict) else {}, notes


def _load_safely(path: Path) -> Any:
    """What a file of torch.save holds, if that is tensors and plain values only."""
    try:
        # PyTorch does not look at the checksums, and would give damaged numbers as they are.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(
                    f"{path}: damaged: the checksum of {damaged} in it is wrong; copy or download "
                    "the file again"
                )
        with warnings.catch_warnings():  # on foreign pickles, which fail below anyway
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, map_location="cpu")
    except CheckpointError:
        raise
    except Exception as error:  # pickle, zipfile, torch and the system each raise their own
        # PyTorch's own message advises to load it with weights_only=False: not passed on.
        unsafe = re.search(r"(?:GLOBAL|global:?)\s+(?:GLOBAL\s+)?([\w.]+)", str(error))
        if unsafe:
            raise CheckpointError(
                f"{path}: holds more than tensors: it asks for {unsafe[1]}, which could run code, "
                "so it was not opened; give a state dict of tensors"
            ) from error
        reason = getattr(error, "strerror", None) or "damaged, cut short, or another kind of file"
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch checkpoint: {reason}; copy or download it again"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """What config.json says, or nothing where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: not readable as JSON ({reason}); mend the file or remove it"
        ) from error
    return content if isinstance(content, dict) else {}


def _list_mixers(tensors: dict[str, Tensor], path: Path) -> list[str]:
    """The mixer of each layer, bottom first: ``hybrid``, ``att`` or ``attn``."""
    found: dict[int, str] = {}
    for name in tensors:
        match = re.match(r"layers\.(0|[1-9]\d*)\.(\w+)\.", name)
        if match is not None and match[2] in _IN_LAYER:
            found.setdefault(int(match[1]), match[2])
    depth = next(index for index in count() if index not in found)
    mixers = [found[index] for index in range(depth)]
    if {"hybrid", "att"} <= set(mixers):
        raise CheckpointError(
            f"{path}: layer {mixers.index('hybrid')} has hybrid.* and layer {mixers.index('att')} "
            "has att.*, but a model has one recurrence; give a checkpoint of open-i3 80m or 200m"
        )
    return mixers


def _map_names(tensors: dict[str, Tensor], mixers: list[str], path: Path) -> dict[str, str]:
    """Original name -> ours, for exactly the tensors that are there."""
    names = dict(_OUTSIDE_LAYERS)
    for index, mixer in enumerate(mixers):
        for original, ours in _IN_LAYER[mixer].items():
            names[f"layers.{index}.{original}"] = f"model.layers.{index}.{ours}"
    unknown = [name for name in tensors if name not in names]
    if unknown:
        raise CheckpointError(
            f"{path}: the tensor {unknown[0]} (and {len(unknown) - 1} others) has no place in an "
            "open-i3 language model of the 80m or 200m kind; only those are converted"
        )
    missing = [name for name in names if name not in tensors]
    if missing or not mixers:
        raise CheckpointError(
            f"{path}: the tensor {missing[0] if missing else 'layers.0.ln1.weight'} is missing; "
            "give the complete state dict of an open-i3 language model"
        )
    return names


def _read_sizes(tensors: dict[str, Tensor], mixers: list[str], path: Path) -> dict[str, Any]:
    """The fields of `I3Config` that the tensors tell."""

    def size(name: str, axis: int) -> int:
        if tensors[name].dim() <= axis:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, but needs "
                f"{axis + 1} dimensions; the file is of another model"
            )
        return tensors[name].shape[axis]

    wide = "layers.0.ffn.key.weight" if mixers[0] == "att" else "layers.0.ffn.0.weight"
    sizes: dict[str, Any] = {
        "vocab_size": size("embed.weight", 0),
        "hidden_size": size("embed.weight", 1),
        "max_position_embeddings": size("pos_embed.weight", 0),
        "intermediate_size": size(wide, 0),
        "layer_types": [
            "full_attention" if mixer == "attn" else "linear_attention" for mixer in mixers
        ],
    }
    recurrent = next((index for index, mixer in enumerate(mixers) if mixer in _RECURRENCES), None)
    if recurrent is not None:
        sizes["recurrence"] = _RECURRENCES[mixers[recurrent]]
        if mixers[recurrent] == "hybrid":
            sizes["state_size"] = size(f"layers.{recurrent}.hybrid.A", 0)
    return sizes


def _disagreements(stated: dict[str, dict[str, Any]], sizes: dict[str, Any]) -> list[str]:
    """What each configuration says about sizes that the tensors contradict."""
    kinds = sizes["layer_types"]
    recurrent, attention = kinds.count("linear_attention"), kinds.count("full_attention")
    true = {
        "vocab_size": sizes["vocab_size"],
        "d_model": sizes["hidden_size"],
        "max_seq_len": sizes["max_position_embeddings"],
        "seq_len": sizes["max_position_embeddings"],
        "d_state": sizes.get("state_size"),
        "n_layers": len(kinds),
        "conv_layers": recurrent,
        "n_rwkv_layers": recurrent,
        "attn_layers": attention,
        "n_attn_layers": attention,
    }
    return [
        f"{where} says {key} {config[key]}, the tensors say {value}: using {value}"
        for where, config in stated.items()
        for key, value in true.items()
        if value is not None and key in config and config[key] != value
    ]


def _choose_heads(
    asked: int | None, stated: dict[str, dict[str, Any]], hidden_size: int, path: Path
) -> tuple[int, list[str]]:
    """The number of attention heads, and a note on where it comes from."""
    divisors = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0]
    choices = ", ".join(map(str, divisors))
    said = {where: config["n_heads"] for where, config in stated.items() if "n_heads" in config}
    if asked is not None:
        if asked not in divisors:
            raise ConfigurationError(
                f"num_attention_heads ({asked}) must divide hidden_size ({hidden_size}): use one "
                f"of {choices}"
            )
        return asked, [
            f"{where} says n_heads {heads}: using {asked} as asked"
            for where, heads in said.items()
            if heads != asked
        ]
    for where, heads in said.items():
        if type(heads) is int and heads in divisors:
            return heads, [
                f"num_attention_heads {heads} is taken from {where}; the tensors cannot confirm it"
            ]
    wrong = "".join(f" ({where} says {heads!r})" for where, heads in said.items())
    raise CheckpointError(
        f"{path}: the number of attention heads cannot be inferred from the tensors{wrong}: pass "
        f"--num-attention-heads N, where N divides the width {hidden_size}: one of {choices}"
    )


def _reshape(original: str, tensor: Tensor) -> Tensor:
    # The original keeps these as (1, 1, C).
    return tensor.flatten() if ".time_mix_" in original else tensor.contiguous()


def _check_shapes(
    config: I3Config, state_dict: dict[str, Tensor], names: dict[str, str], path: Path
) -> None:
    """Raises a CheckpointError unless every tensor has the shape that the sizes imply."""
    with torch.device("meta"):
        expected = I3ForCausalLM(config).state_dict()
    for original, ours in names.items():
        if state_dict[ours].shape != expected[ours].shape:
            raise CheckpointError(
                f"{path}: {original} has shape {tuple(state_dict[ours].shape)}, but the other "
                f"tensors imply {tuple(expected[ours].shape)}; the file is damaged or of another "
                "model"
            )
