"""Known truth: sparse features and a dense low-rank component, planted together."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from sae_lens import SAE, LoggingConfig, synthetic
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

from saelens_scaffold._util.files import new_directory
from saelens_scaffold._util.provenance import versions
from saelens_scaffold._util.tasks import Reporter, Task, TaskQueue, Workers
from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold.demo.report import DENSE, TWINS, Half, Row, by_sae
from saelens_scaffold.saes.calibration import SampledBatches, calibrate_threshold
from saelens_scaffold.saes.facts import l0_warning, scaffold_rank
from saelens_scaffold.saes.subspaces import orthonormal_basis, subspace_overlap
from saelens_scaffold.training.runner import initial_sae

Settings = dict[str, Any]
"""Content of planted.yaml, or changed values of its fields."""

# MultiSAETrainer routes activations by hook point; planted data has a single one.
HOOK_NAME = "planted"
RESULTS_FILENAME = "results.json"


def planted_settings(quick: bool = False) -> Settings:
    """The packaged settings; `quick`: a fraction of the samples."""
    settings = yaml.safe_load(Path(__file__).with_name("planted.yaml").read_text())
    if quick:
        settings["training"]["training_samples"] = 153_600
        settings["eval_samples"] = 4096
    return settings


def planted_configs(settings: Settings) -> dict[str, TrainingSAEConfig]:
    """Plain SAEs and their scaffold twins, by architecture: of the same width and k."""
    configs: dict[str, TrainingSAEConfig] = {}
    for architecture in (name for pair in TWINS.items() for name in reversed(pair)):
        config_class = get_sae_training_class(architecture)[1]
        fields = config_class.__dataclass_fields__
        values = {name: v for name, v in settings["sae"].items() if name in fields}
        configs[architecture] = config_class(**values)
    return configs


class PlantedActivations(Iterator[dict[str, torch.Tensor]]):
    """
    SAELens's synthetic activations plus a dense Gaussian component of low rank.

    Iterating gives training batches for `MultiSAETrainer`.

    Args:
        settings: What is planted.
        seed: Seed of what is planted. Samples come from torch's global generator.
    """

    def __init__(self, settings: Settings, seed: int):
        self.batch_size: int = settings["training"]["batch_size"]
        config = synthetic.SyntheticModelConfig.from_dict(settings["model"])
        self.model = synthetic.SyntheticModel(replace(config, seed=seed))
        vectors = self.model.feature_dict.feature_vectors.detach()
        self.features = torch.nn.functional.normalize(vectors, dim=1)
        """Unit directions of the sparse features, shape (n_features, d_in)."""
        rank = settings["sae"]["scaffold_rank"]
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(config.hidden_dim, rank, generator=generator)
        self.dense_directions = torch.linalg.qr(gaussian).Q.T
        """Orthonormal rows that span the dense component, shape (rank, d_in)."""
        self.dense_stds = torch.linspace(**settings["dense_stds"], steps=rank)

    @torch.no_grad()
    def sample(self, n: int) -> torch.Tensor:
        """Draw n activations, shape (n, d_in)."""
        dense = torch.randn(n, len(self.dense_stds)) * self.dense_stds
        return self.model.sample(n) + dense @ self.dense_directions

    def __next__(self) -> dict[str, torch.Tensor]:
        return {HOOK_NAME: self.sample(self.batch_size)}


def planted_half(
    settings: Settings,
    seeds: list[int],
    output_path: Path,
    workers: Workers | None = None,
) -> Half:
    """Train and measure SAEs with each seed, unless an earlier run has done so."""
    workers = workers or Workers()
    provenance = {"settings": settings, "versions": versions()}
    found: dict[int, list[Row]] = {}
    tasks: list[Task] = []
    for seed in seeds:
        directory = output_path.resolve() / f"seed-{seed}"
        file = directory / RESULTS_FILENAME
        content = read_json(file) if file.is_file() else {}
        found[seed] = [Row(**row) for row in content.pop("results", [])]
        if content != provenance:
            about = f"· planted data, seed {seed}"
            call = partial(_train_seed, provenance, seed, directory)
            tasks.append(Task(seed, about, "planted", call))
    for done in workers.run(TaskQueue(tasks, "training", workers)):
        if done.error is not None:
            raise done.error
        found[done.task.key] = done.value
    rows = [row for seed in seeds for row in found[seed]]
    title = "Known truth: sparse features and a dense component, planted"
    return Half(title, by_sae(rows), [row.l0_warning for row in rows if row.l0_warning])


def _train_seed(
    provenance: dict[str, Any], seed: int, directory: Path, _: Reporter
) -> list[Row]:
    """Train and measure the SAEs of a seed, and keep what was measured."""
    with new_directory(directory, replace=True) as temporary:
        rows = train_on_planted(provenance["settings"], seed, temporary)
        content = {**provenance, "results": [asdict(row) for row in rows]}
        (temporary / RESULTS_FILENAME).write_text(json.dumps(content, indent=1))
    return rows


def train_on_planted(settings: Settings, seed: int, output_path: Path) -> list[Row]:
    """
    Train SAEs in lockstep on the same samples, save them and measure what was saved.

    Args:
        settings: What is planted, and how the SAEs are trained.
        seed: Seed of what is planted, of the SAEs' weights and of the samples.
        output_path: Directory that gets a directory for each SAE.
    """
    planted = PlantedActivations(settings, seed)
    configs = planted_configs(settings)
    saes = {name: initial_sae(config, seed) for name, config in configs.items()}
    # no checkpoints are written unless the settings ask for some
    logger = LoggingConfig(log_to_wandb=False)
    runner_config = synthetic.SyntheticSAERunnerConfig(
        planted.model.cfg, configs["batchtopk"], **settings["training"], logger=logger
    )
    trainer_config = runner_config.to_sae_trainer_config()
    batches = SampledBatches(planted)
    hook_names = dict.fromkeys(saes, HOOK_NAME)
    torch.manual_seed(seed)
    MultiSAETrainer(trainer_config, saes, hook_names, batches).fit()

    # held out, and the same whatever was trained
    torch.manual_seed(seed + 1_000_000)
    samples = planted.sample(settings["eval_samples"])
    rows: list[Row] = []
    for name, sae in tqdm(saes.items(), desc="Measuring on planted data"):
        calibrate_threshold(sae, batches.samples[HOOK_NAME])  # type: ignore[arg-type]
        sae.save_inference_model(output_path / name)
        rows.append(_measure(output_path / name, seed, planted, samples))
    return rows


@torch.no_grad()
def _measure(
    path: Path, seed: int, planted: PlantedActivations, samples: torch.Tensor
) -> Row:
    """Row of a saved SAE."""
    sae: SAE[Any] = SAE.load_from_disk(path)
    acts = sae.encode(samples)
    residual = samples - sae.decode(acts)
    variance = (samples - samples.mean(dim=0)).pow(2).sum()
    rank = scaffold_rank(sae)
    frequencies = (acts != 0).float().mean(dim=0)[rank:]
    alive = sae.W_dec[rank:][frequencies > 0]
    cosines = torch.nn.functional.normalize(alive, dim=1) @ planted.features.T
    scaffold = orthonormal_basis(sae.W_dec[:rank])
    truth = orthonormal_basis(planted.dense_directions)
    l0_sparse = float(frequencies.sum())
    numbers: dict[str, float | None] = {
        **{name: int((frequencies > t).sum()) for name, t in DENSE.items()},
        "alive": len(alive),
        "l0_sparse": l0_sparse,
        "l0_total": l0_sparse + rank,
        "explained_variance": float(1 - residual.pow(2).sum() / variance),
        "feature_cosine": float(cosines.max(dim=1).values.mean()),
        "overlap": subspace_overlap(scaffold, truth) if rank else None,
    }
    label = f"{path.name}, seed {seed}"
    warning = l0_warning(label, l0_sparse, len(samples), sae.cfg.metadata)
    rounded = [round(frequency, 6) for frequency in frequencies.tolist()]
    return Row(path.name, path.name, seed, numbers, rounded, warning)
