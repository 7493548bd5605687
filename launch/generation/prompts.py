"""What is to be continued, and its token ids: plain, or cut for filling in the middle."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, AnyStr

from transformers import PreTrainedTokenizerFast

from data.cli import UserError
from data.files import read_object
from launch.cli import check_utf8
from launch.manifest import MANIFEST

FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")  # in the order in which data/preprocess.py writes them (PSM)
PROMPT_MOST = 1 << 24  # characters, or bytes of a file


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`suffix` None: continue `text`. Otherwise: write what stands between the two.

    `typed`: the special tokens that the text spells are meant. In a file's they are text, as in the documents of training.
    """

    text: str
    suffix: str | None = None
    typed: bool = False


def read_prompts(texts: list[str], files: list[Path], suffix: str | None) -> list[Prompt]:
    """`--prompt`s, then `--prompt_file`s; `-` is standard input. Raises UserError for an empty or unreadable one."""
    found = [("--prompt -", _standard_input()) if text == "-" else ("--prompt", text) for text in texts]
    for path in files:
        try:
            with path.open("rb") as file:
                text = _bounded(f"--prompt_file {path}", file).decode()
            found.append((f"--prompt_file {path}", io.StringIO(text, newline=None).read()))  # a line ends in \n alone
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompt_file {path} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
            ) from None
    for name, text in found:
        if not text and suffix is None:
            raise UserError(f"{name} is empty; give the text to continue")
    return [Prompt(text=text, suffix=suffix, typed=name == "--prompt") for name, text in found]


def _standard_input() -> str:
    if sys.stdin is None:  # closed when the process started
        raise UserError("--prompt - reads standard input, and this process has none")
    try:
        text: str = _bounded("--prompt -", sys.stdin)
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt - is no {error.encoding.upper()} text: it has a byte {error.object[error.start]:#04x}") from None
    return text


def _bounded(name: str, file: IO[AnyStr]) -> AnyStr:
    """All of it, unless it has no end: a device, or a program that writes on and on."""
    read = file.read(PROMPT_MOST + 1)
    if len(read) > PROMPT_MOST:
        raise UserError(f"{name} has more than {PROMPT_MOST:,} characters, which no model continues; give the end of it")
    return read


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Raises UserError where nothing is left to continue."""

    def encode(text: str) -> list[int]:
        check_utf8(text, "the text to continue")
        as_text = not prompt.typed or prompt.suffix is not None
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=as_text).input_ids
        return ids

    if prompt.suffix is None:
        ids = encode(prompt.text)
        if not ids:
            raise UserError("the text to continue has no token that the tokenizer knows")
        return ids
    before, after, middle = (int(tokenizer.get_vocab()[token]) for token in FIM)
    # Each part by itself, as the documents were encoded that the model was trained on.
    return [before, *encode(prompt.text), after, *encode(prompt.suffix), middle]


def lacking_fim(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return [token for token in FIM if token not in vocabulary]


def check_filling_in(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """A warning, or "". Raises UserError where the model cannot fill in: no such tokens, or never trained to."""
    if lacking := lacking_fim(tokenizer):
        raise UserError(f"--suffix: the tokenizer of {folder} has no {', '.join(lacking)}, so the model cannot fill in")
    rate = read_object(folder / MANIFEST).get("fim_rate")
    if rate == 0:
        raise UserError(f"--suffix: {folder} was not trained to fill in; data/preprocess.py --fim_rate makes shards for it")
    return f"warning: {folder} does not say whether it was trained to fill in" if rate is None else ""
