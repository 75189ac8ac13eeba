"""Configurations of evaluations, made from what a user typed."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass
from pydantic.fields import FieldInfo
from sae_bench.sae_bench_utils.activation_collection import (
    LLM_NAME_TO_BATCH_SIZE,
    LLM_NAME_TO_DTYPE,
)
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from transformer_lens import loading_from_pretrained

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.language_model import known_model_name
from saelens_scaffold.evals.selected_saes import SelectedSAEs
from saelens_scaffold.models import EMBEDDED_MODEL_NAME


def validating(config_class: type) -> type:
    """The class itself, or one that checks its fields (SAEBench's MDL has a plain one)."""
    if is_pydantic_dataclass(config_class):
        return config_class
    checking: Any = dataclass(config_class)
    return checking


def config_fields(config_class: type) -> dict[str, FieldInfo]:
    """The fields of a configuration that can be set."""
    return vars(config_class)["__pydantic_fields__"]


def make_config(config_class: type, values: Mapping[str, Any]) -> Any:
    """
    Make a configuration, or say in one line what is wrong with it.

    Args:
        config_class: A pydantic dataclass.
        values: The fields that are not to have their defaults.

    Raises:
        UserError: A value is none that the field can have.
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))} is {problem['input']!r}: {problem['msg']}"
            if problem["loc"]
            # what the class itself says, which tells the value
            else problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
        raise UserError("; ".join(problems)) from error
    except AssertionError as error:
        raise UserError(
            f"{config_class.__name__} cannot be {dict(values)}: {error}"
        ) from error


def language_model_values(
    config_class: type,
    values: Mapping[str, Any],
    selected_saes: SelectedSAEs,
    batch_divisor: int = 1,
) -> dict[str, Any]:
    """
    What a user need not type of the language model: its name, batch size and dtype.

    Args:
        config_class: The configuration that needs them.
        values: What was typed.
        selected_saes: The SAEs, whose metadata name the model.
        batch_divisor: How much smaller the batches of this evaluation are than those that
            SAEBench names for the model.

    Returns:
        The values, with those that were missing. Batch size and dtype are those that
        SAEBench uses for the model, else the configuration's own defaults.

    Raises:
        UserError: The SAEs name no model, or several; TransformerLens does not know it.
        UserError: A local model lacks a file.
    """
    fields = config_fields(config_class)
    values = dict(values)
    if "model_name" not in fields:
        return values
    values["model_name"] = values.get("model_name") or common_model_name(selected_saes)
    check_model_name(values["model_name"])
    short_name = values["model_name"].rpartition("/")[2]
    batch_size = LLM_NAME_TO_BATCH_SIZE.get(short_name)
    defaults: dict[str, Any] = {
        "llm_batch_size": batch_size and max(1, batch_size // batch_divisor),
        "llm_dtype": LLM_NAME_TO_DTYPE.get(short_name),
    }
    fallbacks = {"llm_batch_size": 32, "llm_dtype": "float32"}
    for name, default in defaults.items():
        if name in fields and values.get(name) is None:
            values[name] = default or fields[name].default or fallbacks[name]
    return values


def common_model_name(selected_saes: SelectedSAEs) -> str:
    """
    The language model that the SAEs were trained on, as their metadata have it.

    Raises:
        UserError: They name none, or several.
    """
    named = {
        name: get_pretrained_saes_directory()[name].model
        if isinstance(sae, str)
        else sae.cfg.metadata.model_name
        for name, sae in selected_saes
    }
    models = {model for model in named.values() if model}
    if not models:
        raise UserError("the SAEs do not tell their language model; name it: --model")
    if len(models) > 1:
        raise UserError(
            f"the SAEs were trained on different language models: {named}; evaluate those "
            "of one model together, or name it: --model"
        )
    return models.pop()


def check_model_name(model_name: str) -> None:
    """
    See, without loading it, that a language model can be loaded by its name.

    Raises:
        UserError: TransformerLens knows no such model.
        UserError: A local model lacks a file.
    """
    name = known_model_name(model_name)
    try:
        loading_from_pretrained.get_official_model_name(name)
    except ValueError:
        # TransformerLens's own message is the list of the hundreds that it knows
        raise UserError(
            f"there is no language model {model_name!r}; give the name of a model of "
            f"TransformerLens, the directory of a local one, or {EMBEDDED_MODEL_NAME!r}"
        ) from None
