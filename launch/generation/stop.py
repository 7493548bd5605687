"""Stop strings: found across tokens, cut off, and never shown half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria

from data.cli import UserError
from data.tokens.encoder import naming_what_has_no_id

TAIL = 64  # tokens looked at for a stop string, or as many as its bytes: each has one of them at least


def unescape(text: str) -> str:
    r"""A stop string as one types it: \n, \t and \\ are what they say."""
    pairs = {"n": "\n", "t": "\t", "\\": "\\"}
    out, rest = [], iter(text)
    for character in rest:
        if character == "\\":
            following = next(rest, "")
            character = pairs.get(following, "\\" + following)
        out.append(character)
    return "".join(out)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`(text before the first stop string, whether there was one)`."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class NewText:
    """The text of new tokens, in which stop strings are looked for: nothing of special tokens, each blank as it was written.

    Tokenizers of SentencePiece's kind put a blank before a text that they encode, and decoding takes it off. New tokens go on in a
    text: they are decoded behind a letter, which is cut off. (Behind the prompt's last token they could not be: where bytes are
    tokens it may be the end of a character.) Behind an added token, such as <fim_middle>, a text begins and has that blank.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self.letter: list[int] = []
        with suppress(UserError), naming_what_has_no_id("the tokenizer"):
            self.letter = tokenizer("a", add_special_tokens=False).input_ids

    def of(self, ids: list[int], *, last: int) -> str:
        """last: the prompt's last token."""
        before = [] if last in self.added else self.letter
        text = self._decoded(before + ids)
        known = self._decoded(before)
        return text[len(known) :] if text.startswith(known) else self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def safe_length(text: str, stops: Sequence[str]) -> int:
    """How much of `text` can be shown: what may be the beginning of a stop string is held back."""
    held = (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
    return len(text) - max(held, default=0)


class StopStrings(StoppingCriteria):
    """Ends a row of a batch as soon as its new text holds one of its stop strings, `stops[row]`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[Sequence[str]], prompt_length: int) -> None:
        self.text, self.stops, self.prompt_length = NewText(tokenizer), stops, prompt_length
        self.tail = max([TAIL, *(len(stop.encode("utf-8", "surrogatepass")) for row in stops for stop in row)])
        self.done: Tensor | None = None
        self.last: list[int] = []  # token of each row's prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            self.last = input_ids[:, self.prompt_length - 1].tolist()
        start = max(self.prompt_length, input_ids.shape[1] - self.tail)
        for row, stops in enumerate(self.stops):
            if stops and not self.done[row]:
                text = self.text.of(input_ids[row, start:].tolist(), last=self.last[row])
                self.done[row] = any(stop in text for stop in stops)
        return self.done


class Stream:
    """A transformers streamer for one sequence: shows text as it comes, whole characters, nothing of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str], show: Callable[[str], None]) -> None:
        self.new_text, self.stops, self.show = NewText(tokenizer), stops, show
        self.ids: list[int] = []
        self.shown = 0
        self.last_of_prompt: int | None = None  # the prompt comes first

    def put(self, value: Tensor) -> None:
        if self.last_of_prompt is None:
            self.last_of_prompt = int(value.flatten()[-1])
            return
        self.ids += value.flatten().tolist()
        text, stopped = self._text()
        if not stopped:
            text = text.rstrip("\ufffd")  # a character whose other bytes are still to come
            text = text[: safe_length(text, self.stops)]
        self._advance(text)

    def end(self) -> None:
        self._advance(self._text()[0])

    def _text(self) -> tuple[str, bool]:
        assert self.last_of_prompt is not None
        return cut(self.new_text.of(self.ids, last=self.last_of_prompt), self.stops)

    def _advance(self, text: str) -> None:
        if len(text) > self.shown:
            self.show(text[self.shown :])
            self.shown = len(text)
