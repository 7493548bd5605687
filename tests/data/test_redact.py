"""Secrets stay out of what is said and written down."""

from __future__ import annotations

import time

import pytest

from data.redact import redact, redact_text


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
        ("https://h/p?a=1&sig=S&b=2", "https://h/p?a=1&sig=[redacted]&b=2"),
        ("https://h/p?max_steps=7", "https://h/p?max_steps=7"),
    ],
)
def test_tokens_in_the_query_of_a_url(url: str, shown: str) -> None:
    assert redact(["--wandb_project", url]) == ["--wandb_project", shown]


@pytest.mark.parametrize("name", ["apikey", "apiKey", "secretAccessKey", "wandb_token", "passphrase", "HF_TOKEN", "private_key"])
def test_names_of_secrets(name: str) -> None:
    assert redact({name: "S"}) == {name: "[redacted]"}
    command = redact({"command": ["train.py", f"--{name}", "S", "--max_steps", "5"]})["command"]
    assert command == ["train.py", f"--{name}", "[redacted]", "--max_steps", "5"]
    others = {"eos_token": "</s>", "tokens": "5", "monkey": "x", "keyboard": "y"}
    assert redact(others) == others


@pytest.mark.parametrize("name", ["api-key", "access-token", "hf-token", "Authorization", "secretKey", "SSHKey", "X-Api-Key"])
def test_names_with_hyphens_and_in_camel_case(name: str) -> None:
    assert redact({name: "Bearer S"}) == {name: "[redacted]"}
    assert redact([f"--{name}", "S", "--steps", "5"]) == [f"--{name}", "[redacted]", "--steps", "5"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12345678, "[redacted]"),
        (1.5, "[redacted]"),
        ({"value": "S", "n": {"of": 3}}, {"value": "[redacted]", "n": {"of": 3}}),
        ({"value": ["S", 7]}, {"value": ["[redacted]", "[redacted]"]}),
        *((kept, kept) for kept in (None, True, False, "", [], {}, [1, 2], {"a": [1]})),
    ],
)
def test_values_of_a_secret(value: object, shown: object) -> None:
    assert redact({"password": value}) == {"password": shown}


def test_ordinary_settings_stay() -> None:
    settings = {"vocab": {"tokens": "x"}, "num_tokens": 5, "max_new_tokens": 7, "tokenizer": "hf/x", "eosToken": "</s>"}
    settings |= {"eos_token": "</s>", "pad_token_id": 0, "eos-token": "</s>", "keys": "x", "hotkeys": ["a"], "author": "me"}
    assert redact(settings) == settings


@pytest.mark.parametrize("path", ["in/secret", "secret", "/run/secrets/api_key", "x/hf-token", "my.password", "-/passwd"])
def test_a_path_is_no_name_of_what_is_said_of_it(path: str) -> None:
    assert redact_text(f"error: {path}: Permission denied") == f"error: {path}: Permission denied"


def test_a_password_may_have_an_at() -> None:
    assert redact(["https://me:p@ss@host/p?x=a@b"]) == ["https://[redacted]@host/p?x=a@b"]


@pytest.mark.parametrize(
    ("start", "length"), [("hf_", 34), ("ghp_", 36), ("github_pat_", 40), ("sk-proj-", 40), ("AKIA", 16), ("ASIA", 16)]
)
def test_tokens_that_give_themselves_away(start: str, length: int) -> None:
    token = start + "A" * length
    assert redact(["--model", f"x/{token}/y"]) == ["--model", "x/[redacted]/y"]
    others = {"commit": "0123456789abcdef0123456789abcdef01234567", "name": "hf_small"}
    assert redact(others) == others


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("error: https://me:pw@h/p is not there", "error: https://[redacted]@h/p is not there"),
        ("error: https:/me:pw@h/p is not there", "error: https:/[redacted]@h/p is not there"),  # what pathlib makes of it
        ("PosixPath('s3:/me:pw@h')", "PosixPath('s3:/[redacted]@h')"),
        ("no 'https://h/p?token=S': none", "no 'https://h/p?token=[redacted]': none"),
        ("unrecognized arguments: --api_key S --epochs 3", "unrecognized arguments: --api_key [redacted] --epochs 3"),
        ("unrecognized arguments: --hf-token=S; --help", "unrecognized arguments: --hf-token=[redacted]; --help"),
        ("WANDB_API_KEY=S is refused", "WANDB_API_KEY=[redacted] is refused"),
        ("--apikey S --wandb_token=S --passphrase S", "--apikey [redacted] --wandb_token=[redacted] --passphrase [redacted]"),
        ("DB_PASSWD=S --token=-S --secretKey=S", "DB_PASSWD=[redacted] --token=[redacted] --secretKey=[redacted]"),
        ("--password 'two words' b", "--password '[redacted]' b"),
        ('API_KEY="it\'s two" b', 'API_KEY="[redacted]" b'),
        ('{"api_key": "S T", "lr": 1}', '{"api_key": "[redacted]", "lr": 1}'),
        ("{'api-key':'S'} hf_token: S, b", "{'api-key':'[redacted]'} hf_token: [redacted], b"),
        ("Authorization: Bearer S b", "Authorization: [redacted] b"),
        ("WANDB_TOKEN=S PASSPHRASE=S eos_token=</s>", "WANDB_TOKEN=[redacted] PASSPHRASE=[redacted] eos_token=</s>"),
    ],
)
def test_secrets_in_a_line(text: str, shown: str) -> None:
    assert redact_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "unknown key: lr; key 'betas' is a list",
        "--eos_token S --keyword b --max_tokens 5 --monkey c --api_key --next",
        "num_tokens: 5, tokenizer: 'x', max_new_tokens=7, eos_token: '</s>', pad_token_id=0, vocab_key_count: 3",
        "/data/run:/me@host and C:/me@host and gs://bucket/a@b and git@github.com:x/y",
    ],
)
def test_other_lines_stay(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize("part", ["-", "--a", "a", "api_", "'", "key: ", "password: "])
def test_a_long_line_takes_no_time(part: str) -> None:
    """20,000 hyphens took over a minute."""
    began = time.process_time()
    redact_text(part * (20_000 // len(part)))
    assert time.process_time() - began < 2


def test_values_of_a_command_line_follow_their_flags() -> None:
    assert redact(["--api_key", "S", "--hf-token", "T", "--steps", "5"]) == [
        "--api_key", "[redacted]", "--hf-token", "[redacted]", "--steps", "5",
    ]  # fmt: skip
