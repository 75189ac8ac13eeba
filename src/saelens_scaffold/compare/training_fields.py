"""Fields of SAELens's runner that an experiment may set, and their allowed values."""

from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, create_model
from sae_lens import MultiSAETrainingRunnerConfig
from sae_lens.util import str_to_dtype

from saelens_scaffold._util.configs import make_config

# Set by the experiment itself.
_FIXED = {
    "saes",
    "hook_names",
    "model_name",
    "dataset_path",
    "seed",
    "device",
    "evaluator",
    "checkpoint_path",
    "output_path",
    "save_final_checkpoint",
    "resume_from_checkpoint",
    "prefetch_llm_batches",
    "logger",
    "sae_lens_version",
    "sae_lens_training_version",
}
_TYPES = {
    name: annotation
    for name, annotation in get_type_hints(MultiSAETrainingRunnerConfig).items()
    if name not in _FIXED and not name.startswith("_")
}
TRAINING_FIELDS = sorted(_TYPES)
"""Fields of SAELens's `MultiSAETrainingRunnerConfig` that an experiment may set."""

# The language model and its input are the same for all SAEs of an experiment.
_SHARED = {
    "model_class_name",
    "model_from_pretrained_kwargs",
    "model_kwargs",
    "llm_device",
    "compile_llm",
    "llm_compilation_mode",
    "context_size",
    "prepend_bos",
}
AXIS_FIELDS = sorted(set(TRAINING_FIELDS) - _SHARED)
"""Fields of the runner that can be axes of the grid."""


def _dtype_name(name: str) -> str:
    str_to_dtype(name)  # raises for an unknown one
    return name


# SAELens annotates types only. `check_steps` checks sizes.
_ALLOWED = {
    "activations_mixing_fraction": Field(ge=0, le=1),
    "adam_beta1": Field(ge=0, lt=1),
    "adam_beta2": Field(ge=0, lt=1),
    "dead_feature_threshold": Field(ge=0),
    "dead_feature_window": Field(ge=0),
    "dtype": AfterValidator(_dtype_name),
    "eval_batch_size_prompts": Field(ge=1),
    "feature_sampling_window": Field(ge=0),
    "lr": Field(gt=0),
    "lr_decay_steps": Field(ge=0),
    "lr_end": Field(ge=0),
    "lr_warm_up_steps": Field(ge=0),
    "n_batches_for_norm_estimate": Field(ge=0),
    "n_checkpoints": Field(ge=0),
    "n_eval_batches": Field(ge=0),
    "n_restart_cycles": Field(ge=1),
    "seqpos_slice": Field(strict=False),  # a tuple, which YAML does not have
}
_FIELDS: dict[str, Any] = {
    name: (Annotated[annotation, _ALLOWED.get(name, Field())], None)
    for name, annotation in _TYPES.items()
}
_Training: Any = create_model(
    "Training",
    __config__=ConfigDict(
        strict=True, allow_inf_nan=False, extra="forbid", protected_namespaces=()
    ),
    **_FIELDS,
)


def checked_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Check values of the runner's fields.

    Raises:
        UserError: A value has the wrong type, or is out of range.
    """
    return make_config(_Training, values).model_dump(exclude_unset=True)
