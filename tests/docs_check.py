"""Numbers in README and docs that no recorded run contains: `make docs-check`.

A recording is a file of benchmarks/recorded, which benchmarks/record.py writes: command, date,
versions, machine, seeds and time, an empty line, and what the command printed. README and docs
may also cite, in sentences, benchmarks/README.md, whose tables stand beside their commands.
Numbers that are no measurements stand in benchmarks/recorded/allowed.yaml, each with the reason.
"""

import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
DOCS = ("README.md", "docs/*.md")
BENCHMARKS = "benchmarks/README.md"
HEADER = ("$ ", "date: ", "versions: ", "machine: ", "seeds: ", "took: ")

# Not parts of names (top-5, k=4) nor of versions (6.54.12).
_NUMBER = re.compile(
    r"(?<![\w.=/-])[+−-]?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(e[+-]?\d+)?(?!\w|\.\d|,\d)"
)
# After an integer in a sentence: then it is a measurement.
_UNIT = re.compile(
    r"\s*(±|%|(s|ms|µs|seconds?|minutes?|hours?|times|[KMGT]i?B|GFLOP/s)\b)"
)
_BEFORE = re.compile(r"([×±]|\bx)\s*$")
# What is written in these languages is typed in, or an example, not printed.
_INPUT_LANGUAGES = ("bash", "json", "python", "toml", "yaml")
_NO_MEASUREMENTS = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv \d{4}\.\d{5}")


class Number(NamedTuple):
    """A number as it is written, and where that is."""

    text: str
    line: int
    is_share: bool

    @property
    def value(self) -> Decimal:
        return abs(Decimal(self.text.replace(",", "").replace("−", "-")))

    def is_rounded(self, recorded: Decimal) -> bool:
        """Whether a recorded number rounds to this one; 84 % may be recorded as 0.84."""
        exponent = self.value.as_tuple().exponent
        assert isinstance(exponent, int)
        slack = Decimal(5).scaleb(exponent - 1)
        return any(
            abs(recorded * factor - self.value) <= slack
            for factor in ((1, 100) if self.is_share else (1,))
        )


class Piece(NamedTuple):
    """A paragraph, or a line of a table or of output, whose numbers belong together."""

    text: str
    line: int
    is_output: bool


def unrecorded(root: Path = ROOT) -> list[str]:
    """What is wrong with the numbers in a project's documentation, a line each."""
    recordings = {
        path: _recorded(path)
        for path in sorted((root / "benchmarks/recorded").glob("*.txt"))
    }
    benchmarks = root / BENCHMARKS
    cited = _numbers(benchmarks.read_text() if benchmarks.exists() else "", 1)
    in_any = [n.value for n in cited] + [
        n for file in recordings.values() for n in file
    ]
    allowed_file = root / "benchmarks/recorded/allowed.yaml"
    allowed = yaml.safe_load(allowed_file.read_text()) if allowed_file.exists() else []
    used: set[str] = set()
    found: list[str] = []
    for pattern in DOCS:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            text = _without_allowed(path.read_text(), name, allowed, used)
            for piece in _pieces(text):
                by_line: dict[int, list[str]] = {}
                for number in _missing(piece, list(recordings.values()), in_any):
                    by_line.setdefault(number.line, []).append(number.text)
                found += [
                    f"{name}:{line}: in no recording: {' '.join(numbers)}"
                    for line, numbers in by_line.items()
                ]
    unused = [entry["text"] for entry in allowed if entry["text"] not in used]
    return found + [
        f"{allowed_file.name}: {text!r} is in no document" for text in unused
    ]


def _recorded(path: Path) -> list[Decimal]:
    """
    All numbers that a command printed, and how long it took.

    Raises:
        ValueError: The file is no recording.
    """
    header, _, output = path.read_text().partition("\n\n")
    lines = header.splitlines()
    if [*map(str.startswith, lines, HEADER)] != [True] * len(HEADER):
        raise ValueError(f"{path} does not begin with the lines {', '.join(HEADER)}")
    return [n.value for n in _numbers(lines[-1] + "\n" + output, 1)]


def _without_allowed(
    text: str, name: str, allowed: list[dict[str, str]], used: set[str]
) -> str:
    """A document without what need not be recorded, its lines where they were."""
    for entry in allowed:
        if entry.get("in", name) != name:
            continue
        words = r"\s+".join(map(re.escape, entry["text"].split()))
        text, n = re.subn(rf"(?<!\w){words}(?!\w)", _blank, text)
        used.update([entry["text"]] * bool(n))
    return text


def _pieces(document: str) -> Iterator[Piece]:
    """Paragraphs, table rows and lines of output, without what is typed in."""
    fence: str | None = None
    paragraph: list[str] = []
    lines = document.splitlines()
    for i, line in enumerate([*lines, ""]):
        is_row = line.startswith("|")
        ends = line.startswith("```") or (
            fence is None and (is_row or not line.strip())
        )
        if paragraph and ends:
            yield Piece("\n".join(paragraph), i - len(paragraph) + 1, is_output=False)
            paragraph = []
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif is_row and fence not in _INPUT_LANGUAGES:
            following = lines[i + 1] if i + 1 < len(lines) else ""
            label, _, cells = line[1:].partition("|")
            if re.match(r"\|\s*:?--", following) or set(line) <= set("|-: "):
                continue
            # a row of settings explains in words
            explains = fence is None and label.strip().startswith(("`", "[`"))
            yield Piece(cells, i + 1, is_output=not explains)
        elif fence is None and line.strip():
            # formulas and commands stand four columns in
            paragraph.append("" if line.startswith("    ") else line)
        elif fence is not None and fence not in _INPUT_LANGUAGES:
            yield Piece(line, i + 1, is_output=True)


def _missing(
    piece: Piece, recordings: list[list[Decimal]], in_any: list[Decimal]
) -> list[Number]:
    """
    The numbers of a piece that are not recorded.

    Those of a row must all be in one recording, the others in any: single numbers are
    found by chance, rows are not.
    """
    text = _NO_MEASUREMENTS.sub(_blank, piece.text)
    numbers = list(_numbers(text, piece.line, only_measured=not piece.is_output))
    sources = recordings if piece.is_output else [in_any]
    missing = [
        [n for n in numbers if not any(map(n.is_rounded, source))] for source in sources
    ]
    return min(missing, key=len, default=numbers)


def _numbers(text: str, line: int, only_measured: bool = False) -> Iterator[Number]:
    for match in _NUMBER.finditer(text):
        unit = _UNIT.match(text, match.end())
        is_measured = (
            match[2] or match[3] or unit or _BEFORE.search(text[: match.start()])
        )
        if is_measured or not only_measured:
            is_share = unit is not None and unit[1] == "%"
            yield Number(match[0], line + text.count("\n", 0, match.start()), is_share)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", "·", match[0])


if __name__ == "__main__":
    problems = unrecorded()
    print("\n".join(problems) or "Every measured number is in a recording.")
    sys.exit(bool(problems))
