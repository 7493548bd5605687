"""The Mixture-of-Experts code model: a `transformers.PreTrainedModel` that needs only torch and transformers.

Its names are loaded when they are asked for: who needs only the arithmetic (`accounting`, `sizes`) is spared the three seconds
that torch and transformers take to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import MoEGPTConfig
    from .modeling import MoEGPTForCausalLM, MoEGPTModel

__all__ = ["MoEGPTConfig", "MoEGPTForCausalLM", "MoEGPTModel"]

_HOMES = {"MoEGPTConfig": "config", "MoEGPTForCausalLM": "modeling", "MoEGPTModel": "modeling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
