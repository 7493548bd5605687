"""YaRN against transformers' tables and against the paper's formula written out."""

import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

from model.config import MoEGPTConfig
from model.glm4_moe import to_glm4_moe
from model.rope import RotaryTable, apply_rope, rope_table, yarn_concentration, yarn_frequencies
from tests import reference


def config(factor: float, original: int = 2048, **rope: float) -> MoEGPTConfig:
    return MoEGPTConfig.preset(
        "800m",
        max_position_embeddings=int(original * factor),
        rope_parameters={"factor": factor, "original_max_position_embeddings": original, **rope},
    )


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 8.0, 40.0])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("original", [128, 512, 2048, 4096, 131_072])  # at the first nothing turns 32 times, at the last all once
def test_frequencies_equal_transformers_and_the_paper(factor: float, head_dim: int, original: int) -> None:
    c = config(factor, original)
    c.head_dim = head_dim
    ours = yarn_frequencies(c.rope_parameters, head_dim)
    theirs, concentration = ROPE_INIT_FUNCTIONS["yarn"](c, device="cpu")
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)  # theirs is fp32 throughout
    assert yarn_concentration(c.rope_parameters) == pytest.approx(concentration, rel=1e-12)
    written_out = reference.yarn_frequencies(head_dim, 10_000.0, factor, original)
    torch.testing.assert_close(ours, torch.tensor(written_out, dtype=torch.float64), rtol=1e-12, atol=0)


def test_other_betas_and_theta() -> None:
    c = config(4.0, beta_fast=16.0, beta_slow=2.0, rope_theta=500_000.0)
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](c, device="cpu")
    ours = yarn_frequencies(c.rope_parameters, 64)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)  # theirs is fp32 throughout
    written_out = reference.yarn_frequencies(64, 500_000.0, 4.0, 2048, 16.0, 2.0)
    torch.testing.assert_close(ours, torch.tensor(written_out, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_ramp_without_a_length_blends_nothing() -> None:
    """Within five positions nothing turns once: both ends are at 0, and transformers puts a thousandth between them as well."""
    c = config(4.0, 5)
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](c, device="cpu")
    ours = yarn_frequencies(c.rope_parameters, 64)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)
    plain = yarn_frequencies(config(1.0).rope_parameters, 64)
    assert torch.equal(ours, torch.cat((plain[:1], plain[1:] / 4)))


def test_what_all_turns_often_enough_is_kept() -> None:
    """At a theta of 10 every dimension turns beta_fast times, and the ramp begins behind its own end. As the paper has it; the
    published code, and transformers with it, divides by a negative length there and slows all of them down."""
    c = config(4.0, 131_072, rope_theta=10.0)
    plain = [10 ** (-i / 32) for i in range(32)]
    assert reference.yarn_frequencies(64, 10.0, 4.0, 131_072) == pytest.approx(plain, rel=1e-12)
    assert yarn_frequencies(c.rope_parameters, 64).tolist() == pytest.approx(plain, rel=1e-12)
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](c, device="cpu")
    assert theirs.tolist() == pytest.approx([one / 4 for one in plain], rel=1e-5)


def test_a_factor_on_the_attention_is_taken_as_given() -> None:
    c = config(4.0, attention_factor=0.7)
    _, theirs = ROPE_INIT_FUNCTIONS["yarn"](c, device="cpu")
    assert yarn_concentration(c.rope_parameters) == theirs == 0.7
    plain, given = (rope_table(other.rope_parameters, 64, 5) for other in (config(4.0), c))
    for without, with_it in zip(plain, given, strict=True):
        torch.testing.assert_close(with_it, without * (0.7 / (0.1 * math.log(4) + 1)))
    longer = c.with_rope_factor(8)  # which it was not given for
    assert yarn_concentration(longer.rope_parameters) == pytest.approx(0.1 * math.log(8) + 1)


def test_plain_rope_reads_nothing_of_yarns() -> None:
    """As transformers: its cos and sin were scaled by a `factor` or `attention_factor` beside it all the same."""
    for unread in ({"factor": 4.0}, {"factor": 4.0, "attention_factor": 0.7}, {"attention_factor": 0.7}):
        rope = {"rope_type": "default", "rope_theta": 10_000.0, **unread}
        c = MoEGPTConfig.preset("tiny", attention_sinks=False, rope_parameters=rope)
        positions = torch.arange(200)[None]
        cos, sin = Glm4MoeRotaryEmbedding(to_glm4_moe(c))(torch.empty(0), positions)
        ours = RotaryTable(c)(positions, 0, 200, torch.device("cpu"))
        torch.testing.assert_close(ours[0], cos, rtol=0, atol=3e-5)  # theirs has fp32 angles
        torch.testing.assert_close(ours[1].abs(), sin.abs(), rtol=0, atol=3e-5)


def test_the_ramp_points_the_right_way() -> None:
    """Fast dimensions keep their frequency, slow ones are divided by the factor: litgpt has it the other way round."""
    ratio = yarn_frequencies(config(8.0).rope_parameters, 64) / yarn_frequencies(config(1.0).rope_parameters, 64)
    assert ratio[0] == 1.0
    assert ratio[-1] == 1 / 8
    assert (ratio.diff() <= 0).all()
    assert ((ratio > 1 / 8) & (ratio < 1)).any()  # there is a ramp between


def test_factor_one_is_plain_rope() -> None:
    plain = [10_000.0 ** (-2 * i / 64) for i in range(32)]
    torch.testing.assert_close(yarn_frequencies(config(1.0).rope_parameters, 64).tolist(), plain, rtol=1e-14, atol=0)
    assert yarn_concentration(config(1.0).rope_parameters) == 1.0
    assert yarn_concentration(config(4.0).rope_parameters) == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_rotation_is_a_complex_multiplication(factor: float) -> None:
    rope = config(factor).rope_parameters
    x = torch.randn(2, 7, 3, 64, dtype=torch.float64)
    cos, sin = rope_table(rope, 64, 7)
    frequencies = torch.tensor(reference.yarn_frequencies(64, 10_000.0, factor, 2048), dtype=torch.float64)
    angles = torch.arange(7, dtype=torch.float64)[None, :, None, None] * frequencies
    expected = reference.rotate(x, angles, 0.1 * math.log(factor) + 1)
    # The table is fp32, so this is its rounding and no more.
    torch.testing.assert_close(apply_rope(x, cos[None], sin[None]), expected, rtol=0, atol=1e-6)


def test_the_table_is_exact_far_out_and_survives_bf16() -> None:
    """At position 8,191 angles in fp32 would be off by up to 5e-4; a table cast to bf16 by 4e-3."""
    rope = config(4.0).rope_parameters
    table = RotaryTable(config(4.0)).bfloat16()
    positions = torch.tensor([[0, 2047, 8191]])
    cos, sin = table(positions, 0, 3, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert not list(table.buffers()) and not list(table.parameters())
    frequencies = reference.yarn_frequencies(64, 10_000.0, 4.0, 2048)
    for row, position in enumerate(positions[0].tolist()):
        scale = yarn_concentration(rope)
        cosines = [math.cos(position * f) * scale for f in frequencies]
        sines = [math.sin(position * f) * scale for f in frequencies]
        torch.testing.assert_close(cos[0, row].tolist(), cosines * 2, rtol=0, atol=7e-8)
        torch.testing.assert_close(sin[0, row].tolist(), [-x for x in sines] + sines, rtol=0, atol=7e-8)


def test_given_positions_and_counted_ones_agree() -> None:
    table, device = RotaryTable(config(1.0)), torch.device("cpu")
    counted = table(None, 5, 4, device)
    given = table(torch.tensor([[5, 6, 7, 8]]), 0, 4, device)
    assert torch.equal(counted[0], given[0]) and torch.equal(counted[1], given[1])
    assert table(None, 0, 256, device)[0].shape[1] == 256
    assert table(None, 0, 257, device)[0].shape[1] == 257  # one more than it had
    assert RotaryTable(config(1.0))(torch.tensor([[256]]), 0, 1, device)[0].shape == (1, 1, 64)
    beyond = table(None, 5000, 3, device)  # grows on demand
    assert beyond[0].shape == (1, 3, 64)


def test_a_moved_model_makes_its_table_anew() -> None:
    table = RotaryTable(config(1.0))
    for device in map(torch.device, ("cpu", "meta", "cpu")):
        assert {x.device for x in table(None, 0, 4, device)} == {device}


def test_a_table_that_inference_made_is_one_to_train_with() -> None:
    """Moved to another device in inference mode it was none: "Inference tensors cannot be saved for backward"."""
    table = RotaryTable(config(1.0))
    with torch.inference_mode():
        table(None, 0, 4, torch.device("meta"))
    cos, _ = table(None, 0, 4, torch.device("meta"))
    (torch.empty(1, 4, 64, device="meta", requires_grad=True) * cos).sum().backward()
