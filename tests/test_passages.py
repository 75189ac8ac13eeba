"""Repetitions between texts, against a search by brute force."""

import random
import sys
from types import FrameType
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from saelens_scaffold.models.stdlib import Passages

texts = st.text("ab\n", max_size=60)


@given(texts, texts, st.integers(1, 20))
def test_no_passage_of_a_new_piece_was_seen(seen: str, text: str, chars: int):
    passages = Passages(chars)
    passages.add(seen)
    for piece in passages.new_pieces(text):
        for start in range(len(piece) - chars + 1):
            assert piece[start : start + chars] not in seen


@given(texts, texts, st.integers(1, 20))
def test_pieces_and_repetitions_make_up_the_text(seen: str, text: str, chars: int):
    passages = Passages(chars)
    passages.add(seen)
    found = list(passages.repetitions(text))
    for start, end in found:
        assert end - start == (chars + 1) // 2
        assert text[start:end] in seen
    pieces = passages.new_pieces(text)
    repeated = [text[start:end] for start, end in found]
    parts = [
        part for pair in zip(pieces, [*repeated, ""], strict=True) for part in pair
    ]
    assert "".join(parts) == text


def test_nothing_is_normalised():
    passages = Passages(8)
    passages.add("def function(): pass")
    assert list(passages.repetitions(" ".join("def function(): pass"))) == []
    assert passages.new_pieces("new; def function(): pass") != [
        "new; def function(): pass"
    ]


def test_a_search_finds_the_first_of_overlapping_blocks():
    # by brute force, in text that repeats itself
    rng = random.Random(0)
    words = ["".join(rng.choices("ab \u00e9\U0001f600", k=7)) for _ in range(30)]
    known, text = (" ".join(rng.choices(words, k=2000)) for _ in range(2))
    passages = Passages(16)
    passages.add(known)
    blocks = {known[i : i + 8] for i in range(0, len(known) - 7, 8)}
    expected, start = [], 0
    while start + 8 <= len(text):
        is_known = text[start : start + 8] in blocks
        expected += [(start, start + 8)] if is_known else []
        start += 8 if is_known else 1
    assert len(expected) > 100
    assert list(passages.repetitions(text)) == expected


def test_a_search_calls_nothing_for_each_character():
    rng = random.Random(0)
    known, text = ("".join(rng.choices("abcdefgh ", k=100_000)) for _ in range(2))
    passages = Passages(512)
    passages.add(known)
    calls = 0

    def count(_frame: FrameType, _event: str, _arg: Any) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        found = list(passages.repetitions(text + known))
    finally:
        sys.setprofile(None)
    assert found[0] == (100_000, 100_256)
    assert calls < len(text) / 20
