"""Malformed evaluation results: one line for each, or it is read rightly."""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE

from hub_fixtures import REPO, save_sae
from saelens_scaffold import upload_scaffold_saes
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold.evals import base
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.store import (
    KEY_SUFFIX,
    _current_versions,
    _identity,
    stored_results,
)
from saelens_scaffold.hub import findings
from saelens_scaffold.saes.facts import weights_sha256

N_RESULTS = 1000
SECONDS = 2

HOSTILE: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: -1,
    lambda: 10**400,
    lambda: float("nan"),
    lambda: -float("inf"),
    lambda: 1e308,
    lambda: "",
    lambda: "../../x",
    lambda: "x" * 5000,
    lambda: "\0\n\ud800",
    list,
    dict,
    lambda: [[{}]],
    lambda: {"": {"a": [1, None]}},
    lambda: [10**400, "a", None],
    lambda: ["a", "b"],
]


def whole_result() -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for metric in EVALUATIONS["dense_latents"].metrics:
        group, name = metric.path.split(".")
        metrics.setdefault(group, {}).update({name: 3.0, f"{name}_ci_low": 2.0})
        metrics[group][f"{name}_ci_high"] = 4.0
    metrics["token_stats"] = {"n_tokens": 1000}
    return {
        "eval_type_id": "dense_latents",
        "eval_config": {
            "dataset": "python-stdlib",
            "model_name": "py-neox",
            "llm_dtype": "float32",
            "dataset_split": "train",
            "baseline": "base",
            "thresholds": [0.1, 0.2],
        },
        "eval_result_metrics": metrics,
        "eval_result_unstructured": {"fired": [1, 2, 3]},
        "metrics_over_seeds": {"l0_sparse": {"ci_low": 1.0, "ci_high": 2.0}},
        "sae_lens_release_id": "sae",
        "sae_lens_id": "custom_sae",
        "sae_cfg_dict": {"metadata": {"dataset_path": "/home/x/y"}},
    }


def places_in(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in JSON data."""
    keys = content if isinstance(content, dict) else range(len(content))
    found = [(content, key) for key in keys]
    for key in keys:
        if isinstance(content[key], (dict, list)):
            found += places_in(content[key])
    return found


def change(content: Any, rng: random.Random) -> None:
    container, key = rng.choice(places_in(content))
    if rng.random() < 0.15:
        del container[key]
    else:
        container[key] = rng.choice(HOSTILE)()


def damaged(text: bytes, rng: random.Random) -> bytes:
    where = rng.randrange(len(text))
    cut = text[:where]
    flipped = cut + bytes([rng.randrange(256)]) + text[where + 1 :]
    return rng.choice(
        [cut, flipped, b"\xef\xbb\xbf" + text, text.decode().encode("utf-16")]
    )


def malformed_results(folder: Path, n: int) -> Iterator[tuple[Any, Path]]:
    """An SAE, and the folder where one malformed result of it lies at a time."""
    save_sae(folder / "sae")
    sae = SAE.load_from_disk(folder / "sae")
    key = {
        "evaluation": {"name": "dense_latents"},
        "eval_config": whole_result()["eval_config"],
        "weights": {"sae": weights_sha256(sae)},
        "fingerprints": {},
        "versions": _current_versions(),
    }
    file = folder / "eval_results" / "x.json"
    file.parent.mkdir()
    rng = random.Random(0)
    for i in range(n):
        result, own_key = whole_result(), json.loads(json.dumps(key))
        for _ in range(rng.randrange(1, 4)):
            change(rng.choice([result, result, own_key]), rng)
        text = json.dumps(result).encode()
        file.write_bytes(damaged(text, rng) if i % 5 == 0 else text)
        with suppress(UserError):  # of what cannot be read
            own_key.setdefault("result", _identity(read_json(file)))
        file.with_suffix(KEY_SUFFIX).write_text(json.dumps(own_key))
        yield sae, file


def result_is_read(sae: Any, file: Path) -> bool:
    """Whether a result is read, and all that a card shows of it; else it is one line."""
    try:
        stored = [*stored_results(file.parent)]
    except UserError as error:
        assert str(file) in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return False
    for each in stored:
        each.why_stale()
        findings.results_of(sae, [each])
        facts = findings.facts_of([each], None, None)
        assert all(isinstance(cell, str) for cell in facts.cells.values())
        for metric, value, interval in findings.headline_metrics(each):
            assert abs(value) < 1e309
            f"{value:.{metric.digits}f} {interval}"
        assert len(findings.dataset_of(each)) < 10_000
        json.dumps(findings.without_directories(each.content), indent=2)
    return bool(stored)


def test_malformed_results_are_one_line_each_or_read_rightly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # looked up for each, which takes most of the time
    monkeypatch.setattr(findings, "known_evaluations", lambda: EVALUATIONS)
    n_read = 0
    for sae, file in malformed_results(tmp_path, N_RESULTS):
        started = time.monotonic()
        n_read += result_is_read(sae, file)
        assert time.monotonic() - started < SECONDS
    assert N_RESULTS / 10 < n_read < N_RESULTS


def test_a_whole_result_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(whole_result()))
    (stored,) = stored_results(tmp_path)
    assert stored.content == whole_result()
    values = {
        metric.path: value for metric, value, _ in findings.headline_metrics(stored)
    }
    assert set(values.values()) == {3.0}


@pytest.mark.parametrize("suffix", [".json", KEY_SUFFIX])
def test_pipes_and_large_files_are_not_read(tmp_path: Path, suffix: str) -> None:
    save_sae(tmp_path / "sae")
    folder = tmp_path / "sae" / "eval_results"
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps(whole_result()))
    file = folder / f"x{suffix}"
    file.unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.open("wb").truncate(1 << 34)):
        make(file)
        upload: dict[str, Any] = {"dry_run": True, "show_progress": False}
        if suffix == KEY_SUFFIX:  # which is then none
            done = upload_scaffold_saes(tmp_path / "sae", REPO, **upload)
            assert "nothing says what it was measured with" in done.left_out.values()
        else:
            with pytest.raises(UserError, match="no regular file|more than"):
                upload_scaffold_saes(tmp_path / "sae", REPO, **upload)
        file.unlink()


def test_integers_that_no_float_holds_are_no_value() -> None:
    metric = base.Metric("", "a.b")
    for value in (10**400, -(10**400), float("nan"), float("inf"), "1", None):
        result = {
            "eval_result_metrics": {
                "a": {"b": value, "b_ci_low": 0, "b_ci_high": value}
            }
        }
        assert metric.value(result) is None
        assert metric.interval(result) is None
