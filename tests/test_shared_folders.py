"""Evaluations that share folders at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from saelens_scaffold.evals.runner import _artifacts_in


def test_calls_that_share_the_artifacts_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"

    def call(number: int) -> None:
        with _artifacts_in(folder) as artifacts:
            assert not list(artifacts.iterdir())
            (artifacts / "probes").write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(call, range(1000)))) == 1000
    assert not folder.exists()


def test_what_a_killed_call_left_goes_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / "artifacts" / ".call.01234567.tmp"
    left.mkdir(parents=True)
    (left / "probes").write_text("")
    with _artifacts_in(tmp_path / "artifacts"):
        assert not left.exists()
