"""What `run_eval` does in every evaluation: skip what is there, write what is new."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from sae_bench.evals.base_eval_output import BaseEvalConfig, BaseEvalOutput
from sae_bench.sae_bench_utils import (
    get_eval_uuid,
    get_sae_bench_version,
    get_sae_lens_version,
)

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_file
from saelens_scaffold.evals.selected_saes import (
    SelectedSAE,
    SelectedSAEs,
    View,
    resolve_saes,
)

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=BaseEvalConfig)

Result = dict[str, Any]
"""The fields of an eval output that are the evaluation's own: `eval_result_metrics`,
`eval_result_details`, `eval_result_unstructured`, and what its class adds."""

Measure = Callable[
    [Config, list[SelectedSAE], str], Iterator[tuple[SelectedSAE, Result]]
]
"""The evaluation itself: of a config, SAEs and a device, the SAEs' results, one by one."""

# Changing these does not change what is measured. (Lower VRAM usage does: sparse probing
# then leaves out the probe on all latents.)
SPEED_ONLY = ("llm_batch_size", "sae_batch_size")


def run_evaluation(
    measure: "Measure[Config]",
    output_class: type[BaseEvalOutput[Any, Any, Any]],
    config: Config,
    selected_saes: SelectedSAEs,
    device: str,
    output_path: str | os.PathLike[str],
    force_rerun: bool,
    view: View = "whole",
    rank_in: Callable[[dict[str, Any]], int | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Evaluate the SAEs that have no result yet, and write one JSON file for each.

    Args:
        measure: The evaluation. It is called once, with all SAEs that need it, and each
            result is written as soon as it is yielded.
        output_class: What the results are made into.
        config: The evaluation's configuration.
        selected_saes: (release, sae_id) or (name, SAE object) pairs, as in SAEBench.
        device: Where to compute.
        output_path: Folder for the results.
        force_rerun: Whether to evaluate SAEs again that have a result.
        view: The form of a scaffold SAE that is judged.
        rank_in: Finds in a result which `SelectedSAE.subspace_rank` it was measured with,
            if that matters. An SAE for which the call has another is evaluated again.

    Returns:
        The results as dictionaries, those that were there already included, under the
        names that SAEBench gives them.

    Raises:
        UserError: An SAE cannot be evaluated, or has a result of another configuration
            or of other weights in that folder and force_rerun is False.
    """
    saes = resolve_saes(selected_saes, device, getattr(config, "llm_dtype", ""), view)
    done = {} if force_rerun else _existing(saes, config, output_path, rank_in)
    missing = [sae for sae in saes if sae.key not in done]
    for key in done:
        logger.info("Skipping %s, whose result is in %s", key, output_path)

    results: dict[str, dict[str, Any]] = {}
    if missing:
        Path(output_path).mkdir(parents=True, exist_ok=True)
        about_this_run = {
            "eval_id": get_eval_uuid(),
            "sae_bench_commit_hash": get_sae_bench_version(),
            "sae_lens_version": get_sae_lens_version(),
        }
        for sae, result in measure(config, missing, device):
            fields = {
                **about_this_run,
                "eval_config": _config_of(sae, config),
                "datetime_epoch_millis": int(datetime.now().timestamp() * 1000),
                "sae_lens_id": sae.sae_id,
                "sae_lens_release_id": sae.release,
                "sae_cfg_dict": sae.sae.cfg.to_dict(),
                **result,
            }
            output = output_class(**fields)
            with new_file(sae.result_path(output_path)) as file:
                output.to_json_file(os.fspath(file))
            results[sae.key] = asdict(output)
    return {sae.key: done.get(sae.key) or results[sae.key] for sae in saes}


def check_result(
    file: Path, config: Any, sae: SelectedSAE, ignore: tuple[str, ...] = ()
) -> dict[str, Any]:
    """
    Read a result, and see that it is of this configuration and of this SAE.

    Args:
        file: The result.
        config: The configuration that is wanted.
        sae: The SAE that is wanted.
        ignore: Fields of the configuration that may differ.

    Returns:
        The result.

    Raises:
        UserError: It is of another configuration or of other weights, or unreadable.
    """
    advice = "run again with force_rerun (--force_rerun), or into another folder"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        stored, stored_sae = result["eval_config"], result["sae_cfg_dict"]
        stored_weights = stored_sae.get("metadata", {}).get("weights_sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{file} is there already, but is not a result of SAEBench ({error}); {advice}"
        ) from error
    wanted = TypeAdapter(type(config)).dump_python(config, mode="json")
    different = [
        f"{name} {stored.get(name)!r} (now {value!r})"
        for name, value in wanted.items()
        if name not in (*SPEED_ONLY, *ignore) and stored.get(name) != value
    ]
    if different:
        raise UserError(f"{file} was measured with {', '.join(different)}; {advice}")
    if stored_weights not in (None, sae.sae.cfg.metadata.weights_sha256):
        raise UserError(
            f"{file} is the result of another SAE of the same name; {advice}"
        )
    return result


def _config_of(sae: SelectedSAE, config: Any) -> Any:
    """The configuration as it is for one SAE: the baseline is compared with nothing."""
    if getattr(config, "baseline", None) == sae.label:
        return replace(config, baseline=None)
    return config


def _existing(
    saes: list[SelectedSAE],
    config: Any,
    output_path: str | os.PathLike[str],
    rank_in: Callable[[dict[str, Any]], int | None] | None,
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for sae in saes:
        file = sae.result_path(output_path)
        if not file.exists():
            continue
        result = check_result(file, _config_of(sae, config), sae)
        rank = rank_in(result) if rank_in is not None else None
        wanted = getattr(config, "pca_rank", None) or sae.subspace_rank
        if rank is not None and rank != wanted:
            logger.warning(
                "Measuring %s again, beside subspaces of rank %d, by the SAEs of this "
                "call; %s is of rank %d. (pca_rank sets it for every call.)",
                *(sae.label, wanted, file, rank),
            )
            continue
        found[sae.key] = result
    return found
