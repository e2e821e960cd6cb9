"""The causal i3 language models, registered with transformers' Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from i3lm.models.i3.cache_i3 import CarriedState, I3Cache
from i3lm.models.i3.configuration_i3 import I3Config
from i3lm.models.i3.modeling_i3 import I3ForCausalLM, I3Model, I3PreTrainedModel

__all__ = ["CarriedState", "I3Cache", "I3Config", "I3ForCausalLM", "I3Model", "I3PreTrainedModel"]

AutoConfig.register("i3", I3Config)
AutoModel.register(I3Config, I3Model)
AutoModelForCausalLM.register(I3Config, I3ForCausalLM)
