"""The Mixture-of-Experts code model: a `transformers.PreTrainedModel` that needs only torch and transformers."""

from .config import MoEGPTConfig
from .modeling import MoEGPTForCausalLM, MoEGPTModel

__all__ = ["MoEGPTConfig", "MoEGPTForCausalLM", "MoEGPTModel"]
