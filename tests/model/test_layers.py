"""RMSNorm against its formula: statistics and product in fp32, rounded once."""

import pytest
import torch

from model.layers import ResidualLinear, RMSNorm
from tests import reference


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_rms_norm_is_rounded_once(dtype: torch.dtype, limit: float) -> None:
    norm = RMSNorm(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = (torch.randn(200, 48, dtype=torch.float64) * 30).to(dtype)
    exact = reference.rms_norm(x.double(), norm.weight.detach().double(), 1e-5)
    out = norm(x)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= limit * exact.abs() + 1e-12).all()


def test_a_residual_projection_has_no_bias() -> None:
    assert ResidualLinear(3, 4).bias is None
