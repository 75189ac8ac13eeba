"""Repetitions between texts, against a search by brute force."""

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
