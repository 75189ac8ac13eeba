"""Passages that two texts share verbatim, at any position of either."""

from collections.abc import Iterator


class Passages:
    """
    Hashes of blocks of text, to find verbatim repetitions (as rsync does in files).

    Known text is cut into blocks of half a passage, and other text is searched for them at
    every character: a repeated passage of `chars` characters contains a whole block
    wherever it starts. Of shorter repetitions, down to half of that, some are found.
    Nothing is normalised: a changed space makes another passage.

    Args:
        chars: Length of a passage, at least 1.

    Attributes:
        block_chars: Length of a block.
    """

    def __init__(self, chars: int):
        self.block_chars = (chars + 1) // 2
        # hashes, not text, which would keep all that was ever read in memory
        self._blocks: set[int] = set()

    def add(self, text: str) -> None:
        """Add a known text."""
        size = self.block_chars
        self._blocks.update(
            hash(text[start : start + size])
            for start in range(0, len(text) - size + 1, size)
        )

    def repetitions(self, text: str) -> Iterator[tuple[int, int]]:
        """
        Start and end of each known block in a text, in order and without overlaps.
        """
        size, start = self.block_chars, 0
        while start + size <= len(text):
            if hash(text[start : start + size]) in self._blocks:
                yield start, start + size
                start += size
            else:
                start += 1

    def new_pieces(self, text: str) -> list[str]:
        """The pieces of a text between its known blocks, in order."""
        pieces: list[str] = []
        start = 0
        for repeated, end in self.repetitions(text):
            pieces.append(text[start:repeated])
            start = end
        pieces.append(text[start:])
        return pieces
