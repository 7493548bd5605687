"""Products of fp32 on an x86 CPU by oneDNN: PyTorch sends them to MKL, which on AMD's processors has half the speed.

On a thread of an EPYC 4,096 rows through 256 x 1,024 go at 229 GFLOP/s against 99, one to sixteen through a MiB or more of weights
in 0.4 to 0.8 of the time. Two rows through smaller ones take longer. No gradients.

Shapes: R rows, E experts, A inputs, B outputs.
"""

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: A product with fewer rows and less weight is MKL's.
LEAST_ROWS, LEAST_BYTES = 16, 1 << 20


def available() -> bool:
    """Inductor's operator, which takes plain weights as they are; private, so that another PyTorch may lack it."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    return known and platform.machine() in ("x86_64", "AMD64")


AVAILABLE = available()


def takes(x: Tensor, weight_BA: Tensor) -> bool:
    """Whether oneDNN is the faster one for `x @ weight.T`."""
    if not AVAILABLE or x.dtype != torch.float32 or weight_BA.dtype != torch.float32 or weight_BA.device.type != "cpu":
        return False
    return weight_BA.nbytes >= LEAST_BYTES or x.numel() >= LEAST_ROWS * x.shape[-1]


def linear(x: Tensor, weight_BA: Tensor) -> Tensor:
    """`F.linear` without a bias, by the faster of the two libraries."""
    if takes(x, weight_BA):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_BA, None, "none", [], "")
        return out
    return F.linear(x, weight_BA)


def grouped(x_RA: Tensor, weight_EAB: Tensor, ends_E: Tensor) -> Tensor:
    """`F.grouped_mm` of rows that are sorted by expert."""
    ends = ends_E.tolist()
    runs = zip([0, *ends[:-1]], ends, weight_EAB.mT.unbind(), strict=True)
    return torch.cat([linear(x_RA[start:end], weight_BA) for start, end, weight_BA in runs])


class FasterProducts(TorchFunctionMode):
    """Within it a model's linear layers and experts are multiplied by whoever is faster. Only where no gradient is recorded."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.linear and not given and all(bias is None for bias in args[2:]) and takes(*args[:2]):
            return linear(*args[:2])
        if func is F.grouped_mm and len(args) == 2 and set(given) == {"offs"} and takes(args[0], args[1][0].mT):
            return grouped(*args, given["offs"])
        return func(*args, **given)
