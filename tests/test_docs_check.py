"""Every measured number in README and docs is one that a recorded command printed."""

import sys
from pathlib import Path

import pytest

from docs_check import unrecorded
from forked import forked_code

RECORD = Path(__file__).parents[1] / "benchmarks/record.py"
HEADER = """\
$ measure --seeds 2
date: 2026-11-26
versions: python 3.11.9
machine: x86_64, 2 cores, 1 threads
seeds: 0, 1
took: 372 s, 6.2 minutes

"""


def write(root: Path, document: str, allowed: str = "", **outputs: str) -> list[str]:
    """A project with one document; returns the numbers said to be unrecorded."""
    folder = root / "benchmarks/recorded"
    folder.mkdir(parents=True, exist_ok=True)
    for name, output in outputs.items():
        (folder / f"{name}.txt").write_text(HEADER + output)
    if allowed:
        (folder / "allowed.yaml").write_text(allowed)
    (root / "README.md").write_text(document)
    return unrecorded(root)


def test_every_number_of_the_documentation_is_recorded() -> None:
    problems = unrecorded()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "sentence",
    [
        "explains 0.556 of it",
        "0.56 of it",
        "scores 0.556 ± 0.01",
        "falls by 84 %",
        "cross-entropy ×\n1.31",
        "**1.31** [1.29, 1.33]",
        "1,234 MiB",
        "−0.07",
        "after about 6 minutes",
    ],
)
def test_recorded_numbers_may_be_rounded(tmp_path: Path, sentence: str) -> None:
    output = "| SAE | 0.5561 ± 0.0123 | 0.8412 | -0.072 |\nx 1.312 [1.292, 1.329] 1234"
    assert write(tmp_path, f"It {sentence}.", run=output) == []


@pytest.mark.parametrize(
    ("sentence", "number"),
    [
        ("explains 0.557 of it", "0.557"),
        ("0.5560 of it", "0.5560"),
        ("scores 0.556 ± 0.02", "0.02"),
        ("falls by 85 %", "85"),
        ("cross-entropy ×\n2", "2"),
        ("1,235 MiB", "1,235"),
        ("after about 7 minutes", "7"),
    ],
)
def test_other_numbers_are_reported(tmp_path: Path, sentence: str, number: str) -> None:
    output = "| SAE | 0.5561 ± 0.0123 | 0.8412 | -0.072 |\nx 1.312 [1.292, 1.329] 1234"
    (problem,) = write(tmp_path, f"Said:\nit {sentence}.", run=output)
    line = 3 if "\n" in sentence else 2
    assert problem == f"README.md:{line}: in no recording: {number}"


def test_a_row_is_of_one_recording(tmp_path: Path) -> None:
    table = "| SAE k=4 | dense |\n|---|---|\n| BatchTopK, k = 7 | 5 [4, 6] | 0.55 |\n"
    runs = {"first": "5 [4, 6]", "second": "0.55"}
    assert write(tmp_path, table, **runs) == ["README.md:3: in no recording: 0.55"]
    assert write(tmp_path, table, third="| BatchTopK | 5 [4, 6] | 0.551 |") == []
    # counts, too, are numbers in a row, also where a program printed it
    printed = f"```\n{table.replace('[4', '[3')}```\n"
    assert write(tmp_path, printed) == ["README.md:4: in no recording: 3"]


def test_what_is_typed_in_is_not_measured(tmp_path: Path) -> None:
    document = """\
sae-lens 6.54.12, arXiv 2606.14040, `lr=0.5`, [a link](https://example.org/1.25), top-5, 24 SAEs.

    f = 0.5 x

```bash
measure --lr 0.25
```

| setting | default |
|---|---|
| `n_tokens` | 1,000 |
"""
    assert write(tmp_path, document) == []
    assert write(tmp_path, document.replace("```bash", "```")) != []


def test_allowed_numbers_are_named_with_the_words_around_them(tmp_path: Path) -> None:
    allowed = "- {text: 'the paper: × 7.5', why: its abstract}"
    document = "Ours is x 1.3 (the paper:\n× 7.5), or 7.5."
    problems = write(tmp_path, document, allowed, run="1.3")
    assert problems == ["README.md:2: in no recording: 7.5"]
    # and go when the words go
    problems = write(tmp_path, "Ours is x 1.3.", allowed)
    assert problems == ["allowed.yaml: 'the paper: × 7.5' is in no document"]


def test_a_recording_says_where_it_is_from(tmp_path: Path) -> None:
    write(tmp_path, "")
    (tmp_path / "benchmarks/recorded/run.txt").write_text("0.5\n")
    with pytest.raises(ValueError, match="run.txt does not begin with the lines"):
        unrecorded(tmp_path)


def test_record_keeps_what_a_command_prints(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks/recorded"
    folder.mkdir(parents=True)
    counter = tmp_path / "counter"
    counter.write_text("1")

    def record(*arguments: str) -> int:
        argv = ["run", "--folder", str(folder), *arguments]
        code = f"import runpy; runpy.run_path({str(RECORD)!r}, run_name='__main__')"
        return forked_code(code, *argv).wait()

    program = "import sys; print('score 0.' + open(sys.argv[1]).read())"
    command = (sys.executable, "-c", program, str(counter))
    assert record("--", *command) == 2  # which seeds?
    assert record("--seeds", "0, 1", "--", *command) == 0
    text = (folder / "run.txt").read_text()
    assert "\nseeds: 0, 1\n" in text and text.endswith("\n\nscore 0.1\n")
    assert write(tmp_path, "It scores 0.1.") == []

    counter.write_text("2")
    assert record() == 0  # the same command again
    assert "\nseeds: 0, 1\n" in (folder / "run.txt").read_text()
    assert write(tmp_path, "It scores 0.1.") != []

    # what fails leaves the recording as it is
    counter.unlink()
    assert record() == 1
    assert write(tmp_path, "It scores 0.2.") == []
