"""SAEBench's targeted probe perturbation of the sparse dictionary, over several seeds."""

from typing import Any

from sae_bench.evals.scr_and_tpp import main as sae_bench_main
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.labelled_data import (
    LabelledText,
    check_set_sizes,
    known_to_sae_bench,
)
from saelens_scaffold.evals.over_seeds import (
    SaeBenchEvaluator,
    SeedRun,
    lent_model,
    run_over_seeds,
)
from saelens_scaffold.evals.selected_saes import SelectedSAE, SelectedSAEs
from saelens_scaffold.evals.tpp.eval_config import TppEvalConfig
from saelens_scaffold.evals.tpp.eval_output import EVAL_TYPE_ID_TPP, TppEvalOutput


def _check(config: TppEvalConfig, text: LabelledText) -> None:
    check_set_sizes(
        text,
        ("train_set_size", config.train_set_size),
        ("test_set_size", config.test_set_size),
    )


def _check_sae(config: TppEvalConfig, sae: SelectedSAE) -> None:
    if max(config.n_values) > sae.sae.cfg.d_sae:
        raise UserError(
            f"n_values has {max(config.n_values)}, but SAE {sae.label!r} has no more than "
            f"{sae.sae.cfg.d_sae} sparse latents to ablate; give smaller n_values"
        )


def _run(seed_run: SeedRun) -> None:
    with known_to_sae_bench(seed_run.texts), lent_model(seed_run.model, sae_bench_main):
        sae_bench_main.run_eval(
            seed_run.seed_config,
            seed_run.selected_saes,
            seed_run.device,
            str(seed_run.results),
            save_activations=seed_run.save_activations,
            artifacts_path=str(seed_run.activations),
        )


EVALUATOR = SaeBenchEvaluator(
    EVAL_TYPE_ID_TPP,
    ScrAndTppEvalConfig,
    TppEvalOutput,
    check=_check,
    check_sae=_check_sae,
    run=_run,
    results_folder=EVAL_TYPE_ID_TPP,
    # a drop of one accuracy, less the mean drop of others
    bounds=(-2.0, 2.0),
)


def run_eval(
    config: TppEvalConfig,
    selected_saes: SelectedSAEs,
    device: str,
    output_path: str,
    force_rerun: bool = False,
    clean_up_activations: bool = False,
    save_activations: bool = True,
    artifacts_path: str = "artifacts",
) -> dict[str, dict[str, Any]]:
    """
    Run SAEBench's targeted probe perturbation (TPP) once with each seed.

    Of a scaffold SAE the sparse dictionary alone is judged: the scaffold's part is in the
    error term, which TPP keeps. With one seed, the metrics of a plain SAE are those
    that SAEBench gives to one after the first of a call.

    Args:
        config: The configuration.
        selected_saes: (release, sae_id) or (name, SAE object) pairs.
        device: Where to compute.
        output_path: Folder for the results, one JSON file for each SAE.
        force_rerun: Whether to evaluate again what has a result.
        clean_up_activations: Whether to delete stored activations afterwards.
        save_activations: Whether to store the language model's activations, for the
            SAEs that follow in this call and in later ones.
        artifacts_path: Folder for them, and for SAEBench's results of each seed.

    Returns:
        The results (`TppEvalOutput` as dictionaries) under the SAEs' names.

    Raises:
        UserError: The configuration, an SAE, the model or the text cannot be used, and
            why.
    """
    return run_over_seeds(
        EVALUATOR,
        config,
        selected_saes,
        device,
        output_path,
        force_rerun,
        clean_up_activations,
        save_activations,
        artifacts_path,
    )


if __name__ == "__main__":
    from saelens_scaffold.evals import command_line

    command_line.main(run_eval, TppEvalConfig, EVAL_TYPE_ID_TPP)
