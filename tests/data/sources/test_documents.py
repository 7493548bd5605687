"""Nothing a line can hold kills the reader: it is a document with exactly its text, or a reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_helpers import shared_data
from hypothesis import given
from hypothesis import strategies as st

from data.sources.blocks import Block, Position, Rejection, Row
from data.sources.documents import Document, content_key, read_documents, split_document, utf8_length


def block(lines: bytes = b"", rows: list[Row] | None = None) -> Block:
    return Block(name="file", after=Position(), done_bytes=0, lines=lines, rows=rows or [])


def only(lines: bytes) -> str:
    """The text of the one document, or `!reason`."""
    (found,) = read_documents(block(lines), "content")
    return found.text if isinstance(found, Document) else f"!{found.reason}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"content": "x"', "broken JSON"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON nested too deeply"),
        (b'{"content": ' + b"9" * 5000 + b"}", "JSON number too long"),
        (b'{"content": "\xff\xfe"}', "not UTF-8"),
        (b'{"content": "\\ud800"}', "lone surrogate in text"),
        (b'{"content": "\xed\xa0\x80"}', "not UTF-8"),
        (b'["content"]', "not a JSON object"),
        (b'"content"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"Content": "x", "id": 3}', "no field content (only Content, id)"),
        (
            b'{"content": {"text": "x", "lang": "py"}}',
            "content is not a string (an object; --text_field takes content.text, content.lang)",
        ),
        (b'{"content": {}}', "content is not a string (an empty object)"),
        (b'{"content": null}', "content is not a string"),
        (b'{"content": ["x"]}', "content is not a string"),
        (b'{"content": 1e999}', "content is not a string"),
        (b'{"content": ""}', "empty text"),
        (b'{"content": " \\n\\t\\u3000\\u2028"}', "empty text"),
        (b'{"content": "\\u0000\\ufeff \\u200b"}', "empty text"),
        (b"\x00\x00\x00", "broken JSON"),
    ],
)
def test_refused_with_the_reason(line: bytes, reason: str) -> None:
    assert only(line) == f"!{reason}"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"content": "a\\r\\nb\\rc"}\r', "a\r\nb\rc"),
        (b'\xef\xbb\xbf{"content": "after a BOM"}', "after a BOM"),
        (b'\n\xef\xbb\xbf{"content": "of files put together"}', "of files put together"),
        (b'\x1e{"content": "of a JSON text sequence"}', "of a JSON text sequence"),
        (b' \t{"content": "x"} ', "x"),
        ('{"content": "a\u2028b\u2029c\x85d"}'.encode(), "a\u2028b\u2029c\x85d"),
        (b'{"content": "a\\u0000b"}', "a\0b"),
        (b'{"content": "\\ud83d\\ude00"}', "\U0001f600"),
        (b'{"content": "first", "content": "last"}', "last"),
        (b'{"content": "x", "line_mean": NaN, "alpha_frac": Infinity}', "x"),
        (b'{"content": "x", "size": 123456789012345678901234567890}', "x"),
        (b'{"content": "<|endoftext|>"}', "<|endoftext|>"),
    ],
)
def test_accepted_with_exactly_its_text(line: bytes, text: str) -> None:
    assert only(line) == text


def test_numbers_of_lines_count_blank_ones_and_only_newlines() -> None:
    lines = '{"content": "a\u2028"}\n\n  \n{"bad"\n{"content": "b"}'.encode()
    found = list(read_documents(block(lines), "content"))
    assert [f.line for f in found] == [1, 4, 5]


def test_source_files_lose_their_bom_and_nothing_else() -> None:
    files = {"a.py": b"\xef\xbb\xbfx = 1\r\n", "b.py": b"\xff", "c.py": b"  \n", "d.py": b""}
    found = list(read_documents(block(rows=[Row(name, None, data) for name, data in files.items()]), "content"))
    assert isinstance(found[0], Document) and found[0].text == "x = 1\r\n"
    reasons = [("b.py", "not UTF-8"), ("c.py", "empty text"), ("d.py", "empty text")]
    assert found[1:] == [Rejection(name, None, reason) for name, reason in reasons]


@given(st.text())
def test_any_text_survives_json(text: str) -> None:
    found = only(json.dumps({"content": text}).encode())
    try:
        text.encode()
    except UnicodeEncodeError:
        assert found.startswith("!")
        return
    visible = [c for c in text if not c.isspace() and c not in "\0\ufeff\u200b\u200c\u200d\u2060"]
    assert found == (text if visible else "!empty text")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document_or_a_reason(line: bytes) -> None:
    found = list(read_documents(block(line), "content"))
    assert all(isinstance(one, Document) or one.kind for one in found)
    assert len(found) == sum(bool(part.strip()) for part in line.removeprefix(b"\xef\xbb\xbf").split(b"\n")), "each line is one"


@given(st.text(alphabet="ab\n\u00e9\U0001f600", max_size=200), st.integers(4, 40))
def test_long_documents_are_cut_after_line_ends_only(text: str, limit: int) -> None:
    parts = split_document(text, limit)
    if not parts:
        assert max(len(line.encode()) for line in text.splitlines(keepends=True)) > limit
        return
    assert "".join(parts) == text
    assert all(len(p.encode()) <= limit for p in parts)
    assert all(p.endswith("\n") for p in parts[:-1])


@given(st.text())
def test_key_ignores_white_space_and_nothing_else(text: str) -> None:
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        return
    assert content_key(text) == content_key("".join(f"\n{c} \u2003" for c in text))
    assert content_key(text) != content_key(text + "x")
    assert utf8_length(text) == len(text.encode())


def test_hostile_files_get_what_is_expected_of_them(tmp_path: Path, preprocess: Any, tokenizer_file: Path) -> None:
    """Every line of ../shared/data/hostile through the real command."""
    folder = shared_data("hostile")
    expected = [json.loads(line) for line in (folder / "expectations.jsonl").read_text().splitlines()]
    checked: Counter[str] = Counter()
    for name in sorted({e["file"] for e in expected}):
        output = tmp_path / name
        code, _, err = preprocess(
            "--input", folder / name, "--output", output, "--tokenizer", tokenizer_file, "--dedup", "none", "--filter", "codeparrot"
        )
        assert "Traceback" not in err and code in (0, 2)
        rejected = {r["line"]: r["reason"] for r in map(json.loads, (output / "rejected.jsonl").read_text().splitlines())}
        for e in (e for e in expected if e["file"] == name):
            checked[e["verdict"]] += 1
            allowed = {e["verdict"], *e["also_ok"]}
            if e["line"] is None:
                assert (None in rejected and name in err and code == 2 and allowed & {"refuse", "skip"}) or "accept" in allowed, e
            elif e["line"] in rejected:
                assert "skip" in allowed, (e, rejected[e["line"]])
            else:
                # A blank line is neither; what the filter or the dedup removes is not in this list.
                assert allowed & {"accept", "ignore"}, e
    assert checked["accept"] > 20 and checked["skip"] > 40 and checked["refuse"] >= 3
