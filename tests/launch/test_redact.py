"""Secrets stay out of what a run writes down."""

from __future__ import annotations

import pytest

from launch.redact import redact


def test_secrets_are_redacted_everywhere() -> None:
    config = {
        "api_key": "x",
        "url": "https://me:pw@host/p",
        "args": ["--x", "s3://k:v@b"],
        "n": {"HF_TOKEN": "t"},
        "tokens": 5,
    }
    assert redact(config) == {
        "api_key": "[redacted]", "url": "https://[redacted]@host/p", "args": ["--x", "s3://[redacted]@b"],
        "n": {"HF_TOKEN": "[redacted]"}, "tokens": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://h/p?token=S", "https://h/p?token=[redacted]"),
        ("https://h/p?a=1&api_key=S#part", "https://h/p?a=1&api_key=[redacted]#part"),
        ("https://h/p?X-Amz-Signature=S&b=2", "https://h/p?X-Amz-Signature=[redacted]&b=2"),
        ("https://h/p?max_steps=7", "https://h/p?max_steps=7"),
    ],
)
def test_tokens_in_the_query_of_a_url(url: str, shown: str) -> None:
    assert redact(["--wandb_project", url]) == ["--wandb_project", shown]


@pytest.mark.parametrize(("start", "length"), [("hf_", 34), ("ghp_", 36), ("github_pat_", 40), ("sk-proj-", 40), ("AKIA", 16)])
def test_tokens_that_give_themselves_away(start: str, length: int) -> None:
    token = start + "A" * length
    assert redact(["--model", f"x/{token}/y"]) == ["--model", "x/[redacted]/y"]
    others = {"commit": "0123456789abcdef0123456789abcdef01234567", "name": "hf_small"}
    assert redact(others) == others
