"""The model's configuration: Hugging Face field names, the presets, and one place that refuses wrong values."""

import copy
import json
import sys
from dataclasses import fields
from typing import Any, NotRequired, TypedDict

from transformers import PreTrainedConfig

from .config_json import BALANCE_RULES, PRESETS, PRESETS_FOLDER, SCORING_FUNCTIONS
from .sizes import ALIASES, ModelSizes

# transformers' names of kernels: `flash` picks the best one present by itself.
ATTENTION_ALIASES = {"flash_attention_2": "flash", "flash_attention_3": "flash", "flash_attention_4": "flash"}
ROPE_TYPES = ("default", "yarn")


class RopeParameters(TypedDict):
    """What `rope_parameters` holds once a configuration is made; `default` has the first two only."""

    rope_type: str
    rope_theta: float  # base of the frequencies
    factor: NotRequired[float]  # context over the one the model was first trained at
    original_max_position_embeddings: NotRequired[int]
    beta_fast: NotRequired[float]  # turns within the original context above which a dimension keeps its frequency
    beta_slow: NotRequired[float]  # and below which it is slowed down by `factor`
    attention_factor: NotRequired[float]  # on cos and sin; 0.1 ln(factor) + 1 where it is not given


class MoEGPTConfig(PreTrainedConfig):
    """Configuration of `MoEGPTForCausalLM`.

    Field names are those of transformers' `Glm4MoeConfig`, because DeepSpeed's AutoEP and inference engines read them.
    Raises `ValueError` with the field, its value and what is valid.
    """

    model_type = "moe_gpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - a list: Trainer.evaluate adds another to it
    attribute_map = dict(ALIASES)  # noqa: RUF012 - transformers reads it as a plain class attribute

    vocab_size: int = 49_152
    hidden_size: int = 1536
    intermediate_size: int = 4096  # the usual FFN width; only `moe_intermediate_size` reads it
    moe_intermediate_size: int = 0  # width of one routed expert and of one shared expert; 0 stands for intermediate_size
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    num_key_value_heads: int = 8
    head_dim: int = 0  # 0 stands for hidden_size / num_attention_heads
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None  # YaRN; all of `RopeParameters` once made
    attention_sinks: bool = True  # one learned logit per query head in the softmax's denominator
    qk_norm: bool = True  # RMS norm over each head's q and k, before RoPE
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_balance: str = "sign"  # how the correction bias follows the load: model/balance.py
    router_bias_rate: float = 0.001  # `sign`, `proportional`: step of the correction bias per optimizer step (arXiv 2408.15664)
    router_bias_decay: float = 0.0  # share of that rate which is gone, linearly, at the end of the run
    router_bias_average: float = 0.0  # `quantile`: share of the old bias that each step keeps
    router_aux_loss_coef: float = 0.0  # weight of the classical auxiliary loss (model/auxiliary.py), in training only
    expert_dropout: float = 0.0  # on silu(W1 x) * W3 x of the routed experts, in training only
    z_loss_weight: float = 0.0  # weight of mean(logsumexp(logits)^2), in training only
    initializer_range: float = 0.02
    # Of untied input embeddings. At 0.02 early gradients spike, because the first norm divides by it (arXiv 2312.16903), and widths
    # of 160 and 256 learn less, though 64 learns more: tests/results/README.md compares 0.02 to 1.0.
    embedding_initializer_range: float = 0.2
    router_initializer_range: float = 0.01
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Aliases arrive as extra keywords, after the fields' defaults are set: move them before anything is derived.
        for alias, field in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, field, kwargs.pop(alias))
        self.head_dim, self.moe_intermediate_size = self.head_dim or 0, self.moe_intermediate_size or 0  # null is 0
        self._check_whole_numbers(least=0)  # with which the next lines calculate
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        if not self.head_dim and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        # Before transformers 5 RoPE's settings stood in these two, and a folder's `rope_scaling` is what counts in it.
        self.rope_parameters = kwargs.pop("rope_scaling", None) or self.rope_parameters
        if "rope_theta" in kwargs and isinstance(self.rope_parameters, dict | None):
            self.rope_parameters = {"rope_theta": kwargs.pop("rope_theta"), **(self.rope_parameters or {})}
        self.rope_parameters = self._complete_rope(self.rope_parameters or {})
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check()

    def _complete_rope(self, given: dict[str, Any]) -> dict[str, Any]:
        """YaRN's parameters with defaults filled in; `factor` 1 is plain RoPE (arXiv 2309.00071)."""
        if not isinstance(given, dict):
            raise ValueError(f"rope_parameters must be an object of YaRN's parameters, got {given!r}")
        if "type" in given:  # the older name
            given = {"rope_type": given["type"], **{key: value for key, value in given.items() if key != "type"}}
        # Anything else stays as it is, for `_check` to refuse.
        factor = float(given["factor"]) if _is_number(given.get("factor"), least=1) else 1.0
        rope: dict[str, Any] = {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": factor,
            "original_max_position_embeddings": int(self.max_position_embeddings / factor),
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        }
        if given.get("rope_type") == "default":
            rope = {"rope_type": "default", "rope_theta": 10_000.0}
        return {**rope, **{key: value for key, value in given.items() if value is not None}}

    def _check_whole_numbers(self, least: int = 1) -> None:
        for field in _POSITIVE_FIELDS:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")

    def _check(self) -> None:
        self._check_whole_numbers()
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, got {self.num_hidden_layers}")
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder must be false: this is a decoder")
        for field in _FINITE_FIELDS:
            if not _is_number(getattr(self, field)):
                raise ValueError(f"{field} must be a finite number of at least 0, got {getattr(self, field)!r}")
        for field in _BOOLEAN_FIELDS:  # "false" is a text, which Python takes for true
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, got {getattr(self, field)!r}")
        self._check_token_ids()
        self._check_attention()
        self._check_routing()
        for field in ("expert_dropout", "z_loss_weight", "router_bias_rate", "router_bias_average", "router_aux_loss_coef"):
            if not _is_number(getattr(self, field)) or getattr(self, field) >= 1:
                raise ValueError(f"{field} must be at least 0 and below 1, got {getattr(self, field)!r}")
        if not _is_number(self.router_bias_decay) or self.router_bias_decay > 1:
            raise ValueError(f"router_bias_decay must be at least 0 and at most 1, got {self.router_bias_decay!r}")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act must be 'silu' (the experts are SwiGLU), got {self.hidden_act!r}")

    def _check_token_ids(self) -> None:
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            ids = value if isinstance(value, list) and field == "eos_token_id" else [value]
            if value is not None and not all(isinstance(id_, int) for id_ in ids):
                raise ValueError(f"{field} must be the number of a token, got {value!r}")

    def _check_attention(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_parameters.rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
        for name in ("factor", "rope_theta", "original_max_position_embeddings"):
            if name in rope and not _is_number(rope[name], least=1):
                raise ValueError(f"rope_parameters.{name} must be a finite number of at least 1, got {rope[name]!r}")
        if rope_type == "yarn" and rope["rope_theta"] == 1:
            raise ValueError("rope_parameters.rope_theta must be above 1 for YaRN: all frequencies would be equal")
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            if rope.get(name) is not None and not (_is_number(rope[name]) and rope[name] > 0):
                raise ValueError(f"rope_parameters.{name} must be a finite number above 0, got {rope[name]!r}")
        for name, only in (("partial_rotary_factor", 1.0), ("truncate", True)):
            if rope.get(name, only) != only:
                raise ValueError(f"rope_parameters.{name} must be {only!r}, got {rope[name]!r}")
        if rope.get("mscale") and rope.get("mscale_all_dim") and rope.get("attention_factor") is None:
            raise ValueError("rope_parameters.mscale and mscale_all_dim are not read: give the attention_factor they make")
        if rope.get("beta_fast", 32.0) < rope.get("beta_slow", 1.0):
            raise ValueError(f"rope_parameters.beta_fast must not be below beta_slow, got {rope.get('beta_fast', 32.0)!r}")

    def _check_routing(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups or (groups > 1 and experts // groups < 2):
            raise ValueError(f"n_group ({groups}) must divide n_routed_experts ({experts}) into groups of 2 or more")
        if self.topk_group > groups:
            raise ValueError(f"topk_group ({self.topk_group}) must not exceed n_group ({groups})")
        reachable = self.topk_group * (experts // groups)
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed the {reachable} experts "
                f"in the {self.topk_group} chosen of {groups} groups"
            )
        if self.scoring_func not in SCORING_FUNCTIONS:
            raise ValueError(f"scoring_func must be one of {', '.join(SCORING_FUNCTIONS)}, got {self.scoring_func!r}")
        if self.router_balance not in BALANCE_RULES:
            raise ValueError(f"router_balance must be one of {', '.join(BALANCE_RULES)}, got {self.router_balance!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MoEGPTConfig":
        """The preset `name`, the fields in `overrides` replaced; ValueError for an unknown preset or field."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        known = {*cls.attribute_map, "attn_implementation"}
        unknown = [key for key in overrides if not hasattr(cls, key) and key not in known]
        if unknown:
            raise ValueError(f"unknown model configuration field {unknown[0]!r}")
        written = json.loads((PRESETS_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        overrides = {cls.attribute_map.get(key, key): value for key, value in overrides.items()}
        return cls(**{**written, **overrides})

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: without the names of an export's code files, which are not there, or not made for these
        fields. Who called `register_for_auto_class` has this class's own beside it."""
        written: dict[str, Any] = super().to_diff_dict()
        if self._auto_class is None:
            written.pop("auto_map", None)
        return written

    def with_rope_factor(self, factor: float) -> "MoEGPTConfig":
        """A copy whose context is `factor` times the one it was first trained at (YaRN, arXiv 2309.00071).

        `factor` counts from `original_max_position_embeddings`, so applying it twice is the same as once.
        """
        if factor < 1:
            raise ValueError(f"rope factor must be at least 1, got {factor}")
        longer = copy.deepcopy(self)
        rope = {k: v for k, v in (self.rope_parameters or {}).items() if k not in ("rope_type", "attention_factor")}
        original = rope.get("original_max_position_embeddings", self.max_position_embeddings)
        longer.max_position_embeddings = int(original * factor)
        rope.update(factor=float(factor), original_max_position_embeddings=original)
        longer.rope_parameters = longer._complete_rope(rope)
        return longer


def _is_number(value: Any, least: float = 0.0) -> bool:
    """At least that, and what a float holds: not NaN, infinite, or a whole number of 400 digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= sys.float_info.max


#: Above any model's; a damaged or hostile configuration would be built for minutes before its weights are seen to be missing.
MOST_LAYERS = 10_000
_FINITE_FIELDS = (
    "rms_norm_eps",
    "routed_scaling_factor",
    "initializer_range",
    "embedding_initializer_range",
    "router_initializer_range",
)
_BOOLEAN_FIELDS = (
    *("norm_topk_prob", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *(field.name for field in fields(ModelSizes) if field.type == "bool"),
)
_POSITIVE_FIELDS = (*(field.name for field in fields(ModelSizes) if field.type == "int"), "n_group", "topk_group")
