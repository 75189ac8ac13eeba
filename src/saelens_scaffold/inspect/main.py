"""`saelens-scaffold inspect`: one pass of the language model, and what it finds."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, TypeAdapter, ValidationError
from sae_lens import SAE

from saelens_scaffold._util.configs import documented, make_config
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import make_writable, new_file
from saelens_scaffold.evals import data as text_data
from saelens_scaffold.evals import model as lm
from saelens_scaffold.evals import saes as selected_saes
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.losses import CleanPredictions
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.store import Key, differences, result_key
from saelens_scaffold.evals.tokens import TokenStream, check_context_size, common_tokens
from saelens_scaffold.inspect.assembly import Assembly
from saelens_scaffold.inspect.explanations import BLOCK, Tokens
from saelens_scaffold.inspect.output import Inspection
from saelens_scaffold.inspect.page import write_page
from saelens_scaffold.inspect.removal import Removals
from saelens_scaffold.inspect.sums import Sample, Sums
from saelens_scaffold.models.language_models import (
    LanguageModel,
    check_model_name,
    load_language_model,
)

FILE_NAME = "inspect.json"

NamedSAE = tuple[str, SAE[Any]]


@documented
class InspectConfig(TextEvalConfig):
    """Which text, and how much of it."""

    n_tokens: PositiveInt = 200_000
    """Tokens to inspect."""
    n_sample_tokens: PositiveInt = 16_384
    """Tokens before these, which fix the axes and which latents may be dense."""
    n_removal_tokens: PositiveInt = 8_192
    """Tokens among these on which each direction and dense latent is removed, in whole
    sequences."""
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
    config, selected = _checked(selected_saes.load_saes(saes), device, fields)
    folder = Path(output_path)
    make_writable(folder)
    file = folder / FILE_NAME
    others = {f"SAE {of.label}": of for of in selected[1:]}
    key = result_key("inspect", config, selected[0], others)
    earlier = None if force_rerun else _earlier(file, key)
    found = earlier or _inspect(config, selected)
    found.key = key
    content = _rounded(TypeAdapter(Inspection).dump_python(found))
    if earlier is None:
        with new_file(file) as temporary:
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            temporary.write_text(text, encoding="utf-8")
    write_page(content, file.with_suffix(".html"))
    return _said(found, file)


def inspect_saes(
    saes: Sequence[str | NamedSAE], device: str | None = None, **fields: object
) -> Inspection:
    """
    Look inside SAEs of one hook point, as in a notebook.

    Args:
        saes: Their directories, or names and SAEs.
        device: Where to compute; by default a GPU if there is one.
        fields: Fields of `InspectConfig`, as in dataset="python-stdlib".

    Raises:
        UserError: Something cannot be used, and why.
    """
    loaded: list[NamedSAE] = []
    for of in saes:
        loaded += selected_saes.load_saes([of]) if isinstance(of, str) else [of]
    return _inspect(*_checked(loaded, device, fields))


def _checked(
    loaded: Sequence[NamedSAE], device: str | None, fields: dict[str, Any]
) -> tuple[InspectConfig, list[SelectedSAE]]:
    """Find everything that is named, before anything is run."""
    given = {name: value for name, value in fields.items() if value is not None}
    if "model_name" not in given:
        given["model_name"] = selected_saes.common_model_name(loaded)
    if "model_class_name" not in given:
        of_saes = [sae for _, sae in loaded]
        given["model_class_name"] = selected_saes.common_model_class(of_saes)
    if given.get("dataset") == text_data.EMBEDDED_DATASET_NAME:
        given.setdefault("dataset_split", "test")
    config: InspectConfig = make_config(InspectConfig, given)
    device = lm.choose_device(device)
    saes = selected_saes.resolve_saes(loaded, device, config.llm_dtype)
    hook_names = {of.label: of.hook_name for of in saes}
    if len({*hook_names.values()}) > 1:
        raise UserError(
            f"the SAEs are of different hook points: {hook_names}; inspect those of one "
            "hook point together"
        )
    check_model_name(config.model_name, config.model_class_name)
    check_context_size(config, saes, config.model_class_name)
    size = common_tokens(saes, config).context_size
    text = (config.dataset, config.dataset_split, config.text_column)
    text_data.check_text(*text, size)
    if config.n_tokens < 2 * BLOCK * size:
        raise UserError(
            f"n_tokens is {config.n_tokens}; held-out R² need at least two blocks of "
            f"{BLOCK} sequences, {2 * BLOCK * size} tokens"
        )
    return config, saes


def read_inspection(path: str | Path) -> Inspection:
    """
    What `saelens-scaffold inspect` found.

    Args:
        path: Its inspect.json, or the folder with it.

    Raises:
        UserError: It cannot be read, or another version wrote it.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        return TypeAdapter(Inspection).validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise UserError(
            f"{file} does not hold what this version's inspect writes; run it again"
        ) from error


def _earlier(file: Path, key: Key) -> Inspection | None:
    """What an earlier run found, if it was of the same."""
    with suppress(UserError):
        found = read_inspection(file)
        return None if differences(found.key, key) else found
    return None


def _inspect(config: InspectConfig, saes: list[SelectedSAE]) -> Inspection:
    device = str(saes[0].sae.device)
    model = load_language_model(
        config.model_name, device, config.llm_dtype, config.model_class_name
    )
    ((hooked, _),) = lm.by_hook_point(model, saes)
    stream = TokenStream(config, model, saes, config.label_column)
    sample, texts = Sample(saes, device), _texts(model)
    for tokens, counts in stream.batches(config.n_sample_tokens, "Finding axes"):
        x = hooked.below(tokens)[0][counts]
        lm.check_finite(x, hooked.hook_name)
        sample.update(x)
    sums = Sums(saes, stream, sample, texts)
    share = min(1.0, config.n_removal_tokens / config.n_tokens)
    removals = Removals(hooked, stream.tokenizer, share)
    n = 0
    for tokens, counts, topics in stream.labelled_batches(
        config.n_tokens, "Inspecting"
    ):
        run = lm.HookedBatch(hooked, tokens, counts)
        clean = CleanPredictions(run.above(run.full), tokens, counts)
        sums.update(Tokens(tokens, counts, topics, run.full, clean.entropy, n))
        removals.keep(tokens, counts, n)
        n += len(tokens)
    return Assembly(model, saes, sums, removals).result(
        model_name=config.model_name,
        hook_name=hooked.hook_name,
        dataset=config.dataset,
        dataset_split=config.dataset_split,
        selection=stream.selection,
        n_sequences=n,
        n_sample_tokens=sample.moments.n,
        topics=stream.labels[1:],
        tokens=texts,
    )


def _texts(model: LanguageModel) -> list[str]:
    """Text of each id of a token."""
    tokenizer: Any = model.tokenizer
    ids = range(model.cfg.d_vocab)
    texts = tokenizer.batch_decode([[i] for i in ids])
    raw = tokenizer.convert_ids_to_tokens([*ids])
    pairs = zip(texts, raw, strict=True)
    return [text if text and "\ufffd" not in text else own or "" for text, own in pairs]


def _rounded(value: Any) -> Any:
    """Numbers with 5 digits, which are enough to look at, and half as long."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(of) for name, of in value.items()}
    return [_rounded(of) for of in value] if isinstance(value, (list, tuple)) else value


def _said(found: Inspection, file: Path) -> str:
    lines: list[str] = []
    for sae in found.saes:
        lines.append(f"{sae.name}: {sae.n_dense} dense latents")
        for i, of in enumerate(sae.scaffold.directions if sae.scaffold else ()):
            lines.append(
                f"  direction {i}: {of.label}; {of.share_of_scaffold:.1%} of the scaffold's "
                f"variance, {of.removal.increase:+.3f} nats without it"
            )
    page = file.with_suffix(".html")
    return "\n".join([*lines, f"The page is {page}, the data {file.name}."])
