"""Secrets stay out of what a run writes down."""

from __future__ import annotations

import pytest

from launch.run.redact import redact


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
