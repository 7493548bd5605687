"""The ids are those of the tokenizers library on the original tokenizer.json, for whoever loads what we save."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import shared_data
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from data.cli import UserError
from data.pipeline.arguments import MIN_VOCABULARY
from data.tokens import tokenizer as tokenizers
from data.tokens.folder import TokenizerFiles, load

#: A number after indentation: the case that transformers' AutoTokenizer gets wrong for StarCoder2.
DIGITS = "x = [\n        10,\n        200]\n"


def test_trained_tokenizer_has_the_tokens_it_promises(tokenizer_text: str, texts: list[str]) -> None:
    facts = tokenizers.facts("trained", TokenizerFiles(tokenizer_text))
    assert facts.vocab_size == 600 and facts.eos_token == "<|endoftext|>" and facts.eos_token_id == 0
    assert facts.fim == {"prefix": 1, "middle": 2, "suffix": 3}
    tokenizer = Tokenizer.from_str(tokenizer_text)
    special = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
    assert [tokenizer.id_to_token(i) for i in range(5)] == special
    assert [t for t in tokenizer.encode("x = 1234").tokens if t.isdigit()] == ["1", "2", "3", "4"]
    every_byte = "".join(map(chr, range(0x20, 0x800))) + "\U0001f600"
    assert tokenizer.decode(tokenizer.encode(every_byte).ids) == every_byte
    # It has learned: fewer tokens than bytes.
    assert len(tokenizer.encode(texts[0]).ids) < 0.6 * len(texts[0].encode())


def test_training_is_deterministic(tokenizer_text: str, texts: list[str]) -> None:
    assert tokenizers.train(iter(texts), 600) == tokenizer_text


def test_the_smallest_vocabulary_is_bytes_and_special_tokens() -> None:
    """A smaller one is refused before anything is read (`test_arguments.py`)."""
    facts = tokenizers.facts("trained", TokenizerFiles(tokenizers.train(["x"], MIN_VOCABULARY)))
    assert facts.vocab_size == MIN_VOCABULARY


def saved(folder: Path, text: str, name: str = "t") -> Path:
    tokenizers.save(folder, text, tokenizers.facts(name, TokenizerFiles(text)))
    return folder


@pytest.mark.parametrize("which", ["trained", "starcoder2"])
def test_transformers_gives_the_library_s_ids_from_what_we_save(which: str, tmp_path: Path, request: Any, texts: list[str]) -> None:
    text = request.getfixturevalue("tokenizer_text" if which == "trained" else "starcoder2")
    folder = saved(tmp_path / "tokenizer", text)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reference = Tokenizer.from_str(text)
    for loaded in (AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)):
        assert loaded.eos_token_id == 0
        for sample in (DIGITS, *texts[:20]):
            assert loaded(sample)["input_ids"] == reference.encode(sample).ids


def test_nothing_is_added_to_a_prompt(tmp_path: Path, tokenizer_text: str) -> None:
    """Llama's tokenizer begins each text with a token; trained on is the text alone, and an export's prompts began with it."""
    content = json.loads(tokenizer_text)
    template = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
    alone = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    text = json.dumps(content | {"post_processor": {**template, "single": alone, "pair": [*alone, *alone]}})
    assert len(Tokenizer.from_str(text).encode("x = 1").ids) == 1 + len(Tokenizer.from_str(tokenizer_text).encode("x = 1").ids)
    folder = saved(tmp_path / "a", text)
    assert tokenizers.fingerprint((folder / "tokenizer.json").read_text()) == tokenizers.fingerprint(text)
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder)
    assert found("x = 1").input_ids == Tokenizer.from_str(tokenizer_text).encode("x = 1").ids
    assert (saved(tmp_path / "b", tokenizer_text) / "tokenizer.json").read_text() == tokenizer_text


def test_batches_are_padded_before_the_prompt(tmp_path: Path, tokenizer_text: str) -> None:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(saved(tmp_path, tokenizer_text))
    batch = found(["x", "x = 1"], padding=True)
    assert batch.attention_mask[0][0] == 0 and batch.attention_mask[0][-1] == 1
    assert found.pad_token == "<fim_pad>" != found.eos_token and len(found) == len(Tokenizer.from_str(tokenizer_text).get_vocab())


def test_the_class_that_changes_starcoder2_s_ids_is_what_we_bypass(tmp_path: Path, starcoder2: str) -> None:
    """The trap is real: with upstream's tokenizer_config.json AutoTokenizer gives other ids; from what we save it does not."""
    from transformers import AutoTokenizer

    upstream = saved(tmp_path / "upstream", starcoder2)
    (upstream / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}))
    right = Tokenizer.from_str(starcoder2).encode(DIGITS).ids
    assert AutoTokenizer.from_pretrained(upstream)(DIGITS)["input_ids"] != right
    text = load(str(upstream)).text
    assert AutoTokenizer.from_pretrained(saved(tmp_path / "ours", text))(DIGITS)["input_ids"] == right


def test_starcoder2_is_what_the_documentation_says(starcoder2: str) -> None:
    facts = tokenizers.facts("starcoder2", TokenizerFiles(starcoder2))
    assert (facts.vocab_size, facts.eos_token_id, facts.fim) == (49152, 0, {"prefix": 1, "middle": 2, "suffix": 3})
    for path in (shared_data("tokenizer"), shared_data("tokenizer") / "tokenizer.json"):
        assert load(str(path)).text == starcoder2


def test_fingerprint_is_of_what_decides_the_ids(tokenizer_text: str) -> None:
    content = json.loads(tokenizer_text)
    known = tokenizers.fingerprint(tokenizer_text)
    assert tokenizers.fingerprint(json.dumps(content)) == known
    content["model"]["merges"] = [" ".join(m) for m in content["model"]["merges"]]
    content["decoder"] = None
    assert tokenizers.fingerprint(json.dumps(content, indent=3)) == known
    content["model"]["merges"] = content["model"]["merges"][1:]
    assert tokenizers.fingerprint(json.dumps(content)) != known
    for key, value in (("pre_tokenizer", None), ("normalizer", {"type": "NFC"}), ("added_tokens", [])):
        assert tokenizers.fingerprint(json.dumps(json.loads(tokenizer_text) | {key: value})) != known


def test_what_is_no_tokenizer_is_refused(tokenizer_text: str) -> None:
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizers.facts("x", TokenizerFiles("{}"))
    content = json.loads(tokenizer_text)
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokenizers.facts("x", TokenizerFiles(json.dumps(content)))


def test_merges_by_chance_are_refused(tokenizer_text: str) -> None:
    content = json.loads(tokenizer_text)
    content["model"]["dropout"] = 0.1
    with pytest.raises(UserError, match=r"model\.dropout is 0\.1"):
        tokenizers.facts("x", TokenizerFiles(json.dumps(content)))
    content["model"]["dropout"] = 0.0
    assert tokenizers.facts("x", TokenizerFiles(json.dumps(content))).eos_token_id == 0


def test_a_word_without_end_trains_in_pieces() -> None:
    """The library's own time grows with the square of a word: 300,000 letters took 20 s of CPU. Others stay whole."""
    long = "x" * 1000 + "{" * 700 + " " * 300 + "é9" * 500
    pieces = list(tokenizers._short_words(long))
    assert "".join(pieces) == long and [len(piece) for piece in pieces[:3]] == [256, 256, 256]
    assert list(tokenizers._short_words("def f(x):\n    return x\n")) == ["def f(x):\n    return x\n"]
    started = time.process_time()
    text = tokenizers.train(["x" * 300_000, "ok = 1\n" * 50], 300)
    assert time.process_time() - started < 10
    ids = Tokenizer.from_str(text).encode("x" * 64 + "ok = 1\n")
    assert len(ids.ids) < 20 and Tokenizer.from_str(text).decode(ids.ids) == "x" * 64 + "ok = 1\n"


LETTERS = {character: number for number, character in enumerate(map(chr, [9, 10, *range(32, 127)]))}


def merged(words: list[str]) -> models.BPE:
    """Characters and `words`, which merges make letter by letter."""
    vocabulary, merges = dict(LETTERS), []
    for word in words:
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            merges.append((word[: end - 1], word[end - 1]))
    return models.BPE(vocab=vocabulary, merges=merges)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_an_end_of_text_that_a_text_can_have_is_refused(ignore_merges: bool) -> None:
    by_merges = merged(["END"])
    by_merges.ignore_merges = ignore_merges
    merged_on = models.BPE(vocab={"END": 0, "x": 1, "ENDx": 2}, merges=[("END", "x")], ignore_merges=True)
    unknown = models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>")
    known = {"</s>", *"</s> ()x\n", *"".join(tokenizers.SAMPLES)}  # so that nothing of the check's own is unknown
    rarely = models.Unigram([(word, float(-len(word))) for word in sorted(known, key=len, reverse=True)], unk_id=0)
    for model, token in ((by_merges, "END"), (by_merges, "~"), (merged_on, "END"), (unknown, "</s>"), (rarely, "</s>")):
        tokenizer = Tokenizer(model)
        number = tokenizer.token_to_id(token)
        with pytest.raises(UserError, match=rf"tokenizer x can give text the id {number} of '{token}'"):
            tokenizers.check_reach("x", tokenizer.to_str(), {token: number})
    tokenizer = Tokenizer(by_merges)
    tokenizer.add_tokens(["</s>"])  # not even as a special one
    tokenizers.check_reach("x", tokenizer.to_str(), {"</s>": tokenizer.token_to_id("</s>")})


def test_a_fim_token_that_a_text_can_have_is_refused_where_it_is_used(tmp_path: Path, preprocess: Any, corpus: Path) -> None:
    special = ["</s>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    Tokenizer(merged(special[1:2])).save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "t.json"))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(tmp_path / "t.json"))
    flags = ["--input", corpus, "--tokenizer", tmp_path / "t.json", "--output", tmp_path / "out"]
    code, _, err = preprocess(*flags, "--fim_rate", 0.5)
    assert code == 2 and "of '<fim_prefix>', which may only stand between texts" in err, err
    assert preprocess(*flags)[0] == 0


def llama() -> Tokenizer:
    """As Llama 2's: a space before each text."""
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 200, **LETTERS}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["</s>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"])
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordPiece({"[UNK]": 200, **LETTERS, **{f"##{c}": i + 300 for c, i in LETTERS.items()}}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def space_before(text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def test_a_tokenizer_that_puts_a_space_at_each_cut_is_refused(tokenizer_text: str, starcoder2: str) -> None:
    """With it every document that was rearranged had two spaces more, in the middle of words."""
    for tokenizer in (llama(), word_pieces(), space_before(tokenizer_text)):
        with pytest.raises(
            UserError, match=r"--fim_rate cuts documents, and tokenizer x .*'r' and 'eturn  left.n' come back as ' ?r eturn"
        ):
            tokenizers.check_cuts("x", tokenizer)
    for text in (tokenizer_text, starcoder2):
        tokenizers.check_cuts("x", Tokenizer.from_str(text))
        tokenizers.check_cuts("x", Tokenizer.from_str(json.dumps(json.loads(text) | {"decoder": None})))
    with pytest.raises(UserError, match="come back as 'ĠrĠeturn"):
        tokenizers.check_cuts(
            "x", Tokenizer.from_str(json.dumps(json.loads(space_before(tokenizer_text).to_str()) | {"decoder": None}))
        )


def test_fill_in_the_middle_with_a_space_at_each_cut_ends_the_command(tmp_path: Path, preprocess: Any, corpus: Path) -> None:
    llama().save(str(tmp_path / "t.json"))
    flags = ["--input", corpus, "--tokenizer", tmp_path / "t.json", "--output", tmp_path / "out"]
    code, _, err = preprocess(*flags, "--fim_rate", 0.5)
    assert code == 2 and "--fim_rate cuts documents" in err and "Traceback" not in err
    assert preprocess(*flags)[0] == 0


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([("</s>", 0.0), *((c, -2.0) for c in LETTERS)], unk_id=None),
        models.WordPiece({"</s>": 0, "a": 1}, unk_token="[UNK]"),
        models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_tokenizer_without_an_unknown_token_is_one_sentence(model: Any, tmp_path: Path, preprocess: Any, corpus: Path) -> None:
    Tokenizer(model).save(str(tmp_path / "t.json"))
    code, _, err = preprocess("--input", corpus, "--tokenizer", tmp_path / "t.json", "--output", tmp_path / "out")
    assert code == 2 and f"tokenizer {tmp_path / 't.json'} has no id for a part of a text" in err and err.count("\n") == 1, err
