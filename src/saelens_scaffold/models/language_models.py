"""Language models by class: TransformerLens's two, and transformers' own."""

import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from saelens_scaffold._util.compat import release
from saelens_scaffold._util.errors import UserError, loading, one_line
from saelens_scaffold.models.fused import fuse
from saelens_scaffold.models.local import (
    EMBEDDED_MODEL_NAME,
    OFFICIAL_MODEL_NAMES,
    embedded_model_path,
    official_name,
    register_embedded_model,
    register_local_model,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ModelClass = Literal["HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"]
"""SAELens's names of classes (`model_class_name`), and TransformerLens's bridge, which has
the hook points of HookedTransformer on the modules of transformers."""

_DTYPE = "dtype" if release("transformers") >= (4, 56) else "torch_dtype"
"""Name of that argument in transformers."""


class TransformersModel(HookedProxyLM):
    """
    A language model of transformers, with its modules as hook points, as SAELens trains on.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        name: Its name.

    Attributes:
        cfg: What TransformerLens's configuration says of its models: model_name, n_ctx,
            n_layers, d_vocab, device.
        layers_name: Name of the list of its decoder layers, as in "model.layers".
    """

    def __init__(self, model: Any, tokenizer: Any, name: str):
        super().__init__(model, tokenizer)
        model.config.use_cache = (
            False  # of keys and values, which only generation reads
        )
        config = model.config.get_text_config()
        self.cfg = SimpleNamespace(
            model_name=name,
            n_ctx=config.max_position_embeddings,
            n_layers=config.num_hidden_layers,
            d_vocab=config.vocab_size,
            device=str(model.device),
        )
        self.layers_name = layers_name(model)

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The decoder layers."""
        layers: Any = self.model.get_submodule(self.layers_name)
        return layers


LanguageModel = Union[HookedTransformer, "TransformerBridge", TransformersModel]


def load_language_model(
    model_name: str,
    device: str,
    dtype: str = "float32",
    model_class_name: ModelClass = "HookedTransformer",
    **keywords: Any,
) -> LanguageModel:
    """
    Load a language model, its weights unprocessed and its attention fused where it can be.

    Args:
        model_name: Of TransformerLens or, for another class, of the Hub; "py-neox" for the
            embedded model; or the directory of a local model.
        device: Where to put it.
        dtype: As in "float32".
        model_class_name: Its class.
        keywords: More for the loading function of that class.

    Raises:
        UserError: There is no such model, or its files cannot be had.
    """
    name = known_model_name(model_name, model_class_name)
    torch_dtype = getattr(torch, dtype)
    with loading(model_name):
        if model_class_name == "HookedTransformer":
            load = HookedTransformer.from_pretrained_no_processing
            model: Any = load(name, device=device, dtype=torch_dtype, **keywords)
            fuse(model)
            return model
        path = transformers_name(model_name)
        if model_class_name == "TransformerBridge":
            from transformer_lens.model_bridge import TransformerBridge

            boot = TransformerBridge.boot_transformers
            bridge = boot(path, device=device, dtype=torch_dtype, **keywords)
            bridge.cfg.model_name = name
            return bridge
        keywords[_DTYPE] = torch_dtype
        model = AutoModelForCausalLM.from_pretrained(path, **keywords)
        tokenizer = AutoTokenizer.from_pretrained(path)
        return TransformersModel(model.to(device).eval(), tokenizer, name)


def known_model_name(
    model_name: str, model_class_name: ModelClass = "HookedTransformer"
) -> str:
    """
    Make a model known to TransformerLens, if it is local or the embedded one.

    Returns:
        Its name, without a slash if it is local: SAEBench makes file names of it.

    Raises:
        UserError: No model is named, or the directory cannot be registered.
        UserError: A local model lacks a file, or TransformerLens the class.
    """
    check_model_class(model_class_name)
    if not model_name:
        raise UserError(
            "model_name is empty; give a model of TransformerLens, the directory of a "
            f"local model, or {EMBEDDED_MODEL_NAME!r}"
        )
    if model_name == EMBEDDED_MODEL_NAME:
        return register_embedded_model()
    if not Path(model_name).is_dir():
        return model_name
    name = _slashless_name(model_name)
    if model_class_name == "HookedTransformer":
        return register_local_model(model_name, name=name)
    return name


def check_model_class(model_class_name: str) -> None:
    """
    See that TransformerLens has a class of language model.

    Raises:
        UserError: It has not.
    """
    if model_class_name == "TransformerBridge" and release("transformer-lens") < (3, 0):
        raise UserError(
            "model_class_name TransformerBridge needs transformer-lens >= 3; "
            f"{version('transformer-lens')} is installed"
        )


def with_hook_points(model_class_name: ModelClass) -> ModelClass:
    """The class that gives a model the hook points of HookedTransformer, as SAEBench needs."""
    if model_class_name == "AutoModelForCausalLM":
        return "TransformerBridge"
    return model_class_name


def transformers_name(model_name: str) -> str:
    """The name of a model in transformers: its directory, or its name on the Hub."""
    if model_name == EMBEDDED_MODEL_NAME:
        return str(embedded_model_path())
    if Path(model_name).is_dir():
        return model_name
    try:
        return official_name(model_name)
    except UserError:  # not in TransformerLens
        return model_name


def _slashless_name(directory: str) -> str:
    name = Path(directory).resolve().name
    known = {official.lower() for official in OFFICIAL_MODEL_NAMES}
    short = {official.rpartition("/")[2] for official in known}
    # a copy of a model that TransformerLens knows must not take its name
    return f"{name}-local" if name.lower() in known | short else name


def check_model_name(
    model_name: str, model_class_name: ModelClass = "HookedTransformer"
) -> None:
    """
    See, without loading it, that a language model can be loaded by its name.

    Raises:
        UserError: There is no such model, or a local one lacks a file.
    """
    name = known_model_name(model_name, model_class_name)
    if model_class_name == "HookedTransformer":
        official_name(name)
    else:
        transformers_config(model_name)


def transformers_config(model_name: str, **keywords: Any) -> Any:
    """
    The configuration of a language model in transformers.

    Raises:
        UserError: There is no such model, or its configuration cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(transformers_name(model_name), **keywords)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name {model_name!r}: {one_line(error)}") from error


def layers_name(model: torch.nn.Module) -> str:
    """
    Name of the list of decoder layers in a model of transformers, as in "model.layers".

    Raises:
        UserError: There is none.
    """
    config: Any = model.config
    n_layers = config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return name
    raise UserError(
        f"{type(model).__name__} has no list of {n_layers} layers, at which SAEs could be "
        "evaluated"
    )


class HookPoint:
    """
    A hook point of a language model.

    The residual stream after a layer has a name in each class, "blocks.12.hook_resid_post"
    in TransformerLens and "model.layers.12" in transformers, and is found by either.

    Args:
        model: The language model.
        name: As in an SAE's metadata.

    Attributes:
        name: Its name in this model.
        layer: The layer that computes it.
        is_residual_post: Whether it is the layer's output.

    Raises:
        UserError: It is in no layer of such a model.
    """

    def __init__(self, model: LanguageModel, name: str):
        prefix = getattr(model, "layers_name", "blocks")
        of_layer = layer_of_residual_post(name)
        if of_layer is not None and not name.startswith(f"{prefix}."):
            name = residual_post(model, of_layer)
        layer = re.match(rf"{re.escape(prefix)}\.(\d+)(?:\.|$)", name)
        if layer is None:
            raise _no_hook_point(model, name)
        self.name = name
        self.layer = int(layer[1])
        self.is_residual_post = name == residual_post(model, self.layer)

    def check(self, model: LanguageModel) -> None:
        """
        See that the model has it; not for each batch, since the bridge collects its hook
        points anew.

        Raises:
            UserError: It has not.
        """
        if self.name not in model.hook_dict:
            raise _no_hook_point(model, self.name)


def _no_hook_point(model: LanguageModel, name: str) -> UserError:
    last = model.cfg.n_layers - 1
    return UserError(
        f"the model {model.cfg.model_name} has no hook point {name!r}; it has, for "
        f"instance, {residual_post(model, 0)} to {residual_post(model, last)}"
    )


def layer_of_residual_post(name: str) -> int | None:
    """The layer after which the residual stream has this name, in either library."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post|(?:\w+\.)+(\d+)", name)
    return int(found[1] or found[2]) if found else None


def residual_post(model: LanguageModel, layer: int) -> str:
    """Name of the residual stream after a layer."""
    if isinstance(model, TransformersModel):
        return f"{model.layers_name}.{layer}"
    return f"blocks.{layer}.hook_resid_post"
