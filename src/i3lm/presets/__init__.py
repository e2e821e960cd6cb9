"""The members of the family, one YAML file each; a user's own file is an equal citizen."""

from i3lm.presets.loading import Preset, list_presets, load_preset, make_config

__all__ = ["Preset", "list_presets", "load_preset", "make_config"]
