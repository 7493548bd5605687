"""What a worker makes of a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_helpers import read_documents, write_rows
from tokenizers import Tokenizer


def test_long_documents_are_split_at_line_ends_and_counted(
    tmp_path: Path, tokenizer_file: Path, tokenizer_text: str, preprocess: Any
) -> None:
    text = "".join(f"line {i} = {i * i}\n" for i in range(300))
    path = write_rows(tmp_path / "x.jsonl", [{"content": text}, {"content": "y" * 2000}])
    flags = ["--input", path, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--validation_fraction", 0]
    code, out, _ = preprocess(*flags, "--max_document_bytes", 1000)
    assert code == 0 and "a line of the text is longer than --max_document_bytes 1000" in out
    documents = read_documents(tmp_path / "out")
    tokenizer = Tokenizer.from_str(tokenizer_text)
    parts = [tokenizer.decode(d[:-1]) for d in documents]
    assert "".join(parts) == text and len(parts) > 4 and all(len(p) <= 1000 and p.endswith("\n") for p in parts)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["documents"]["split_at_line_ends"] == 1


def test_ids_beyond_uint16_are_int32(tmp_path: Path, tokenizer_text: str, corpus: Path, preprocess: Any, texts: list[str]) -> None:
    content = json.loads(tokenizer_text)
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 70_000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    code, _, err = preprocess("--input", corpus, "--tokenizer", tmp_path / "tokenizer.json", "--output", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dtype"] == "int32"
    tokenizer = Tokenizer.from_str(tokenizer_text)
    documents = read_documents(tmp_path / "out") + read_documents(tmp_path / "out", "validation")
    assert sorted(documents) == sorted([*tokenizer.encode(t).ids, 0] for t in texts)
