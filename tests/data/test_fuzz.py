"""Text to shards to text is the identity, for any documents; and each file of a source tree likewise."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from data_helpers import read_documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.preprocess import work

#: Text with what code has, what Unicode has, and what spells a special token.
PIECES = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["<|endoftext|>", "<fim_middle>", "def f(x):\n    return 10\n", "\r\n", "\u2028", "\0", "  \t"]),
    st.sampled_from(["é", "\U0001f600", "\ua7cf"]),
    st.text(alphabet="0123456789 \n", max_size=20),
)
TEXTS = st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.integers(1, 400), st.sampled_from(["auto", "reference"]))
def test_text_to_shards_to_text(tokenizer_file: Path, texts: list[str], shard_tokens: int, encoder: str) -> None:
    whole = [t for t in texts if any(map(str.isalnum, t))]
    if not whole:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "x.jsonl").write_bytes("".join(json.dumps({"content": t}) + "\n" for t in whole).encode())
        flags = ["--input", folder / "x.jsonl", "--output", folder / "out", "--tokenizer", tokenizer_file, "--dedup", "none"]
        flags += ["--shard_tokens", shard_tokens, "--validation_fraction", 0, "--workers", 1, "--encoder", encoder]
        work([str(f) for f in flags])
        documents = read_documents(folder / "out")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    assert all(d[-1] == 0 and 0 not in d[:-1] for d in documents)
    assert [tokenizer.decode(np.array(d[:-1]).tolist(), skip_special_tokens=False) for d in documents] == whole
