"""Stop strings across tokens, and streams that never show half of one or half a character."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch.generation.stop import StopStrings, Stream, cut, safe_length, unescape


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


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


def test_escapes_as_one_types_them() -> None:
    assert unescape(r"\n\ndef") == "\n\ndef" and unescape(r"a\\n") == "a\\n" and unescape("\\") == "\\" and unescape(r"\d") == r"\d"


def test_the_first_stop_string_ends_a_text() -> None:
    assert cut("a\nb\ndef c\nclass", ("\nclass", "\ndef")) == ("a\nb", True)
    assert cut("a", ("\n",)) == cut("a", ()) == ("a", False)
