"""The command line of an evaluation: SAEBench's flags, made from its configuration."""

import argparse
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sae_bench.sae_bench_utils import general_utils, sae_selection_utils

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.configs import (
    config_fields,
    language_model_values,
    make_config,
    validating,
)
from saelens_scaffold.evals.selected_saes import load_saes
from saelens_scaffold_cli import add_evaluation_arguments

BAD_INPUT = (ValueError, OSError)
"""What a mistake of the user's raises, which needs one line and no traceback."""


def main(
    run_eval: Callable[..., dict[str, dict[str, Any]]],
    config_class: type,
    eval_type_id: str,
    argv: Sequence[str] | None = None,
) -> None:
    """
    Run an evaluation from the command line, as `python -m PACKAGE.main`.

    Args:
        run_eval: The evaluation.
        config_class: Its configuration, each field of which is a flag.
        eval_type_id: Its name.
        argv: The command line; `sys.argv[1:]` if None.

    Raises:
        SystemExit: Help has been printed (0), or the input is wrong (2).
    """
    parser = build_parser(config_class, eval_type_id)
    options = parser.parse_args(argv)
    given = {
        name: value
        for name in config_fields(validating(config_class))
        if (value := getattr(options, name)) is not None
    }
    try:
        selected_saes = select_saes(options)
        values = language_model_values(config_class, given, selected_saes)
        results = run_eval(
            make_config(config_class, values),
            selected_saes,
            choose_device(options.device),
            options.output_folder,
            force_rerun=options.force_rerun,
            clean_up_activations=options.clean_up_activations,
            save_activations=options.save_activations,
            artifacts_path=options.artifacts_path,
        )
    except BAD_INPUT as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    print(f"{len(results)} results are in {options.output_folder}")


def build_parser(config_class: type, eval_type_id: str) -> argparse.ArgumentParser:
    """The parser of one evaluation's command line."""
    module = f"python -m saelens_scaffold.evals.{eval_type_id}.main"
    parser = argparse.ArgumentParser(
        prog=module,
        description=f"Run the evaluation {eval_type_id} on SAEs.",
        epilog=_example(module, config_fields(validating(config_class))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_evaluation_arguments(parser, output_folder=f"eval_results/{eval_type_id}")
    group = parser.add_argument_group("configuration")
    for name, field in config_fields(validating(config_class)).items():
        _add_field(group, name, field)
    return parser


def select_saes(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """
    The SAEs that a command line names, from disk and from SAELens's releases.

    Raises:
        UserError: A directory, or its configuration or weights, are missing.
        UserError: No SAE is named, a pattern matches none, or one cannot be read.
    """
    patterns = (options.sae_regex_pattern, options.sae_block_pattern)
    if None in patterns and patterns != (None, None):
        raise UserError("--sae_regex_pattern and --sae_block_pattern go together")
    selected = load_saes(options.sae_path or [])
    if patterns != (None, None):
        selected += _released_saes(*patterns)
    if not selected:
        raise UserError(
            "no SAE is named; give --sae_path DIR..., or --sae_regex_pattern and "
            "--sae_block_pattern"
        )
    # SAEBench loads no SAE that does not name its model.
    model_name = getattr(options, "model_name", None)
    for _, sae in selected:
        if model_name and not isinstance(sae, str) and not sae.cfg.metadata.model_name:
            sae.cfg.metadata.model_name = model_name
    return selected


def choose_device(device: str | None) -> str:
    """
    The device that was asked for, else the one that SAEBench chooses.

    Raises:
        UserError: It cannot be used.
    """
    if device is not None:
        try:
            torch.zeros(1, device=device)
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"device {device!r} cannot be used: {error}") from error
        return device
    with redirect_stdout(sys.stderr):
        return general_utils.setup_environment()


def one_line(error: BaseException) -> str:
    """An error's message, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _released_saes(release: str, sae_id: str) -> list[tuple[str, Any]]:
    try:
        found = sae_selection_utils.get_saes_from_regex(release, sae_id)
    except re.error as error:
        raise UserError(f"not a regular expression: {error}") from error
    if not found:
        raise UserError(
            f"no SAE of SAELens's releases matches the release {release!r} and the id "
            f"{sae_id!r} (in full)"
        )
    return [*found]


def _add_field(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    """Add a field's flag. Pydantic reads the value, so that it also says what is wrong."""
    kind = _without_none(field.annotation)
    origin = typing.get_origin(kind) or kind
    options: dict[str, Any] = {"default": None, "help": _help(field)}
    if origin is bool:
        # `--flag` and `--flag true` both: SAEBench has flags of either sort
        options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif origin is list and _is_plain(typing.get_args(kind)):
        options |= {"nargs": "+", "metavar": "VALUE"}
    elif origin in (list, dict, tuple):
        options |= {"type": _json, "metavar": "JSON"}
    else:
        options |= {"metavar": "VALUE"}
    group.add_argument(f"--{name}", **options)


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    text = field.description or field.title or ""
    if default not in (None, "", PydanticUndefined):
        text = f"{text} (default: {default})"
    return text.replace("%", "%%")


def _without_none(annotation: Any) -> Any:
    """X of `X | None`."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else annotation


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    return all(argument in (str, int, float) for argument in arguments)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text!r}") from error


def _example(module: str, fields: dict[str, FieldInfo]) -> str:
    """An example that runs offline, on what `saelens-scaffold demo` wrote."""
    saes = Path("demo-output", "saes", "language_model", "seed-0")
    flags = [f"--sae_path {saes / 'BatchTopK'} {saes / 'ScaffoldBatchTopK'}"]
    if "dataset" in fields:
        flags.append("--dataset python-stdlib --dataset_split test")
    elif "dataset_names" in fields:
        flags.append("--dataset_names python-stdlib")
    if "topic_dataset" in fields:
        flags.append("--topic_dataset python-stdlib")
    lines = [f"  {module}", *flags]
    return "example, offline, after `saelens-scaffold demo`:\n" + " \\\n      ".join(
        lines
    )
