"""MinHash against the exact Jaccard similarity."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import rensa
from data_helpers import changed, words

from data.filters import near_duplicates
from data.filters.near_duplicates import NearDuplicates, record, shingles, signatures


def jaccard(a: str, b: str) -> float:
    """Of the sets of five words in a row, written out."""
    one, two = ({tuple(w[i : i + 5]) for i in range(max(len(w) - 4, 1))} for w in (words(a), words(b)))
    return len(one & two) / len(one | two)


def test_shingles_go_to_the_last_word() -> None:
    assert shingles(list("abcdef")) == {"a b c d e", "b c d e f"} and shingles(["a", "b"]) == {"a b"}


@pytest.mark.parametrize("size", [5, 7, 20, 21, 1000])
def test_a_long_text_in_slices_has_the_signature_of_all_its_runs(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "SLICE_WORDS", size)
    texts = [" ".join(f"w{i}" for i in range(count)) for count in (0, 1, 4, 5, 6, 7, 8, 11, 20, 21, 24, 25, 200)]
    runs = [{" ".join(w[i : i + 5]) for i in range(max(len(w) - 4, 1))} for w in map(words, texts)]
    assert signatures(texts) == [h.__getstate__() for h in rensa.RMinHash.from_token_sets(runs, 120, 1)]


def test_a_long_text_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a document of 32 MiB took 1.7 GB in each worker."""
    monkeypatch.setattr(near_duplicates, "SLICE_WORDS", 1 << 11)
    text = " ".join(map(str, range(40_000)))
    signatures(["a"])
    tracemalloc.start()
    signatures([text])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_near_duplicates_are_those_of_the_exact_formula(texts: list[str]) -> None:
    """Away from the threshold of 0.8 (more than 4 standard errors) the answer must be the exact one."""
    decided = {True: 0, False: 0}
    for seed, text in enumerate(texts[:40]):
        for share in (0.002, 0.01, 0.05, 0.2):
            near = NearDuplicates()
            one, two = signatures([text, other := changed(text, share, seed)])
            similarity = jaccard(text, other)
            assert near.is_new(one)
            if abs(similarity - 0.8) > 0.15:
                assert near.is_new(two) == (similarity < 0.8), similarity
                decided[similarity < 0.8] += 1
    assert min(decided.values()) > 20


def test_the_threshold_is_on_the_estimate() -> None:
    """Two windows over one text, further and further apart: up to an estimated similarity of 0.8 the second is a duplicate."""
    rng = random.Random(1)
    text = [f"w{rng.randrange(10**6)}" for _ in range(300)]
    decided = {}
    for shift in range(14, 45, 3):
        near = NearDuplicates()
        one, two = signatures([" ".join(text[:200]), " ".join(text[shift : 200 + shift])])
        estimate = near._restore(one).jaccard(near._restore(two))
        assert near.is_new(one)
        decided[estimate] = near.is_new(two)
    assert all(new == (estimate < 0.8) for estimate, new in decided.items()), decided
    assert min(e for e, new in decided.items() if not new) < 0.85 and max(e for e, new in decided.items() if new) > 0.75


def test_near_duplicates_are_deterministic_and_survive_a_journal(texts: list[str]) -> None:
    assert signatures(texts[:5]) == [signatures([t])[0] for t in texts[:5]]
    first, second = NearDuplicates(), NearDuplicates()
    taken = [s for s in signatures(texts[:30]) if first.is_new(s)]
    assert len(taken) > 20
    second.take_journal(b"".join(record(s) for s in taken))
    more = signatures([*(changed(t, 0.005, 1) for t in texts[:30]), *texts[30:60]])
    answers = [first.is_new(s) for s in more]
    assert answers == [second.is_new(s) for s in more] and 5 < sum(answers) < 55


def test_a_family_of_alike_documents_is_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarity 0.68, under the threshold: each of a million would have been compared with all before it, 19 hours of it."""
    rng = random.Random(1)
    shared = " ".join(f"w{rng.randrange(10**6)}" for _ in range(200))
    family = [f"{shared} " + " ".join(f"w{rng.randrange(10**6)}" for _ in range(46)) for _ in range(60)]
    signed = signatures(family)
    unbounded, bounded, resumed = NearDuplicates(), NearDuplicates(), NearDuplicates()
    assert sum(map(unbounded.is_new, signed)) > 50 and unbounded.not_indexed == 0
    most = 8
    monkeypatch.setattr(near_duplicates, "MOST_ALIKE", most)
    taken = [s for s in signed if bounded.is_new(s)]
    assert bounded.not_indexed == len(taken) - len(bounded.kept) > 30 and len(bounded.kept) >= most
    assert max(len(bounded.index.query(bounded._restore(s))) for s in signed) <= most * near_duplicates.BANDS
    assert taken[:most] == signed[:most] and not any(map(bounded.is_new, signed[:most])), "the first are all remembered"
    resumed.take_journal(b"".join(map(record, taken)))
    assert (resumed.not_indexed, len(resumed.kept)) == (bounded.not_indexed, len(bounded.kept))
    assert [resumed.is_new(s) for s in signed] == [bounded.is_new(s) for s in signed]


def test_texts_without_words_are_not_one_another() -> None:
    """Of all files of punctuation (brainfuck, drawings of ASCII) only the first was kept."""
    near = NearDuplicates()
    found = [near.is_new(s) for s in signatures(["+++[>++<-]>.", "->+<[-]..,,", "{}();", "->+<[-]..,,", "x", "{}()"])]
    assert found == [True, True, True, False, True, True]
