"""Suggesting a rank: from options to a table, numbers and a picture."""

import os
from pathlib import Path

from saelens_scaffold._util.configs import make_config
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import make_writable
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.language_model import choose_device, known_model_name
from saelens_scaffold.evals.rank.analysis import analyse_rank
from saelens_scaffold.evals.rank.report import analysis_text, write_analysis
from saelens_scaffold.evals.selected_saes import (
    common_model_name,
    load_saes,
    resolve_saes,
)
from saelens_scaffold.evals.text_data import (
    EMBEDDED_DATASET_NAME,
    open_dataset,
    rows_with,
)
from saelens_scaffold.models.hook_points import check_activations, model_config


def suggest_rank(
    *,
    output_path: str | os.PathLike[str],
    model_name: str | None = None,
    hook_name: str | None = None,
    sae_path: str | None = None,
    dataset: str = "Skylion007/openwebtext",
    dataset_split: str | None = None,
    device: str | None = None,
    llm_dtype: str = "float32",
    **text_fields: object,
) -> str:
    """
    Suggest a rank for a scaffold: everything that `saelens-scaffold rank` does.

    Args:
        output_path: Gets rank.json and rank.png.
        model_name: Language model; by default the SAE's.
        hook_name: Hook point; by default the SAE's.
        sae_path: Directory of a plain SAE, whose dense latents count.
        dataset: The text, as for `text_data.open_dataset`.
        dataset_split: Its split; by default "test" of the embedded text, else "train".
        device: Where to compute; by default a GPU if there is one.
        llm_dtype: Data type of the language model and of the SAE.
        text_fields: Other fields of `TextEvalConfig`: text_column, n_tokens, context_size,
            llm_batch_size.

    Returns:
        The table of candidates, and the suggestion.

    Raises:
        UserError: Something is missing, or cannot be used.
    """
    loaded = load_saes([sae_path] if sae_path else [])
    device = choose_device(device)
    sae = resolve_saes(loaded, device, llm_dtype)[0] if loaded else None
    hook_name = hook_name or (sae.hook_name if sae else None)
    if hook_name is None:
        raise UserError("name the hook point: --hook_name, or --sae_path")
    if dataset_split is None:
        dataset_split = "test" if dataset == EMBEDDED_DATASET_NAME else "train"
    fields = {
        "n_tokens": 100_000,
        **text_fields,
        "model_name": model_name or (common_model_name(loaded) if loaded else ""),
        "dataset": dataset,
        "dataset_split": dataset_split,
        "llm_dtype": llm_dtype,
    }
    config = make_config(TextEvalConfig, fields)
    model = model_config(known_model_name(config.model_name))
    check_activations(model, hook_name, context_size=config.context_size)
    rows_with(open_dataset(dataset, dataset_split), dataset, config.text_column)
    folder = Path(output_path)
    make_writable(folder)
    analysis = analyse_rank(config, hook_name, device, sae)
    write_analysis(analysis, folder)
    picture = folder / "rank.png"
    said = f"The spectrum is in {picture}, all numbers in rank.json."
    return f"{analysis_text(analysis)}\n{said}"
