"""Everything that is replaced in SAEBench, sae-probes and SAELens, and why.

Read in sae-bench 0.6.0, sae-probes 0.4 and sae-lens 6.54. Each function makes the replacements for one
purpose, for as long as a `with` block lasts.
"""

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jaxtyping
import pandas as pd
import torch
from sae_bench.sae_bench_utils import dataset_info, dataset_utils, general_utils
from sae_lens.training import activations_store
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer

from saelens_scaffold.evals.kept import Kept
from saelens_scaffold.evals.labelled_data import LabelledText, TextsByLabel
from saelens_scaffold.evals.saebench.shared_runs import SharedRuns
from saelens_scaffold.evals.saes import CUSTOM_SAE_ID, SelectedSAE
from saelens_scaffold.evals.tokens import TokenSelection
from saelens_scaffold.models.fused import fuse
from saelens_scaffold.models.language_models import LanguageModel

Tasks = Mapping[str, pd.DataFrame]
"""sae-probes' tasks by name, with the columns "prompt" and "target" (1 or 0)."""

Replacement = AbstractContextManager[None]
"""What is replaced while it lasts."""


@contextmanager
def replaced(*replacements: tuple[Any, Mapping[str, Any]]) -> Iterator[None]:
    """
    Give names other values, and restore what was there before.

    Args:
        replacements: Dictionaries in which the names are looked up, as a module's `vars`,
            each with the new values.
    """
    before = [dict(namespace) for namespace, _ in replacements]
    try:
        for namespace, values in replacements:
            namespace.update(values)
        yield
    finally:
        for (namespace, values), old in zip(replacements, before, strict=True):
            for name in values.keys() - old.keys():
                namespace.pop(name, None)
            namespace.update({name: old[name] for name in values.keys() & old.keys()})


def judged_saes(saes: Sequence[SelectedSAE]) -> Replacement:
    """
    SAEBench gets SAEs as they are judged here.

    It would load those of releases again, and judge scaffold SAEs among them as a whole;
    and it would take the sparsity file of a release, log10 of frequencies, for frequencies
    (in autointerp). Of objects it would warn where a decoder row is zero.
    """
    for sae in saes:
        general_utils._standardize_sae_cfg(sae.sae.cfg)  # as it does when it loads one
    of_releases = {(sae.release, sae.sae_id): sae.sae for sae in saes}

    def load_and_format_sae(
        release: str, sae_or_id: Any, _device: str
    ) -> tuple[str, Any, None]:
        if isinstance(sae_or_id, str):
            return sae_or_id, of_releases[release, sae_or_id], None
        return CUSTOM_SAE_ID, sae_or_id, None

    return replaced((vars(general_utils), {"load_and_format_sae": load_and_format_sae}))


@contextmanager
def quick_collections() -> Iterator[None]:
    """
    Python's garbage collector looks only at what is new.

    SAEBench calls it after each SAE, and with all that is imported that takes most of a
    second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def nan_stays() -> Replacement:
    """Core has NaN where it has no value, and no -1, which some of its scores can be."""
    from sae_bench.evals.core import main as core

    def keep(metrics: dict[str, Any]) -> dict[str, Any]:
        return metrics

    return replaced((vars(core), {"replace_nans_with_negative_one": keep}))


def lent_model(module: ModuleType, model: LanguageModel) -> Replacement:
    """
    A module that loads a `HookedTransformer` gets this one.

    SAEBench loads its model in every call; here it is loaded, and checked against the
    SAEs, once for all seeds. Its functions check their arguments' types, and TransformerLens's
    bridge is no `HookedTransformer`; unlearning takes what is none for one of transformers.
    """
    from sae_bench.evals.unlearning.utils import metrics

    return replaced(
        (vars(module), {"HookedTransformer": _loader_of(model)}),
        (vars(metrics), {"HookedTransformer": type(model)}),
        (vars(jaxtyping.config), {"jaxtyping_disable": True}),
    )


def _loader_of(model: LanguageModel) -> SimpleNamespace:
    return SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)


def labelled_texts(texts: Sequence[LabelledText]) -> Replacement:
    """
    SAEBench's sparse probing and TPP read other text under its `name`.

    SAEBench knows its datasets by name, in three places: a table of classes, a function
    that loads them, and a table of second labels that TPP looks into but does not use.
    """
    from sae_bench.evals.scr_and_tpp import main as scr_and_tpp

    by_name = {text.name: text for text in texts}
    own = dataset_utils.get_multi_label_train_test_data

    def get_multi_label_train_test_data(
        dataset_name: str, train_set_size: int, test_set_size: int, random_seed: int
    ) -> tuple[TextsByLabel, TextsByLabel]:
        if dataset_name not in by_name:
            return own(dataset_name, train_set_size, test_set_size, random_seed)
        sizes = rows_per_class(train_set_size), rows_per_class(test_set_size)
        return by_name[dataset_name].sample(*sizes, random_seed)

    classes = {text.name: text.labels for text in texts}
    second_labels: dict[str, Any] = scr_and_tpp.COLUMN2_VALS_LOOKUP
    loader = {"get_multi_label_train_test_data": get_multi_label_train_test_data}
    return replaced(
        (vars(dataset_utils), loader),
        (dataset_info.chosen_classes_per_dataset, classes),
        (second_labels, dict.fromkeys(by_name)),
    )


def rows_per_class(set_size: int) -> int:
    """Rows that SAEBench takes of each class: half of a binary task is other classes."""
    return set_size // 2


def sae_probes_tasks(tasks: Tasks, model: LanguageModel) -> Replacement:
    """
    sae-probes runs other tasks, on a model whose context may be short.

    sae-probes reads a task's prompts and its targets from files of its own, in two places,
    and cuts every text to 1024 tokens, more than some models have room for.
    """
    # imported here, since sae-probes reads all of its datasets when it is imported
    from sae_probes import generate_model_activations as activations
    from sae_probes import utils_data

    own_table = utils_data.read_numbered_dataset_df
    own_generate = activations.generate_single_dataset_activations

    def read_csv(path: Any, **kwargs: Any) -> pd.DataFrame:
        task = tasks.get(Path(path).name.partition(".")[0])
        return pd.read_csv(path, **kwargs) if task is None else task

    def read_table(tag: str) -> pd.DataFrame:
        return tasks[tag] if tag in tasks else own_table(tag)

    def generate(*args: Any, max_seq_len: int, **kwargs: Any) -> None:
        max_seq_len = min(max_seq_len, model.cfg.n_ctx)
        own_generate(*args, max_seq_len=max_seq_len, **kwargs)

    generation = {
        "pd": SimpleNamespace(read_csv=read_csv),
        "generate_single_dataset_activations": generate,
        "HookedTransformer": _loader_of(model),
    }
    return replaced(
        (vars(activations), generation),
        (vars(utils_data), {"read_numbered_dataset_df": read_table}),
        # one dictionary for all of sae-probes' modules
        (utils_data.get_dataset_sizes(), {name: len(tasks[name]) for name in tasks}),
    )


class _NotCounted:
    """In core's set of ids to ignore, one that equals every token that does not count."""

    def __init__(self, tokens: TokenSelection, tokenizer: Any):
        self._tokens, self._tokenizer = tokens, tokenizer

    def __eq__(self, tokens: Any) -> Any:
        return ~self._tokens.counts(tokens, self._tokenizer)

    __hash__ = object.__hash__


def core_tokens(main: ModuleType, tokens: TokenSelection) -> Replacement:
    """
    Core takes the tokens that the SAEs were trained on.

    It joins texts with BOS and takes all positions, whatever the SAEs' metadata say, and
    needs `prepend_bos` to be among them.
    """
    own_from_sae, own_run_evals = main.ActivationsStore.from_sae, main.run_evals

    def from_sae(model: Any, sae: Any, **kwargs: Any) -> Any:
        sae.cfg.metadata.prepend_bos = tokens.prepend_bos
        return own_from_sae(
            model,
            sae,
            sequence_separator_token=tokens.sequence_separator_token,
            disable_concat_sequences=tokens.disable_concat_sequences,
            **kwargs,
        )

    def run_evals(model: Any, ignore_tokens: Any, **kwargs: Any) -> Any:  # noqa: ARG001
        ignored = {_NotCounted(tokens, model.tokenizer)}
        return own_run_evals(model=model, ignore_tokens=ignored, **kwargs)

    store = SimpleNamespace(from_sae=from_sae)
    return replaced((vars(main), {"ActivationsStore": store, "run_evals": run_evals}))


def local_tokens() -> Replacement:
    """
    SAELens reads rows of tokens from a local folder.

    It looks on the Hub for how they were made, where a path is no name.
    """
    unchecked = {"validate_pretokenized_dataset_tokenizer": lambda **_: None}
    return replaced((vars(activations_store), unchecked))


def absorption_experiments(main: ModuleType, folder: Path, seed: int) -> Replacement:
    """
    Absorption keeps probes in a folder of the call's own, and draws by its seed.

    By default they are in the folder of the installed sae_bench, found again by the names
    of model and SAE alone. And nothing reads the configuration's `random_seed`, so that an
    SAE's result depends on the SAEs before it; nor do tokenizers list their vocabulary in
    the same order in each process.
    """
    from sae_bench.evals.absorption import (
        common,
        feature_absorption,
        k_sparse_probing,
    )

    own_tokens = common.get_alpha_tokens

    def get_alpha_tokens(tokenizer: Any) -> list[str]:
        return sorted(own_tokens(tokenizer))

    def seeded(function: Callable[..., Any], **folders: Path) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            random.seed(seed)
            torch.manual_seed(seed)
            return function(*args, **kwargs, **folders)

        return run

    probes, probing = folder / "probes", folder / "k_sparse_probing"
    of_absorption = {
        "probes_dir": probes,
        "sparse_probing_experiment_dir": probing,
        "experiment_dir": folder / "feature_absorption",
    }
    bound = {
        "run_k_sparse_probing_experiment": seeded(
            main.run_k_sparse_probing_experiment,
            probes_dir=probes,
            experiment_dir=probing,
        ),
        "run_feature_absortion_experiment": seeded(
            main.run_feature_absortion_experiment, **of_absorption
        ),
    }
    # the language model's probe, trained before these, is trained for the first SAE alone
    train = {"train_k_sparse_probes": seeded(k_sparse_probing.train_k_sparse_probes)}
    tokens = {"get_alpha_tokens": get_alpha_tokens}
    return replaced(
        (vars(main), bound),
        (vars(k_sparse_probing), train),
        (vars(common), tokens),
        (vars(feature_absorption), tokens),
    )


def core_runs(main: ModuleType, kept: Kept | None) -> Replacement:
    """
    Core runs the language model once for all SAEs, as far as that does not depend on them.

    It runs all of it anew for each SAE, with the SAE, without, and with zeros.
    """
    load = main.HookedTransformer.from_pretrained_no_processing

    def load_shared(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        fuse(model)
        if not isinstance(model, HookedTransformer):
            return model
        return SharedRuns(model, kept)

    loader = SimpleNamespace(from_pretrained_no_processing=load_shared)
    return replaced((vars(main), {"HookedTransformer": loader}))


def mdl_config(main: ModuleType, config: Any) -> Replacement:
    """
    MDL reads sequences of its configuration's length.

    Its functions read a global `config`, which only its command line sets, and sequences
    as long as the SAE's metadata say.
    """
    own, size = main.ActivationsStore.from_sae, config.context_length
    store = SimpleNamespace(from_sae=partial(own, context_size=size))
    return replaced((vars(main), {"config": config, "ActivationsStore": store}))


class TensorsStay(TorchFunctionMode):
    """
    `Tensor.cuda()` leaves a tensor where it is.

    MDL moves sums that are on its device already to CUDA, whatever the device.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


class _LayerWithTuples:
    """A layer whose hooks get a tuple, as in transformers 4, in transformers 5 too."""

    def __init__(self, layer: torch.nn.Module):
        self.layer = layer

    def register_forward_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        def hook_of_tensor(module: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return hook(module, inputs, output)
            return hook(module, inputs, (output,))[0]

        return self.layer.register_forward_hook(hook_of_tensor)


def ravel_libraries(main: ModuleType, model_name: str) -> Replacement:
    """
    RAVEL takes any model, and works with the libraries of today.

    It looks the model's name up in a table of two; it expects a tuple where a layer of
    transformers 5 returns a tensor; and it passes `snapshot_download` an argument that
    huggingface_hub 1.0 has dropped.
    """
    from sae_bench.evals.ravel import instance
    from sae_bench.sae_bench_utils import activation_collection

    names: dict[str, str] = main.LLM_NAME_MAP
    own_get_module = activation_collection.get_module
    own_download = instance.snapshot_download

    def get_module(model: Any, layer_num: int) -> _LayerWithTuples:
        return _LayerWithTuples(own_get_module(model, layer_num))

    def snapshot_download(**kwargs: Any) -> Any:
        del kwargs["local_dir_use_symlinks"]
        return own_download(**kwargs)

    return replaced(
        (names, {model_name: names.get(model_name, model_name)}),
        (vars(activation_collection), {"get_module": get_module}),
        (vars(instance), {"snapshot_download": snapshot_download}),
    )
