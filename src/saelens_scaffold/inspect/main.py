"""`saelens-scaffold inspect`: one pass of the language model, and what it finds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, TypeAdapter
from sae_lens import SAE

from saelens_scaffold._util.configs import documented, make_config
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import make_writable, new_file
from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold.evals import data as text_data
from saelens_scaffold.evals import model as lm
from saelens_scaffold.evals import saes as selected_saes
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.losses import CleanPredictions
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.store import differences, result_key
from saelens_scaffold.evals.tokens import TokenStream, check_context_size, common_tokens
from saelens_scaffold.inspect.assembly import Assembly
from saelens_scaffold.inspect.explanations import BLOCK, Tokens
from saelens_scaffold.inspect.output import Inspection
from saelens_scaffold.inspect.page import write_page
from saelens_scaffold.inspect.removal import Removals
from saelens_scaffold.inspect.sums import Sample, Sums
from saelens_scaffold.models.hook_points import check_activations
from saelens_scaffold.models.language_models import (
    check_model_name,
    load_language_model,
)

FILE_NAME = "inspect.json"


@documented
class InspectConfig(TextEvalConfig):
    """Which text, and how much of it."""

    n_tokens: PositiveInt = 200_000
    """Tokens to inspect."""
    n_sample_tokens: PositiveInt = 16_384
    """Tokens before these, which fix the axes and which latents are dense."""
    n_removal_tokens: PositiveInt = 8_192
    """Tokens among these on which each direction is removed, in whole sequences."""
    n_promoted: Annotated[int, Field(ge=1, le=100)] = 10
    """Tokens that are named as promoted and as suppressed."""
    label_column: str = "label"
    """Column of the dataset with the topic of each text, if it has one."""


def run(
    saes: Sequence[str],
    *,
    output_path: str,
    force_rerun: bool = False,
    device: str | None = None,
    **fields: object,
) -> str:
    """
    The command `saelens-scaffold inspect`.

    Args:
        saes: Directories of SAEs.
        output_path: Folder for what is found.
        force_rerun: Whether to inspect again what has been inspected.
        device: Where to compute; by default a GPU if there is one.
        fields: Fields of `InspectConfig`; None stands for a default.

    Returns:
        A line for each scaffold direction, and where all the rest is.

    Raises:
        UserError: Something cannot be used, and why.
    """
    loaded = selected_saes.load_saes(saes)
    device = lm.choose_device(device)
    config = _config(loaded, fields)
    selected = selected_saes.resolve_saes(loaded, device, config.llm_dtype)
    _check(config, selected)
    make_writable(Path(output_path))
    file = Path(output_path) / FILE_NAME
    others = {f"SAE {of.label}": of for of in selected[1:]}
    key = result_key("inspect", config, selected[0], others)
    adapter = TypeAdapter(Inspection)
    found: Inspection | None = None
    if file.is_file() and not force_rerun:
        content = read_json(file)
        if not differences(content.get("key", {}), key):
            found = adapter.validate_python(content)
    if found is None:
        found = inspect_selected(config, selected, device)
        found.key = key
        content = _rounded(adapter.dump_python(found))
        with new_file(file) as temporary:
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            temporary.write_text(text, encoding="utf-8")
    write_page(_rounded(adapter.dump_python(found)), file.with_suffix(".html"))
    return _said(found, file)


def inspect_saes(
    saes: Sequence[tuple[str, SAE[Any]]] | Sequence[str],
    device: str | None = None,
    **fields: object,
) -> Inspection:
    """
    Look inside SAEs of one hook point, in a notebook.

    Args:
        saes: Their directories, or names and SAEs.
        device: Where to compute; by default a GPU if there is one.
        fields: Fields of `InspectConfig`, as in dataset="python-stdlib".

    Raises:
        UserError: Something cannot be used, and why.
    """
    paths = [of for of in saes if isinstance(of, str)]
    loaded = selected_saes.load_saes(paths) if paths else [*saes]
    device = lm.choose_device(device)
    config = _config(loaded, fields)
    selected = selected_saes.resolve_saes(loaded, device, config.llm_dtype)  # type: ignore[arg-type]
    _check(config, selected)
    return inspect_selected(config, selected, device)


def _config(loaded: Sequence[Any], fields: dict[str, Any]) -> InspectConfig:
    given = {name: value for name, value in fields.items() if value is not None}
    if "model_name" not in given:
        given["model_name"] = selected_saes.common_model_name(loaded)
    if "model_class_name" not in given:
        of_saes = [sae for _, sae in loaded]
        given["model_class_name"] = selected_saes.common_model_class(of_saes)
    if given.get("dataset") == text_data.EMBEDDED_DATASET_NAME:
        given.setdefault("dataset_split", "test")
    return make_config(InspectConfig, given)


def _check(config: InspectConfig, saes: Sequence[SelectedSAE]) -> None:
    """Find everything that is named, before anything is run."""
    hook_names = {of.label: of.hook_name for of in saes}
    if len({*hook_names.values()}) > 1:
        raise UserError(
            f"the SAEs are of different hook points: {hook_names}; inspect those of one "
            "hook point together"
        )
    model_class = config.model_class_name
    check_model_name(config.model_name, model_class)
    for of in saes:
        check_activations(
            config.model_name,
            of.hook_name,
            of.sae.cfg.d_in,
            model_class_name=model_class,
        )
    check_context_size(config, saes, model_class)
    tokens = common_tokens(saes, config)
    text = (config.dataset, config.dataset_split, config.text_column)
    text_data.check_text(*text, tokens.context_size)
    needed = 2 * BLOCK * tokens.context_size
    if config.n_tokens < needed:
        raise UserError(
            f"n_tokens is {config.n_tokens}; R² held out needs at least two blocks of "
            f"{BLOCK} sequences, {needed} tokens"
        )


def inspect_selected(
    config: InspectConfig, saes: Sequence[SelectedSAE], device: str
) -> Inspection:
    """
    Look inside SAEs.

    Args:
        config: Language model and text.
        saes: The SAEs, of one hook point.
        device: Where to compute.

    Raises:
        UserError: They do not fit the language model, or the text is too short.
    """
    model = load_language_model(
        config.model_name, device, config.llm_dtype, config.model_class_name
    )
    ((hooked, _),) = lm.by_hook_point(model, saes)
    stream = TokenStream(config, model, saes, config.label_column)
    sample = Sample(saes, device)
    for tokens, counts in stream.batches(config.n_sample_tokens, "Finding axes"):
        x = hooked.below(tokens)[0][counts]
        lm.check_finite(x, hooked.hook_name)
        sample.update(x)
    sums = Sums(model, saes, stream, sample)
    share = min(1.0, config.n_removal_tokens / config.n_tokens)
    axes = [of.axes for of in sums.directions if of is not None]
    removals = Removals(hooked, axes, stream.tokenizer, share, config.llm_batch_size)
    n_sequences = 0
    for tokens, counts, topics in stream.labelled_batches(
        config.n_tokens, "Inspecting"
    ):
        run = lm.HookedBatch(hooked, tokens, counts)
        entropy = CleanPredictions(run.above(run.full), tokens, counts).entropy
        sums.update(Tokens(tokens, counts, topics, run.full, entropy, n_sequences))
        removals.update(tokens, counts)
        n_sequences += len(tokens)
    removals.finish()
    about = {
        "model_name": config.model_name,
        "hook_name": hooked.hook_name,
        "dataset": config.dataset,
        "dataset_split": config.dataset_split,
        "selection": stream.selection,
        "n_sequences": n_sequences,
        "n_sample_tokens": sample.moments.n,
        "topics": stream.labels[1:],
    }
    return Assembly(model, stream.tokenizer, saes, sums, removals).result(
        config.n_promoted, about
    )


def _rounded(value: Any) -> Any:
    """Numbers with 5 digits, which are enough to look at, and half as long."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(of) for name, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(of) for of in value]
    return value


def _said(found: Inspection, file: Path) -> str:
    lines: list[str] = []
    for sae in found.saes:
        lines.append(f"{sae.name}: {len(sae.dense)} dense latents")
        for i, of in enumerate(sae.scaffold.directions if sae.scaffold else ()):
            lines.append(
                f"  direction {i}: {of.label}; {of.share_of_scaffold:.1%} of the scaffold's "
                f"variance, {of.removal.increase:+.3f} nats without it"
            )
    return "\n".join([*lines, f"Written to {file}."])
