"""Choices by sizes alone, against the numbers that they stand for."""

from model.heuristics import chunk_rows


def test_tokens_of_a_pass_through_the_head() -> None:
    """256 MiB of logits in fp32 and in bf16, twice the width where that is less, and one where a token's are more than all."""
    assert [chunk_rows(49_152, 1536, size) for size in (4, 2)] == [1365, 2730]
    assert chunk_rows(4096, 256, 2) == 512 and chunk_rows(10**9, 64, 4) == 1
