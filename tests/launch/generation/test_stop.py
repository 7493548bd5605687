"""Stop strings across tokens, and streams that never show half of one or half a character."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch.generation.stop import NewText, StopStrings, Stream, cut, safe_length, unescape


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank is put before each text, and taken off where one is decoded; what is in no token is bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abdefnrtu():", "▁▁", "▁▁▁▁", "▁a"]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "a")]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(whole)
    made.add_special_tokens(["<fim_middle>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("prompt", "more"),
    [("def f(a):\n", "    return a\n"), ("def f(a):", " a"), ("# 你", "你\n\n  a"), ("a\n", "\n a"), ("a", "a")],
)
def test_each_blank_is_as_it_was_written(sentencepiece: PreTrainedTokenizerFast, prompt: str, more: str) -> None:
    """One went astray at the beginning, and `    return` was indented by three."""
    before, whole = (sentencepiece(text).input_ids for text in (prompt, prompt + more))
    assert whole[: len(before)] == before
    new = whole[len(before) :]
    assert NewText(sentencepiece).of(new, last=before[-1]) == more
    shown: list[str] = []
    stream = Stream(sentencepiece, (), shown.append)
    for ids in (before, *([one] for one in new)):
        stream.put(torch.tensor(ids))
    stream.end()
    assert "".join(shown) == more
    criterion = StopStrings(sentencepiece, [(more,), (more + "a",)], prompt_length=len(before))
    assert criterion(torch.tensor([whole, whole]), torch.empty(0)).tolist() == [True, False]


def test_a_vocabulary_without_the_letter_decodes_as_it_is() -> None:
    made = Tokenizer(models.WordLevel({"x": 0, "y": 1}, unk_token="<none>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert NewText(PreTrainedTokenizerFast(tokenizer_object=made)).of([0, 1], last=1) == "x y"


def test_what_fills_in_begins_a_text(sentencepiece: PreTrainedTokenizerFast) -> None:
    """Its parts are encoded one by one, each with a blank before it."""
    middle = sentencepiece.get_vocab()["<fim_middle>"]
    for text in ("a", "  a", "return a"):
        assert NewText(sentencepiece).of(sentencepiece(text).input_ids, last=middle) == text


def streamed(tokenizer: PreTrainedTokenizerFast, text: str, stops: tuple[str, ...]) -> list[str]:
    shown: list[str] = []
    stream = Stream(tokenizer, stops, shown.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    ids = tokenizer(text).input_ids
    for n, token in enumerate(ids, 1):
        stream.put(torch.tensor([token]))
        if cut(tokenizer.decode(ids[:n]), stops)[1]:
            break  # as `StopStrings` does
    stream.end()
    return shown


@given(
    st.text(st.sampled_from("abé\n"), max_size=30), st.lists(st.text(st.sampled_from("ab\n"), min_size=1, max_size=4), max_size=3)
)
def test_a_stream_shows_what_the_cut_text_is(bytewise: PreTrainedTokenizerFast, text: str, stops: list[str]) -> None:
    """Piece by piece, and no piece has to be taken back."""
    shown = streamed(bytewise, text, tuple(stops))
    ends = (n for n in range(len(text)) if cut(text[:n], stops)[1])
    whole, found = cut(text[: next(ends, len(text))], stops)
    assert "".join(shown) == whole
    assert found == any(stop in text for stop in stops)
    assert not any("\ufffd" in piece for piece in shown)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert safe_length("return x\n", ["\n\n", "\ndef"]) == len("return x")
    assert safe_length("return x\nde", ["\n\n", "\ndef"]) == len("return x")
    assert safe_length("return x\nd(", ["\n\n", "\ndef"]) == len("return x\nd(")
    assert safe_length("aba", ["abac"]) == 0


def test_a_batch_ends_row_by_row(bytewise: PreTrainedTokenizerFast) -> None:
    rows = torch.tensor([bytewise(text).input_ids for text in ("xx\n\nab", "xxabcd", "xxab\n\n")])
    criterion = StopStrings(bytewise, [("\n\n",)] * 3, prompt_length=2)
    assert criterion(rows[:, :4], torch.empty(0)).tolist() == [True, False, False]
    assert criterion(rows, torch.empty(0)).tolist() == [True, False, True]
    each_its_own = StopStrings(bytewise, [(), ("cd",), ("ab", "y")], prompt_length=2)
    assert each_its_own(rows, torch.empty(0)).tolist() == [False, True, True]
    in_the_prompt = StopStrings(bytewise, [("\n\n",)] * 3, prompt_length=4)
    assert in_the_prompt(rows[:, :5], torch.empty(0)).tolist() == [False, False, False]


def test_a_long_stop_string_ends_a_row(bytewise: PreTrainedTokenizerFast) -> None:
    """Of more than 64 tokens it was cut off at the end, and everything behind it was made in vain."""
    stop = "éabcd" * 20
    rows = torch.tensor([bytewise("xx" + stop).input_ids, bytewise("yxx" + stop[:-1]).input_ids])
    assert StopStrings(bytewise, [(stop,)] * 2, prompt_length=2)(rows, torch.empty(0)).tolist() == [True, False]


def test_escapes_as_one_types_them() -> None:
    assert unescape(r"\n\ndef") == "\n\ndef" and unescape(r"a\\n") == "a\\n" and unescape("\\") == "\\" and unescape(r"\d") == r"\d"


def test_the_first_stop_string_ends_a_text() -> None:
    assert cut("a\nb\ndef c\nclass", ("\nclass", "\ndef")) == ("a\nb", True)
    assert cut("a", ("\n",)) == cut("a", ()) == ("a", False)
