"""Text that occurs verbatim in other text, at any place of either."""

from collections.abc import Iterator


class Passages:
    """
    Hashes of text, to find what is repeated of it (as rsync finds it in files).

    The text is cut into blocks of half a passage, and another text is looked through at
    every character: a passage of `chars` characters has a whole block in it wherever it
    begins. Of shorter repetitions, from half of that on, some are found and some are not.
    Nothing is normalised: a changed space makes another passage.

    Args:
        chars: Length of a passage, at least 1.

    Attributes:
        block_chars: Length of a block.
    """

    def __init__(self, chars: int):
        self.block_chars = (chars + 1) // 2
        # hashes, not text: a set of those would hold on to all that was ever read
        self._blocks: set[int] = set()

    def add(self, text: str) -> None:
        """Remember a text."""
        size = self.block_chars
        self._blocks.update(
            hash(text[start : start + size])
            for start in range(0, len(text) - size + 1, size)
        )

    def repetitions(self, text: str) -> Iterator[tuple[int, int]]:
        """
        Where a text repeats those that were added.

        Args:
            text: Any.

        Yields:
            Start and end of each block found, in order, none overlapping the one before.
        """
        size, start = self.block_chars, 0
        while start + size <= len(text):
            if hash(text[start : start + size]) in self._blocks:
                yield start, start + size
                start += size
            else:
                start += 1

    def new_pieces(self, text: str) -> list[str]:
        """The pieces of a text between the blocks that it repeats, in order."""
        pieces: list[str] = []
        start = 0
        for repeated, end in self.repetitions(text):
            pieces.append(text[start:repeated])
            start = end
        pieces.append(text[start:])
        return pieces
