"""Reading presets and turning their fields into checked configurations."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from i3lm.errors import ConfigurationError
from i3lm.models.i3 import I3Config

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """One member of the family, or a user's own variant.

    Attributes:
        name: The name it is asked for by.
        description: One line on what it is.
        tokenizer: The kind of tokenizer trained for it: bpe, chunk or character.
        lowercase: Whether that tokenizer lower-cases its text.
        model: Configuration fields; ``model_type`` may name any causal model of transformers,
            so that a peer such as ``gpt2`` trains in the same loop. The default is ``i3``.
    """

    name: str
    description: str = ""
    tokenizer: str = "bpe"
    lowercase: bool = False
    model: dict[str, Any] = field(default_factory=dict)

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """The model configuration, with some fields overridden."""
        return make_config({**self.model, **overrides}, where=f"preset {self.name}")


def list_presets() -> list[str]:
    """The names of the built-in presets, smallest model first."""
    order = ("tiny", "12m", "22m", "80m", "200m-10-6", "200m", "ethan-base", "1b")
    names = {path.stem for path in _FOLDER.glob("*.yaml")}
    known = [f"i3-{name}" for name in order]
    return [name for name in known if name in names] + sorted(names - set(known))


def load_preset(source: str) -> Preset:
    """Reads a preset by name, or a user's YAML file by path.

    Raises:
        ConfigurationError: No such preset or file, one that cannot be read, YAML that does not
            parse, an unknown key, or a value of the wrong kind.
    """
    path = _FOLDER / f"{source}.yaml"
    if source not in list_presets():
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            raise ConfigurationError(
                f"unknown preset {source!r}: use one of {', '.join(list_presets())}, the path of "
                "a YAML file, or a checkpoint folder"
            )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{source}: no such file; give the path of a YAML preset"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{source}: cannot be read ({error.strerror}); give the path of a YAML preset"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{source}: not readable as YAML: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ConfigurationError(f"{source}: a preset is a mapping with a `model` mapping in it")
    allowed = [f.name for f in dataclasses.fields(Preset)]
    refuse_unknown_keys(content, allowed, where=source)
    kinds = {"name": str, "description": str, "tokenizer": str, "lowercase": bool}
    for key, kind in kinds.items():
        if not isinstance(content.get(key, kind()), kind):
            rule = "a text" if kind is str else "true or false"
            raise ConfigurationError(f"{source}: {key} ({content[key]!r}) must be {rule}")
    content.setdefault("name", path.stem)
    return Preset(**content)


def make_config(fields: dict[str, Any], *, where: str = "model") -> PreTrainedConfig:
    """Gives the checked configuration that the fields describe.

    Args:
        fields: Configuration fields; ``model_type`` picks the class, i3 by default.
        where: What to call the place of the fields in an error message.

    Raises:
        ConfigurationError: An unknown model type or field, or a value outside its rule.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", "i3")
    if model_type != "i3" and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        problem = "is no causal model" if model_type in CONFIG_MAPPING else "is unknown"
        raise ConfigurationError(
            f"{where}: model_type {model_type!r} {problem}: use i3, or a causal model that "
            "transformers knows, such as gpt2 or llama"
        )
    config_class = I3Config if model_type == "i3" else CONFIG_MAPPING[model_type]
    refuse_unknown_keys(fields, _field_names(config_class), where=where)
    try:
        return config_class(**fields)
    except Exception as error:  # the classes of transformers raise many kinds
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{where}: {reason}") from error


def _field_names(config_class: type[PreTrainedConfig]) -> list[str]:
    """The fields that a configuration class declares itself, and its aliases."""
    own = [name for name in vars(config_class).get("__annotations__", {}) if name != "model_type"]
    return own + list(getattr(config_class, "attribute_map", {}))


def refuse_unknown_keys(given: dict[str, Any], allowed: list[str], *, where: str) -> None:
    """Raises a ConfigurationError that names the unknown key and the nearest known one."""
    for key in given:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(allowed)}"
            raise ConfigurationError(f"{where}: unknown key {key!r}; {hint}")
