"""
What absorbed scaffolds do: SAEs of one hook point, with and without, in one table over seeds.

    saelens-scaffold compare benchmarks/absorbed.yaml --output_path out
    python benchmarks/absorbed.py out/saes absorbed

Every plain SAE is given scaffolds of several ranks, with and without its dense latents, as
`saelens-scaffold absorb` does it for one rank at a time; here the language model reads the
text once for all. Then all are evaluated on held-out text.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.table import Table

from saelens_scaffold._util.tables import markdown
from saelens_scaffold.evals import model as lm
from saelens_scaffold.evals import runner
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.registry import evaluations_named
from saelens_scaffold.evals.saes import (
    CUSTOM_SAE_ID,
    SelectedSAE,
    load_saes,
    result_file_name,
)
from saelens_scaffold.evals.tokens import TokenStream
from saelens_scaffold.models import write_stdlib_dataset
from saelens_scaffold.models.language_models import load_language_model
from saelens_scaffold.saes import absorption
from saelens_scaffold.saes.facts import DENSE_THRESHOLD, FiringStatistics
from saelens_scaffold.saes.least_squares import LeastSquares

RANKS, N_TOKENS, SAMPLE = (8, 32), 100_000, 10_000
COLUMNS = ("dense", "l0_sparse", "l0_total", "whole SAE's expl. var.", "CE score")


def absorb(folder: Path, output: Path) -> None:
    """Scaffolds for all plain SAEs in a folder."""
    paths = sorted(folder.glob("batchtopk*"))
    saes = [SelectedSAE(name, CUSTOM_SAE_ID, sae) for name, sae in load_saes(paths)]
    name = str(saes[0].sae.cfg.metadata.model_name)
    model = load_language_model(name, "cpu")
    ((hooked, _),) = lm.by_hook_point(model, saes)
    text = TextEvalConfig(model_name=name, dataset="python-stdlib")
    batches = TokenStream(text, model, saes).batches(N_TOKENS, "Reading")
    x = torch.cat([hooked.below(tokens)[0][counts] for tokens, counts in batches])
    sample = x[:: len(x) // SAMPLE]
    for sae in saes:
        base = absorption.jumprelu_form(sae.sae)
        firing = FiringStatistics(base, n_replicates=0)
        firing.update_unsampled(sample)
        dense = (firing.fired > DENSE_THRESHOLD * len(sample)).nonzero()[:, 0]
        smaller = absorption.without_latents(base, firing.rank + dense)
        for title, start, ranks in (
            ("absorbed", base, RANKS),
            ("dropped-absorbed", smaller, RANKS[1:]),
        ):
            sums = LeastSquares(base.cfg.d_in, base.cfg.d_in, "cpu")
            for part in x.split(4096):
                scaled = absorption.scaled_error(start, part)
                sums.update(scaled.x, scaled.error)
            scaffold = absorption.fitted_scaffold(sums)
            for rank in ranks:
                absorbed = absorption.add_scaffold(start, scaffold.of_rank(rank))
                absorbed.save_model(
                    output / "saes" / f"{sae.label}-{title}-rank_{rank}"
                )


def evaluate(paths: list[Path], output: Path) -> str:
    """Means over seeds, with the standard deviation."""
    text = write_stdlib_dataset(output / "text", "test")
    settings = [
        f"core.n_eval_{of}_batches=2" for of in ("reconstruction", "sparsity_variance")
    ]
    evaluations = {
        "dense_latents": ("python-stdlib", ["dense_latents.n_tokens=100000"]),
        "core": (str(text), [*settings, "core.batch_size_prompts=16"]),
    }
    for name, (dataset, settings) in evaluations.items():
        report = runner.evaluate(
            name,
            settings,
            sae_path=[*map(str, paths)],
            dataset=dataset,
            output_path=output / "eval_results",
            artifacts_path=output / "artifacts",
        )
        print(report.text, *report.failures, sep="\n", flush=True)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"-seed_\d+", "", path.name), []).append(path)
    columns = [
        (evaluation.name, metric)
        for evaluation in evaluations_named(",".join(evaluations))
        for metric in evaluation.metrics
        if metric.title in COLUMNS
    ]
    table = Table("SAE", *[metric.title for _, metric in columns], box=MARKDOWN)
    for group, members in groups.items():
        cells: list[str] = []
        for name, metric in columns:
            files = [
                output / "eval_results" / name / result_file_name(p.name)
                for p in members
            ]
            values = torch.tensor(
                [metric.value(json.loads(f.read_text())) for f in files],
                dtype=torch.float64,
            )
            cells.append(f"{values.mean():.3f} ± {values.std():.3f}")
        table.add_row(group, *cells)
    return markdown(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "saes", type=Path, help="trained SAEs, with seed_N in their names"
    )
    parser.add_argument("output", type=Path, help="folder to make")
    options = parser.parse_args()
    absorb(options.saes, options.output)
    trained, absorbed = options.saes.iterdir(), (options.output / "saes").iterdir()
    print(evaluate([*sorted(trained), *sorted(absorbed)], options.output))


if __name__ == "__main__":
    main()
