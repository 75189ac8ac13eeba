"""Files and directories appear whole or not at all, and nothing is left behind."""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from forked import forked_code
from saelens_scaffold._util.files import new_directory, new_file


def tree(folder: Path) -> dict[str, str]:
    """The files below a folder, and their text."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(code: str, ready: Path) -> None:
    """Run Python code until a file is there, then kill it."""
    code = f"from saelens_scaffold._util.files import *\n{code}"
    process = forked_code(code)
    process.wait_until(ready.exists)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


WAIT = "import time; time.sleep(600)"


@pytest.mark.parametrize("function", ["new_directory", "new_file"])
def test_what_a_killed_process_leaves_goes_with_the_next_call(
    tmp_path: Path, function: str
) -> None:
    out, ready = tmp_path / "parent" / "out", tmp_path / "ready"
    out.parent.mkdir()
    begin = f"with {function}({str(out)!r}): open({str(ready)!r}, 'w'); {WAIT}"
    killed(begin, ready)
    assert len(names(out.parent)) == 1
    if function == "new_file":
        with new_file(out) as file:
            file.write_text("whole")
    else:
        with new_directory(out) as directory:
            (directory / "a").write_text("whole")
    assert names(out.parent) == ["out"]


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_file(out) as first:
        first.write_text("first")
        with new_file(out) as second:
            second.write_text("second")
        assert out.read_text() == "second"
    assert tree(tmp_path) == {"out": "first"}


def test_a_path_is_not_taken_for_another_whose_name_it_begins(tmp_path: Path) -> None:
    left = tmp_path / ".a.b.01234567.tmp"
    left.mkdir()
    with new_file(tmp_path / "a") as file:
        file.write_text("")
    assert left.is_dir()
    with new_file(tmp_path / "a.b") as file:
        file.write_text("")
    assert not left.exists()


@pytest.mark.parametrize("after", [1, 2])
def test_a_replaced_directory_is_the_old_or_the_new_one_when_killed(
    tmp_path: Path, after: int
) -> None:
    out, ready = tmp_path / "out", tmp_path / "ready"
    out.mkdir()
    (out / "a").write_text("old")
    code = f"""
own, renames = Path.rename, []
def rename(self, to):
    found = own(self, to)
    renames.append(to)
    if len(renames) == {after}:
        open({str(ready)!r}, "w"); {WAIT}
    return found
Path.rename = rename
with new_directory({str(out)!r}, replace=True) as new:
    (new / "a").write_text("new")
"""
    killed(code, ready)
    ready.unlink()
    with pytest.raises(RuntimeError), new_directory(out, replace=True) as new:
        (new / "a").write_text("broken off")
        raise RuntimeError
    assert tree(tmp_path) == {"out/a": ["old", "new"][after - 1]}


@pytest.mark.parametrize("number", [0, 1])
def test_a_rename_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, renamed, rename = tmp_path / "out", [], Path.rename
    out.mkdir()
    (out / "a").write_text("old")

    def fail_once(self: Path, to: Path) -> Path:
        renamed.append(to)
        if len(renamed) == number + 1:
            raise OSError("disk full")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="full"), new_directory(out, replace=True) as new:
        (new / "a").write_text("new")
    assert tree(tmp_path) == {"out/a": "old"}


def test_a_stale_name_of_an_older_version_does_not_block(tmp_path: Path) -> None:
    import os

    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    with new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("")
    assert (tmp_path / "out" / "a").exists()


def run_together(codes: Sequence[str]) -> list[int]:
    """Exit statuses of processes that run at the same time."""
    processes = [forked_code(code) for code in codes]
    return [process.wait() for process in processes]


def test_processes_that_write_the_same_file(tmp_path: Path) -> None:
    code = f"""
from saelens_scaffold._util.files import *
for n in range(100):
    with new_file({str(tmp_path / "out")!r}) as file:
        file.write_text("x" * 1000)
"""
    assert run_together([code] * 2) == [0, 0]
    assert tree(tmp_path) == {"out": "x" * 1000}
