"""Tokenizer folders as others write them: documents end with the token that transformers takes; what is broken is named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data.tokens import folder as folders
from data.tokens import tokenizer as tokenizers
from data.tokens.folder import TokenizerFiles, load

OBJECT = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture
def with_two_ends(tokenizer_text: str, tmp_path: Path) -> Path:
    """A folder whose tokenizer.json has `<|endoftext|>`, `</s>` and `<eos>`, and nothing that says which ends documents."""
    content = json.loads(tokenizer_text)
    for token, number in (("</s>", 600), ("<eos>", 601)):
        content["added_tokens"].append(content["added_tokens"][0] | {"id": number, "content": token})
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


CONFIGS: list[Any] = [
    None,
    {},
    {"eos_token": None},
    {"eos_token": "</s>"},
    {"eos_token": OBJECT},
    {"eos_token": {"__type": "AddedToken", **OBJECT}},
    {"eos_token": "</s>", "added_tokens_decoder": {"600": OBJECT | {"special": True}}},
]
MAPS: list[Any] = [
    None,
    {},
    {"eos_token": "<eos>"},
    {"eos_token": OBJECT | {"content": "<eos>"}},
    {"eos_token": None},
    {"pad_token": "<eos>"},
]


@pytest.mark.parametrize(("config", "special"), list(itertools.product(CONFIGS, MAPS)))
def test_the_end_of_text_is_transformers_(config: Any, special: Any, with_two_ends: Path) -> None:
    """Every pair of files in every legal form; where transformers names none, ours says which one it takes."""
    from transformers import PreTrainedTokenizerFast

    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        if content is not None:
            (with_two_ends / name).write_text(json.dumps(content))
    found = load(str(with_two_ends))
    try:
        theirs = PreTrainedTokenizerFast.from_pretrained(with_two_ends).eos_token
    except TypeError:  # transformers 4 read an object without `__type`, and wrote such; 5 does not
        assert config == {"eos_token": OBJECT}
        theirs = "</s>"
    assert found.end_token == theirs
    facts = tokenizers.facts("x", found)
    assert facts.eos_token == (theirs or "<|endoftext|>")
    assert facts.eos_token_id == {"</s>": 600, "<eos>": 601, None: 0}[theirs]


def test_the_public_report(with_two_ends: Path, tmp_path: Path, corpus: Path, preprocess: Callable) -> None:
    """pytorch/executorch#15215: the map named `</s>`, documents ended with `<|endoftext|>`, and nothing was said."""
    (with_two_ends / "tokenizer_config.json").write_text("{}")
    (with_two_ends / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    code, out, err = preprocess("--input", corpus, "--tokenizer", with_two_ends, "--output", tmp_path / "out")
    assert code == 0, err
    assert f"documents end with '</s>' (id 600, {with_two_ends / 'special_tokens_map.json'})" in out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tokenizer"]["eos_token_id"] == 600


def test_what_is_chosen_is_said(tokenizer_file: Path, tmp_path: Path, corpus: Path, preprocess: Callable) -> None:
    _, out, _ = preprocess("--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / "out")
    assert "documents end with '<|endoftext|>' (id 0)" in out


DEEP = "[" * 1_000_000 + "]" * 1_000_000
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config.json is broken JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json is not a JSON object but list"),
        ("tokenizer_config.json", "null", r"tokenizer_config.json is not a JSON object but NoneType"),
        ("tokenizer_config.json", DEEP, r"tokenizer_config.json is JSON nested too deeply"),
        ("tokenizer_config.json", b"\xff\xfe{", r"tokenizer_config.json is not UTF-8"),
        ("tokenizer_config.json", '{"eos_token": 5}', r"tokenizer_config.json: eos_token is 5; it must be a string"),
        ("tokenizer_config.json", '{"eos_token": ["</s>"]}', r"eos_token is \["),
        ("tokenizer_config.json", '{"eos_token": {"text": "x"}}', r"eos_token is \{"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<none>"}',
            r"names '<none>'.*which tokenizer.json does not have",
        ),
        ("special_tokens_map.json", "{", r"special_tokens_map.json is broken JSON"),
        ("special_tokens_map.json", LFS, r"special_tokens_map.json is a git-LFS pointer: .*git lfs pull"),
        ("special_tokens_map.json", '{"eos_token": "<none>"}', r"special_tokens_map.json names '<none>'"),
        ("tokenizer.json", LFS, r"tokenizer.json is a git-LFS pointer"),
        (
            "tokenizer.json",
            '{"model": ' + DEEP + "}",
            r"is not a tokenizer.json that the tokenizers library reads: recursion limit",
        ),
        ("tokenizer.json", "{}", r"is not a tokenizer.json"),
        ("tokenizer.json", "<html>", r"is not a tokenizer.json"),
        ("tokenizer.json", "", r"is not a tokenizer.json"),
        ("tokenizer.json", b"\x80\x04", r"tokenizer.json is not UTF-8"),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_name(
    name: str, content: str | bytes, message: str, with_two_ends: Path, corpus: Path, tmp_path: Path, preprocess: Callable
) -> None:
    import re

    (with_two_ends / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = preprocess("--input", corpus, "--tokenizer", with_two_ends, "--output", tmp_path / "out")
    assert code == 2 and re.search(message, err) and err.count("\n") == 1, err[:300]


@pytest.mark.parametrize(("number", "sentence"), [(2**31, "shards hold ids up to"), (2**40, "is not a tokenizer.json")])
def test_a_vocabulary_beyond_what_shards_hold_is_refused(number: int, sentence: str, tokenizer_text: str) -> None:
    content = json.loads(tokenizer_text)
    content["model"]["vocab"]["<far>"] = number
    with pytest.raises(ValueError, match=sentence):
        tokenizers.facts("x", TokenizerFiles(json.dumps(content)))


def test_a_byte_order_mark_is_no_part_of_a_file(with_two_ends: Path, tokenizer_text: str) -> None:
    """Editors on Windows begin files with one, and the library refuses it."""
    (with_two_ends / "tokenizer.json").write_text("\ufeff" + tokenizer_text)
    (with_two_ends / "tokenizer_config.json").write_text('\ufeff{"eos_token": "<fim_pad>"}')
    found = load(str(with_two_ends))
    assert (found.text, found.end_token) == (tokenizer_text, "<fim_pad>")


def test_a_huge_file_is_not_read(with_two_ends: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"tokenizer.json has .* bytes; no tokenizer is larger"):
        load(str(with_two_ends))


def test_the_folder_of_shards_has_its_tokenizer_one_folder_below(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    said = f"no tokenizer at {tmp_path}/tokenizer.json; give --tokenizer {tmp_path}/tokenizer"
    with pytest.raises(FileNotFoundError, match=f"^{said}$"):
        load(str(tmp_path))


@pytest.mark.parametrize("other", folders.OTHERS)
def test_a_folder_with_another_kind_of_tokenizer_says_how_to_convert_it(other: str, tmp_path: Path) -> None:
    (tmp_path / other).write_text("x")
    with pytest.raises(FileNotFoundError, match=rf"has {other} and no tokenizer.json; convert it once"):
        load(str(tmp_path))


def lower_casing(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def accents_gone(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}


def unknown_words(content: dict[str, Any]) -> None:
    content["model"] = {"type": "WordLevel", "vocab": {"[UNK]": 5, "<|endoftext|>": 0, "Stack": 1}, "unk_token": "[UNK]"}
    content["pre_tokenizer"], content["decoder"], content["added_tokens"] = (
        {"type": "Whitespace"},
        None,
        content["added_tokens"][:1],
    )


@pytest.mark.parametrize(("change", "sample"), [(lower_casing, "Stack"), (accents_gone, "é"), (unknown_words, "a  b")])
def test_a_tokenizer_that_loses_text_gets_a_warning_with_an_example(
    change: Callable, sample: str, tokenizer_text: str, corpus: Path, tmp_path: Path, preprocess: Callable
) -> None:
    content = json.loads(tokenizer_text)
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    code, _, err = preprocess("--input", corpus, "--tokenizer", tmp_path / "tokenizer.json", "--output", tmp_path / "out")
    assert code == 0 and "does not keep text" in err and repr(sample) in err, err


@pytest.mark.parametrize("which", ["tokenizer_text", "starcoder2"])
def test_a_tokenizer_that_keeps_text_gets_none(which: str, request: Any) -> None:
    assert tokenizers.lossy_example(Tokenizer.from_str(request.getfixturevalue(which))) is None


def test_a_file_that_cuts_and_pads_gives_whole_documents(
    tokenizer_text: str, corpus: Path, tmp_path: Path, preprocess: Callable
) -> None:
    """As `save` leaves it after a batch with `truncation=True, padding="max_length"`."""
    content = json.loads(tokenizer_text)
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    tokens = []
    for number, text in enumerate((tokenizer_text, json.dumps(content))):
        (tmp_path / f"{number}.json").write_text(text)
        out = tmp_path / f"out{number}"
        code, _, err = preprocess("--input", corpus, "--tokenizer", tmp_path / f"{number}.json", "--output", out)
        assert code == 0 and "does not keep text" not in err, err
        tokens.append([path.read_bytes() for path in sorted(out.glob("*/*.bin"))])
    assert tokens[0] and tokens[0] == tokens[1]


def test_a_hub_name_out_of_reach_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"bigcode/starcoder2-15b .*download its tokenizer\.json .*--train_tokenizer 4096"):
        load("bigcode/starcoder2-15b")


def test_a_hub_name_in_reach_is_its_tokenizer_json(monkeypatch: pytest.MonkeyPatch, tokenizer_file: Path) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        if file != "tokenizer.json":
            raise OSError("not there")
        return str(tokenizer_file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load("bigcode/starcoder2-15b") == TokenizerFiles(tokenizer_file.read_text())
    assert asked[0] == ("bigcode/starcoder2-15b", "tokenizer.json")


@pytest.mark.parametrize("name", ["nowhere/tokenizer.json", "/nowhere", "./nowhere/there", "a/b/nowhere"])
def test_a_path_without_a_tokenizer_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*--train_tokenizer"):
        load(name)
