"""Prompts from arguments, files and standard input; filling in, and its refusals."""

import io
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.cli import UserError
from data.tokens.encoder import ReferenceEncoder
from data.tokens.fim import FimOptions, arrange
from launch.generation.prompts import FIM, Prompt, check_filling_in, prompt_ids, read_prompts


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """One token a letter, and the special ones."""
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdef")}, "a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_prompt_without_end_is_not_read_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--prompt_file /dev/zero has more than 16,777,216 characters"):
        read_prompts([], [Path("/dev/zero")], None)
    with open("/dev/zero", encoding="utf-8") as endless:
        monkeypatch.setattr("sys.stdin", endless)
        with pytest.raises(UserError, match="--prompt - has more than"):
            read_prompts(["-"], [], None)


def test_sources_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("file")
    monkeypatch.setattr("sys.stdin", io.StringIO("standard input"))
    found = read_prompts(["one", "-"], [tmp_path / "a.py"], None)
    assert [(prompt.text, prompt.typed) for prompt in found] == [("one", True), ("standard input", False), ("file", False)]


def test_unreadable_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin is no UTF-8 text: byte 3 is 0xe9"):
        read_prompts([], [tmp_path / "latin"], None)
    for stdin, sentence in ((io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"), "no UTF-8 text.* 0xe9"), (None, "has none")):
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(UserError, match=f"--prompt - .*{sentence}"):
            read_prompts(["-"], [], None)
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match="empty is empty"):
        read_prompts([], [tmp_path / "empty"], None)
    assert read_prompts([""], [], suffix="end") == [Prompt(text="", suffix="end", typed=True)]  # nothing before, something after


def test_filling_in_is_asked_as_it_was_trained() -> None:
    """The same order of texts and tokens as `data.tokens.fim` gives a document, up to the middle."""
    words = tokenizer(*FIM)
    ids = {name: words.convert_tokens_to_ids(f"<fim_{name}>") for name in ("prefix", "middle", "suffix")}
    options = FimOptions(rate=1.0, spm_rate=0.0, seed=0, **ids)
    told = arrange("abcdef", 0, b"key", 0, options)
    before, after = told[1][0], told[2][0]
    expected: list[int] = []
    for text, token in told[:-1]:
        expected += [*words(text).input_ids, token]
    assert prompt_ids(Prompt(text=before, suffix=after), words) == expected
    assert prompt_ids(Prompt(text="ab"), words) == words("ab").input_ids


def test_special_tokens_that_a_text_spells(tmp_path: Path) -> None:
    """Training's documents hold them as text; who types one means it, but where the text is one of two parts."""
    words, text = tokenizer("<a>", *FIM), "b<a>c"
    middle = ReferenceEncoder(words.backend_tokenizer.to_str()).ids([text])[0].tolist()
    assert len(middle) == len(text)
    special = [words.get_vocab()[token] for token in FIM]
    assert prompt_ids(Prompt(text=text), words) == middle
    both = prompt_ids(Prompt(text=text, suffix=text, typed=True), words)
    assert both == [special[0], *middle, special[1], *middle, special[2]]
    assert prompt_ids(Prompt(text=text, typed=True), words) == words.convert_tokens_to_ids(["b", "<a>", "c"])
    assert prompt_ids(Prompt(text=text), words) == middle  # nothing of the one before stays


def test_what_was_never_trained_to_fill_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no <fim_prefix>, <fim_suffix>, <fim_middle>"):
        check_filling_in(tmp_path, tokenizer())
    assert "does not say whether" in check_filling_in(tmp_path, tokenizer(*FIM))
    for rate, answer in ((0.0, None), (0.5, "")):
        (tmp_path / "manifest.json").write_text(json.dumps({"fim_rate": rate}))
        if answer is None:
            with pytest.raises(UserError, match="was not trained to fill in"):
                check_filling_in(tmp_path, tokenizer(*FIM))
        else:
            assert check_filling_in(tmp_path, tokenizer(*FIM)) == answer
