"""The operators whose kernels are in `kernels/`: schema and shapes; whoever counts or compiles needs no GPU.

Chosen by `usable`, on a GPU; everywhere else the plain PyTorch beside each call is what runs, and what the tests compare with.
Their gradients are in the autograd functions beside the plain formulas (`layers.py`, `rope.py`, `dispatch.py`, `router.py`,
`sinks.py`, `loss.py`).

Shapes: T tokens, H hidden, I width, R routed rows, K experts per token, E experts, N query heads, M key-value heads, D head
dim, P positions or programs, C tokens of a chunk, V vocabulary.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ops: Any = torch.ops.moe_gpt


def on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """On the device of the first tensor: Triton launches on the current one, and a model may lie on several GPUs."""

    @wraps(kernel)
    def call(*arguments: Any) -> Any:
        first = arguments[0][0] if isinstance(arguments[0], (list, tuple)) else arguments[0]
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return kernel(*arguments)
        with torch.cuda.device(first.device):
            return kernel(*arguments)

    return call


def _operator(name: str, fake: Callable[..., Any], mutates_args: Sequence[str] = ()) -> Any:
    """`fake`: from the same arguments, outputs of the right shapes and types without a value."""

    def register(kernel: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(name, on_its_device(kernel), mutates_args=mutates_args)
        operator.register_fake(fake)
        return operator

    return register


def _like(x: Tensor) -> Tensor:
    """Contiguous, as kernels write it."""
    return x.new_empty(x.shape)


def _fp32(x: Tensor, shape: int | Sequence[int]) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


@cache
def has_triton() -> bool:
    """Also no where the environment says `MOE_KERNELS=0`, to compare with the plain way on the same GPU."""
    # A copy of this file that transformers makes beside a model has no kernels.
    here = find_spec("triton") is not None and find_spec(f"{__package__}.kernels") is not None
    return here and os.environ.get("MOE_KERNELS") != "0"


def usable(x: Tensor) -> bool:
    """Whether the kernels are for this tensor: on a GPU, with Triton, sums in fp32."""
    return fits(x)


def fits(x: Tensor) -> bool:
    """`usable`'s rule, under a name that whoever counts or tests can replace."""
    return x.device.type == "cuda" and x.dtype in _FLOATS and has_triton()


def fills_tile(*sizes: int) -> bool:
    """Whether kernels can have these as the sizes of a tile: powers of two."""
    return all(size > 0 and size & (size - 1) == 0 for size in sizes)


def _kernels(name: str) -> Any:
    """A module that imports Triton, which not every machine has. By name: transformers copies what a file imports."""
    return import_module(f".kernels.{name}", __package__)


@_operator("moe_gpt::norm", lambda x_TH, added_TH, *_: (x_TH.new_empty(0 if added_TH is None else x_TH.shape), _like(x_TH)))
def norm(x_TH: Tensor, added_TH: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(x + added, its RMSNorm)`; the first is empty where nothing is added."""
    return _kernels("norm").norm_forward(x_TH.contiguous(), _contiguous(added_TH), weight_H, eps)


@_operator("moe_gpt::norm_backward", lambda dout_TH, dstream_TH, x_TH, weight_H, eps: (_like(x_TH), _like(weight_H)))
def norm_backward(dout_TH: Tensor, dstream_TH: Tensor | None, x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(dx, dweight)`; the stream's gradient is added to dx."""
    return _kernels("norm").norm_backward(dout_TH.contiguous(), _contiguous(dstream_TH), x_TH.contiguous(), weight_H, eps)


@_operator("moe_gpt::norm_rope", lambda q_TND, k_TMD, *_: (_like(q_TND), _like(k_TMD)))
def norm_rope(
    q_TND: Tensor, k_TMD: Tensor, weights_D: Sequence[Tensor], cos_PD: Tensor, sin_PD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k, normed by head with the two weights if any, then rotated; token t is at row t mod P of the tables."""
    return _kernels("norm").norm_rope(
        q_TND.contiguous(), k_TMD.contiguous(), weights_D, cos_PD.contiguous(), sin_PD.contiguous(), eps
    )


@_operator(
    "moe_gpt::norm_rope_backward",
    lambda dq_TND, dk_TMD, q_TND, k_TMD, weights_D, *_: (
        _like(q_TND),
        _like(k_TMD),
        _fp32(q_TND, (2, q_TND.shape[2]) if weights_D else 0),
    ),
)
def norm_rope_backward(
    dq_TND: Tensor, dk_TMD: Tensor, q_TND: Tensor, k_TMD: Tensor, weights_D: Sequence[Tensor], cos_PD: Tensor, sin_PD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(dq, dk, dweights [2, D] in fp32)`; without weights the last is empty."""
    dq_TND, dk_TMD, q_TND, k_TMD = (x.contiguous() for x in (dq_TND, dk_TMD, q_TND, k_TMD))
    return _kernels("norm").norm_rope_backward(
        dq_TND, dk_TMD, q_TND, k_TMD, weights_D, cos_PD.contiguous(), sin_PD.contiguous(), eps
    )


@_operator("moe_gpt::add_sink", lambda out_BSND, lse_BNS, sinks_N: (_like(out_BSND), _like(lse_BNS)))
def add_sink(out_BSND: Tensor, lse_BNS: Tensor, sinks_N: Tensor) -> tuple[Tensor, Tensor]:
    """Output and logsumexp with the sink."""
    return _kernels("sinks").add_sink(out_BSND.contiguous(), lse_BNS.contiguous(), sinks_N)


@_operator("moe_gpt::sink_gradient", lambda dout_BSND, out_BSND, lse_BNS, sinks_N: _like(sinks_N))
def sink_gradient(dout_BSND: Tensor, out_BSND: Tensor, lse_BNS: Tensor, sinks_N: Tensor) -> Tensor:
    return _kernels("sinks").sink_gradient(dout_BSND.contiguous(), out_BSND.contiguous(), lse_BNS.contiguous(), sinks_N)


@_operator("moe_gpt::spread", lambda x_TH, places_R, *_: x_TH.new_empty((places_R.shape[0], x_TH.shape[1])))
def spread(x_TH: Tensor, places_R: Tensor, copies: int, weights_TK: Tensor | None) -> Tensor:
    """`[R, H]`: copy k of token t at row `places[t * K + k]`, times its weight if there are any."""
    return _kernels("rows").spread(x_TH.contiguous(), places_R, copies, _contiguous(weights_TK))


@_operator(
    "moe_gpt::collect", lambda rows_RH, places_R, copies, *_: rows_RH.new_empty((places_R.shape[0] // copies, rows_RH.shape[1]))
)
def collect(rows_RH: Tensor, places_R: Tensor, copies: int, a_TH: Tensor | None, b_TH: Tensor | None) -> Tensor:
    """`[T, H]`: of each token the sum of its copies, and of what is given beside them."""
    return _kernels("rows").collect(rows_RH.contiguous(), places_R, copies, _contiguous(a_TH), _contiguous(b_TH))


@_operator("moe_gpt::combine", lambda rows_RH, places_R, weights_TK, *_: rows_RH.new_empty((weights_TK.shape[0], rows_RH.shape[1])))
def combine(rows_RH: Tensor, places_R: Tensor, weights_TK: Tensor, shared_TH: Tensor | None, residual_TH: Tensor | None) -> Tensor:
    """`residual + shared + sum over k of weight * row`."""
    beside = _contiguous(shared_TH), _contiguous(residual_TH)
    return _kernels("rows").combine(rows_RH.contiguous(), places_R, weights_TK.contiguous(), *beside)


@_operator("moe_gpt::weight_gradient", lambda products_R, places_R, weights_TK: _like(weights_TK))
def weight_gradient(products_R: Tensor, places_R: Tensor, weights_TK: Tensor) -> Tensor:
    """`[T, K]`: of each row what it has in `products`, over its weight; 0 where that is 0."""
    return _kernels("rows").weight_gradient(products_R.contiguous(), places_R, weights_TK.contiguous())


@_operator(
    "moe_gpt::swiglu", lambda gate_up: gate_up[0].new_empty((*gate_up[0].shape[:-1], gate_up[0].shape[-1] * len(gate_up) // 2))
)
def swiglu(gate_up: Sequence[Tensor]) -> Tensor:
    """`silu(gate) * up`, of one packed tensor or of two."""
    return _kernels("rows").swiglu([x.contiguous() for x in gate_up])


@_operator(
    "moe_gpt::swiglu_backward",
    lambda dout, gate_up, with_products: [*map(_like, gate_up), _fp32(dout, dout.shape[:-1] if with_products else 0)],
)
def swiglu_backward(dout: Tensor, gate_up: Sequence[Tensor], with_products: bool) -> list[Tensor]:
    """Gradients of what was given, packed where that was; then `<out, dout>` of each row, fp32, or nothing."""
    return _kernels("rows").swiglu_backward(dout.contiguous(), [x.contiguous() for x in gate_up], with_products)


@_operator(
    "moe_gpt::grouped_product", lambda x_RA, ends_E, weights: x_RA.new_empty((x_RA.shape[0], len(weights) * weights[0].shape[1]))
)
def grouped_product(x_RA: Tensor, ends_E: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`[R, W * B]`: of rows that lie by expert the products with the weights `[E, B, A]`, side by side."""
    return _kernels("grouped").product(x_RA.contiguous(), ends_E, [weight.contiguous() for weight in weights])


@_operator(
    "moe_gpt::grouped_product_backward", lambda dout_RB, ends_E, weights: dout_RB.new_empty((dout_RB.shape[0], weights[0].shape[2]))
)
def grouped_product_backward(dout_RB: Tensor, ends_E: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`[R, A]`: one sum over what comes through each of the weights."""
    return _kernels("grouped").product_backward(dout_RB.contiguous(), ends_E, [weight.contiguous() for weight in weights])


@_operator(
    "moe_gpt::grouped_weight_gradient",
    lambda dout_RB, x_RA, ends_E, weights: [
        x_RA.new_empty((ends_E.shape[0], dout_RB.shape[1] // weights, x_RA.shape[1])) for _ in range(weights)
    ],
)
def grouped_weight_gradient(dout_RB: Tensor, x_RA: Tensor, ends_E: Tensor, weights: int) -> list[Tensor]:
    """Of so many weights, each `[E, B, A]`; 0 for an expert without rows."""
    return _kernels("grouped").weight_gradient(dout_RB.contiguous(), x_RA.contiguous(), ends_E, weights)


@_operator(
    "moe_gpt::route",
    lambda x_TH, weight_EH, bias_E, replay_TK, top_k, *_: (
        _fp32(x_TH, (x_TH.shape[0], top_k)),
        x_TH.new_empty((x_TH.shape[0], top_k), dtype=torch.int64),
        x_TH.new_empty(weight_EH.shape[0], dtype=torch.int64),
        _fp32(x_TH, (x_TH.shape[0], weight_EH.shape[0])),
    ),
)
def route(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, replay_TK: Tensor | None, top_k: int, n_group: int, topk_group: int,
    sigmoid: bool, normalise: bool, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`(weights_TK, indices_TK, counts_E, logits_TE)`."""
    given = (x_TH.contiguous(), weight_EH.contiguous(), bias_E, _contiguous(replay_TK))
    return _kernels("router").route(*given, top_k, n_group, topk_group, sigmoid, normalise, factor)


@_operator("moe_gpt::route_backward", lambda dweights_TK, dbeside_TH, x_TH, weight_EH, *_: (_like(x_TH), _like(weight_EH)))
def route_backward(
    dweights_TK: Tensor, dbeside_TH: Tensor | None, x_TH: Tensor, weight_EH: Tensor, logits_TE: Tensor, indices_TK: Tensor,
    sigmoid: bool, normalise: bool, factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`(dx, dweight)`; what came to x from elsewhere is added to dx."""
    given = (dweights_TK.contiguous(), _contiguous(dbeside_TH), x_TH.contiguous(), weight_EH.contiguous())
    return _kernels("router").route_backward(*given, logits_TE, indices_TK.contiguous(), sigmoid, normalise, factor)


@_operator("moe_gpt::add_lift_", lambda *_: None, mutates_args=("histogram_EN",))
def add_lift_(
    histogram_EN: Tensor, logits_TE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int, sigmoid: bool
) -> None:
    """Counts each token's `quantile.bias_lift` into its expert's row of int64 bins."""
    _kernels("router").add_lift_(histogram_EN, logits_TE, bias_E, top_k, n_group, topk_group, sigmoid)


@_operator("moe_gpt::cross_entropy_", lambda logits_CV, *_: _fp32(logits_CV, logits_CV.shape[0]), mutates_args=("logits_CV",))
def cross_entropy_(logits_CV: Tensor, targets_C: Tensor, scale: Tensor, z_weight: float, with_grad: bool, ignore: int) -> Tensor:
    """Each token's share of the loss, fp32; `logits` then holds the gradient, where one is wanted."""
    return _kernels("loss").cross_entropy_(logits_CV, targets_C, scale, z_weight, with_grad, ignore)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


#: Programs of a kernel that sums a weight's gradient, and of the router's, each with a row of partial sums; positions of one head
#: that a program of the sinks' takes.
PROGRAMS, SHARES, POSITIONS = 512, 32, 64
