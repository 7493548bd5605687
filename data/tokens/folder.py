"""Tokenizer folders as others write them: `tokenizer.json`, and the token that ends documents from whichever file names it.

The precedence is that of transformers 5 (tokenization_utils_base.py, `_from_pretrained`): where `tokenizer_config.json` has an
`added_tokens_decoder`, it alone counts; otherwise what `special_tokens_map.json` says, null included, replaces it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data.cli import NotFound, UserError
from data.pointers import pointer
from data.terminal import say, stdout

TOKENIZER, CONFIG, SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
#: Larger than any vocabulary: the largest known are of some 35 MB.
MAX_BYTES = 512 << 20
#: What a folder without `tokenizer.json` may hold instead.
OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")


class TokenizerFiles(NamedTuple):
    """`text` of tokenizer.json; `end_token` as a configuration names it, and the file that does."""

    text: str
    end_token: str | None = None
    named_by: str = ""


def load(name: str) -> TokenizerFiles:
    """The tokenizer of a file, a folder or a hub name. Raises NotFound with a way to get one, UserError for a broken file."""
    path = Path(name)
    if path.is_dir():
        path = path / TOKENIZER
        _check_folder(path)
    if path.is_file():
        return _read(path, lambda other: found if (found := path.with_name(other)).is_file() else None)
    if name.startswith((".", "/", "~")) or path.suffix == ".json" or Path(name).exists() or name.count("/") > 1:
        kept = path.parent / "tokenizer" / TOKENIZER  # of a folder of shards, or of a run
        if path.name == TOKENIZER and kept.is_file():
            raise NotFound(f"no tokenizer at {path}; give --tokenizer {kept.parent}")
        raise NotFound(f"no tokenizer at {path}; give a tokenizer.json, its folder, a hub name, or --train_tokenizer 4096")
    return _from_hub(name)


def _check_folder(path: Path) -> None:
    found = [other for other in OTHERS if (path.parent / other).exists()]
    if found and not path.exists():
        raise NotFound(
            f"{path.parent} has {found[0]} and no tokenizer.json; convert it once with transformers: "
            f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained(FOLDER)"
        )


def _from_hub(name: str) -> TokenizerFiles:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    say(f"looking for tokenizer {name} on the hub", stdout)  # without a network that takes half a minute of attempts
    try:
        from huggingface_hub import hf_hub_download

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns at each attempt; the last failure is said below
        path = Path(hf_hub_download(name, TOKENIZER))
    except Exception as error:  # every way a network, a proxy, a login or a name can fail
        raise NotFound(
            f"tokenizer {name} is not on this machine and could not be fetched from the hub ({type(error).__name__}): download its "
            "tokenizer.json elsewhere and pass that file to --tokenizer, or train one here with --train_tokenizer 4096"
        ) from error

    def fetch(other: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, other))
        except Exception:  # a tokenizer without a configuration is complete
            return None

    return _read(path, fetch)


def _read(path: Path, find: Callable[[str], Path | None]) -> TokenizerFiles:
    """`find` gives the path of another file of the same tokenizer."""
    text = read_text(path)
    config_path, map_path = find(CONFIG), find(SPECIAL_MAP)
    config = _json_object(config_path) if config_path else {}
    token, by = config.get("eos_token"), config_path
    if map_path and "added_tokens_decoder" not in config:
        special = _json_object(map_path)
        if "eos_token" in special:
            token, by = special["eos_token"], map_path
    end_token = _content(token, by)
    return TokenizerFiles(text, end_token, str(by) if end_token is not None else "")


def _content(token: Any, path: Path | None) -> str | None:
    """A token as a string, as an object with its `content`, or null. Raises UserError for anything else."""
    if isinstance(token, dict):
        token = token.get("content", token)
    if token is None or isinstance(token, str):
        return token
    shown = json.dumps(token, default=str)[:60]
    raise UserError(f'{path}: eos_token is {shown}; it must be a string, or an object like {{"content": "<|endoftext|>"}}')


def read_text(path: Path) -> str:
    """A file of UTF-8. Raises UserError with its name where it is something else or too large."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; no tokenizer is larger than {MAX_BYTES:,}")
    data = path.read_bytes()
    if stands_for := pointer(data):
        raise UserError(f"{path} is a {stands_for.name}: {stands_for.remedy}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except RecursionError as error:
        raise UserError(f"{path} is JSON nested too deeply") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is broken JSON ({error}); mend it, or remove it if {TOKENIZER} says all") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object but {type(content).__name__}")
    return content
