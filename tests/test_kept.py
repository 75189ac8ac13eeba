"""What the language model computes once for all calls of a plan."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from eval_helpers import eval_sae
from saelens_scaffold.evals.jobs import plan
from saelens_scaffold.evals.kept import Kept
from saelens_scaffold.evals.runner import run


def test_what_there_is_no_room_for_is_made_again():
    kept, n_made = Kept(max_bytes=100), Counter[str]()

    def ask(what: str, n: int) -> torch.Tensor:
        def make() -> tuple[torch.Tensor, torch.Tensor]:
            n_made[what] += 1
            x = torch.arange(n, dtype=torch.float32)
            return x, x  # counted once

        return kept(what, make, torch.tensor([[1, 2]]))[0]

    for _ in range(2):
        for what, n in {"small": 10, "large": 26, "other": 15}.items():
            assert torch.equal(ask(what, n), torch.arange(n, dtype=torch.float32))
    assert n_made == {"small": 1, "large": 2, "other": 1}
    kept("small", lambda: n_made.update(["shape"]) or (), torch.tensor([[1], [2]]))
    assert n_made["shape"] == 1
    assert len(kept) == 3
    assert len(pickle.loads(pickle.dumps(kept))) == 0


ABLATION = {
    "n_tokens": 500,
    "n_fit_tokens": 500,
    "n_bootstrap": 2,
    "topic_train_size": 10,
    "topic_test_size": 5,
    "max_topics": 3,
}


@pytest.mark.parametrize(
    ("name", "fields", "share_left"),
    [
        ("dense_latents", {"n_tokens": 3000, "n_bootstrap": 2}, 0.0),
        # two of 26 runs above the hook point are with the SAE, and the clean one
        ("scaffold_ablation", ABLATION, 0.25),
    ],
)
def test_calls_of_a_plan_run_the_model_once_for_what_is_of_no_sae(
    name: str,
    fields: dict[str, Any],
    share_left: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    runs: list[int] = []
    own = HookedTransformer.forward

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if len(x) > 1:
            runs.append(len(x))
        return own(self, x, *args, **kwargs)

    monkeypatch.setattr(HookedTransformer, "forward", forward)
    saes = [("a", eval_sae()), ("b", eval_sae(seed=1))]

    def job(folder: str) -> Any:
        where: dict[str, Any] = {
            "output_path": tmp_path / folder,
            "artifacts_path": tmp_path / "artifacts",
        }
        data = {"dataset": "python-stdlib"}
        if name == "scaffold_ablation":
            data["labelled_dataset"] = "python-stdlib"
        (job,) = plan({name: fields}, saes, device="cpu", **data, **where)
        return job

    def measured(job: Any, sae: Any) -> tuple[Any, int]:
        runs.clear()
        outcome = run(job, [sae])
        assert outcome.error is None
        (result,) = outcome.results.values()
        numbers = result["eval_result_metrics"], result.get(name)
        return numbers, len(runs)

    together = job("together")
    (first, n_first), (second, n_second) = [measured(together, sae) for sae in saes]
    assert n_second <= share_left * n_first
    assert measured(job("apart"), saes[0]) == (first, n_first)
    assert measured(job("apart"), saes[1]) == (second, n_first)
