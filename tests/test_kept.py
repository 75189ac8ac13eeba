"""What the language model computes once for all calls of a plan."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

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

        return kept(what, torch.tensor([[1, 2]]), make)[0]

    for _ in range(2):
        for what, n in {"small": 10, "large": 26, "other": 15}.items():
            assert torch.equal(ask(what, n), torch.arange(n, dtype=torch.float32))
    assert n_made == {"small": 1, "large": 2, "other": 1}
    kept("small", torch.tensor([[1], [2]]), lambda: n_made.update(["shape"]) or ())
    assert n_made["shape"] == 1
    assert len(kept) == 3
    assert len(pickle.loads(pickle.dumps(kept))) == 0


def test_calls_of_a_plan_run_the_layers_below_once(tmp_path: Path, monkeypatch: Any):
    stops: list[int | None] = []
    own = HookedTransformer.forward

    def forward(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if len(tokens) > 1:
            stops.append(kwargs.get("stop_at_layer"))
        return own(self, tokens, *args, **kwargs)

    monkeypatch.setattr(HookedTransformer, "forward", forward)
    saes = [("a", eval_sae()), ("b", eval_sae(seed=1))]
    fields = {"n_tokens": 3000, "n_bootstrap": 2}

    def jobs(folder: str) -> list[Any]:
        where: dict[str, Any] = {
            "output_path": tmp_path / folder,
            "artifacts_path": tmp_path / "artifacts",
        }
        return plan(
            {"dense_latents": fields},
            saes,
            device="cpu",
            dataset="python-stdlib",
            **where,
        )

    def metrics(job: Any, sae: Any) -> Any:
        outcome = run(job, [sae])
        assert outcome.error is None
        (result,) = outcome.results.values()
        return result["eval_result_metrics"], result["dense_latents"]

    (job,) = jobs("together")
    together = [metrics(job, sae) for sae in saes]
    n_shared = len(stops)
    assert n_shared > 0
    stops.clear()
    apart = [metrics(jobs("apart")[0], sae) for sae in saes]
    assert len(stops) == 2 * n_shared
    assert together == apart
