"""Plugins: they fire from the SAE, in any training loop, and do what they say."""

import copy
import importlib
import subprocess
import sys
import venv
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepInput

from helpers import (
    D_IN,
    RANK,
    K,
    activations,
    batches,
    overlap,
    scaffold_config,
    scaffold_sae,
    train,
    trainer_for,
)
from saelens_scaffold.models import load_embedded_model, load_stdlib_text
from saelens_scaffold.plugins import manager as plugins
from saelens_scaffold.plugins.hookspecs import ScaffoldStart, hookimpl


class Recorder:
    """Notes every call of every hook."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps: list[int] = []

    @hookimpl
    def initialize_scaffold(self) -> None:
        self.calls.append("initialize")

    @hookimpl
    def before_training_forward_pass(self, step_input: TrainStepInput) -> None:
        self.calls.append("before_forward")
        self.steps.append(step_input.n_training_steps)

    @hookimpl
    def training_losses(self, output: Any) -> dict[str, torch.Tensor]:
        self.calls.append("losses")
        return {"own_loss": 0.5 * output.sae_out.pow(2).mean()}

    @hookimpl
    def training_metrics(self) -> dict[str, Any]:
        self.calls.append("metrics")
        return {"own_metric": lambda: 7.0}

    @hookimpl
    def before_optimizer_step(self, sae: Any, n_training_steps: int) -> None:
        assert sae.W_dec.grad is not None
        assert n_training_steps == self.steps[-1]
        self.calls.append("before_step")

    @hookimpl
    def after_optimizer_step(self, n_training_steps: int) -> None:
        assert not torch.is_grad_enabled()
        assert n_training_steps == self.steps[-1]
        self.calls.append("after_step")

    @hookimpl
    def training_ended(self) -> None:
        self.calls.append("ended")

    @hookimpl
    def before_saving_inference(self, state_dict: dict[str, torch.Tensor]) -> None:
        assert "scaffold_is_initialized" in state_dict
        self.calls.append("saving")


STEP = ["before_forward", "losses", "metrics", "before_step", "after_step"]


def recorded(sae: Any) -> Recorder:
    recorder = Recorder()
    plugins.plugins_of(sae).register(recorder)
    return recorder


def test_hooks_fire_in_saelenss_trainer(tmp_path: Path) -> None:
    sae = scaffold_sae(normalize_activations="expected_average_only_in")
    recorder = recorded(sae)
    trained = train(sae, steps=3)  # folds the normalisation in at its end
    trained.save_inference_model(tmp_path)
    assert recorder.calls == ["initialize", *STEP * 3, "ended", "saving"]
    assert recorder.steps == [0, 1, 2]


def test_hooks_fire_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    sae, other = scaffold_sae(), scaffold_sae(seed=1)
    recorder, of_other = recorded(sae), recorded(other)
    optimizer = torch.optim.SGD(sae.parameters(), lr=1e-3)
    for step in range(2):
        both = [
            s.training_forward_pass(
                TrainStepInput(activations(32), {}, None, step, is_logging_step=True)
            )
            for s in (sae, other)
        ]
        both[0].loss.backward()
        optimizer.step()
    sae.save_inference_model(tmp_path)
    assert recorder.calls == ["initialize", *STEP * 2, "ended", "saving"]
    # another SAE's optimizer never stepped
    assert "before_step" not in of_other.calls


def test_looking_at_a_view_does_not_end_the_training(tmp_path: Path) -> None:
    class Views:
        @hookimpl
        def training_metrics(self, sae: Any) -> dict[str, Any]:
            sae.sparse_sae()
            sae.to_jumprelu()
            return {}

    sae = scaffold_sae(
        scaffold_init="random", scaffold_plugins={"schedule": {"frozen_from": 0}}
    )
    plugins.plugins_of(sae).register(Views())
    recorder, before = recorded(sae), state(sae)
    train(sae, steps=2)
    calls = [call for call in recorder.calls if call != "saving"]
    assert calls == ["initialize", *STEP * 2]
    for name in ("A", "B"):
        assert torch.equal(state(sae)[name], before[name])
    sae.save_inference_model(tmp_path)
    sae.save_inference_model(tmp_path)
    assert recorder.calls.count("ended") == 1


def test_hooks_fire_in_saelenss_runner_of_many_saes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each SAE has a plugin of its own, which hears of its own steps only."""
    made: list[Recorder] = []

    def make() -> Recorder:
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(plugins, "load_plugin", lambda _: make)
    kwargs: dict[str, Any] = {
        "d_in": 256,
        "d_sae": 64,
        "scaffold_plugins": {"recorder": {}},
    }
    runner = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={
                "a": scaffold_config(**kwargs),
                "b": scaffold_config("scaffold_matryoshka", **kwargs),
            },
            model_name="py-neox",
            hook_names="blocks.0.hook_resid_post",
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            streaming=False,
            context_size=64,
            n_batches_in_buffer=4,
            store_batch_size_prompts=8,
            training_tokens=3 * 256,
            train_batch_size_tokens=256,
        ),
        override_dataset=load_stdlib_text("test"),
        override_model=load_embedded_model(),
    )
    runner.run()
    # configurations are checked by making plugins, too; those are never called
    called = [recorder.calls for recorder in made if recorder.calls]
    assert called == [["initialize", *STEP * 3]] * 2


def test_losses_and_metrics_reach_saelenss_log() -> None:
    sae = scaffold_sae()
    recorded(sae)
    trainer = trainer_for(sae, 1, batches())
    output = trainer.step(next(batches()))
    own = 0.5 * output.sae_out.pow(2).mean()
    assert torch.allclose(output.losses["own_loss"], own)
    assert torch.allclose(output.loss, sum(output.losses.values()))  # type: ignore[arg-type]
    logged = trainer.build_train_step_log_dict(output, n_training_samples=1)
    assert logged["losses/own_loss"] == pytest.approx(own.item())
    assert logged["metrics/own_metric"] == 7.0


def test_name_that_is_taken() -> None:
    sae = scaffold_sae()
    recorded(sae)
    recorded(sae)
    with pytest.raises(ValueError, match="adds a loss 'own_loss', which there is"):
        train(sae, steps=1)


def test_plugin_starts_the_scaffold(tmp_path: Path) -> None:
    start = ScaffoldStart(
        A=torch.full((D_IN, RANK), 0.1), B=torch.eye(RANK, D_IN), b_dec=torch.ones(D_IN)
    )
    calls: list[torch.Tensor] = []

    class Start:
        @hookimpl
        def initialize_scaffold(self, sae_in: torch.Tensor) -> ScaffoldStart:
            calls.append(sae_in)
            return start

    sae = scaffold_sae()
    plugins.plugins_of(sae).register(Start())
    train(sae, steps=2, lr=0.0, lr_end=0.0)
    assert torch.equal(sae.W_enc[:, :RANK], start.A)
    assert torch.equal(sae.W_dec[:RANK], start.B)
    assert start.b_dec is not None and torch.equal(sae.b_dec, start.b_dec)
    assert len(calls) == 1
    assert torch.equal(calls[0], next(batches()))

    start = ScaffoldStart(A=torch.zeros(2, 2), B=torch.eye(RANK, D_IN))
    sae = scaffold_sae()
    plugins.plugins_of(sae).register(Start())
    with pytest.raises(ValueError, match=r"gave A of shape \(2, 2\).*\(16, 3\)"):
        train(sae, steps=1)


def test_copy_has_plugins_of_its_own() -> None:
    sae = scaffold_sae(scaffold_plugins={"live_metrics": {}})
    train(sae, steps=1)
    twin = copy.deepcopy(sae)
    (mine,) = plugins.plugins_of(sae).get_plugins()
    (its,) = plugins.plugins_of(twin).get_plugins()
    assert mine is not its


# ---- choosing them


def test_configuration_is_saved_with_the_sae(tmp_path: Path) -> None:
    chosen = {"live_metrics": {"window": 7}, "schedule": {"frozen_from": 3}}
    sae = scaffold_sae(scaffold_plugins=chosen)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert loaded.cfg.scaffold_plugins == chosen  # type: ignore[attr-defined]
    manager: Any = plugins.plugins_of(loaded)  # type: ignore[arg-type]
    assert manager.get_plugin("live_metrics").window == 7
    assert manager.get_plugin("schedule").frozen_from == 3
    assert "scaffold_plugins" not in sae.to_inference().cfg.to_dict()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"nonsense": {}}, "no scaffold plugin 'nonsense'; there are .*live_metrics"),
        ({"live_metrics": {"wind": 3}}, "'live_metrics' fails with .*'wind'"),
        ({"live_metrics": {"window": 0}}, "window is 0"),
        ({"schedule": {"alone_until": -1}}, "alone_until is -1"),
        ({"schedule": {"alone_until": 5, "frozen_from": 3}}, "frozen_from is 3"),
        ({"schedule": {"lr_factor": -1}}, "lr_factor is -1"),
        ({"decorrelation": {}}, "'decorrelation' fails with"),
        ({"decorrelation": {"coefficient": 0}}, "coefficient is 0"),
        (["live_metrics"], "must map names"),
        ({"live_metrics": None}, "'live_metrics' fails with the options None"),
    ],
)
def test_wrong_choice(chosen: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaffold_config(scaffold_plugins=chosen)


def test_error_of_a_plugins_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(size: Any = 1) -> Any:
        return size + "a"

    monkeypatch.setattr(plugins, "load_plugin", lambda _: make)
    message = "'mine' fails with the options {}: TypeError: unsupported operand"
    with pytest.raises(ValueError, match=message):
        scaffold_config(scaffold_plugins={"mine": {}})


def test_hook_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    class Misspelt:
        @hookimpl
        def training_loses(self) -> None: ...

    monkeypatch.setattr(plugins, "load_plugin", lambda _: Misspelt)
    with pytest.raises(ValueError, match="training_loses"):
        scaffold_config(scaffold_plugins={"misspelt": {}})


# ---- the plugins that come with the package


def state(sae: Any) -> dict[str, torch.Tensor]:
    r = sae.cfg.scaffold_rank
    return {
        name: part.detach().clone()
        for name, part in {
            "A": sae.W_enc[:, :r],
            "B": sae.W_dec[:r],
            "W_enc": sae.W_enc[:, r:],
            "W_dec": sae.W_dec[r:],
            "b_enc": sae.b_enc[r:],
        }.items()
    }


@pytest.mark.parametrize("architecture", ["scaffold_batchtopk", "scaffold_matryoshka"])
def test_schedule_trains_the_scaffold_alone_and_then_freezes_it(
    architecture: str, tmp_path: Path
) -> None:
    schedule = {"alone_until": 2, "frozen_from": 4}
    sae = scaffold_sae(architecture, scaffold_plugins={"schedule": schedule})
    trainer, data = trainer_for(sae, 6, batches()), batches()
    states = []
    for _ in range(6):
        output = trainer.step(next(data))
        trainer.n_training_steps += 1
        states.append(state(sae))
        n_sparse = float((output.feature_acts[:, RANK:] != 0).sum(dim=1).float().mean())
        assert n_sparse == (0 if len(states) <= 2 else pytest.approx(K))

    def changed(step: int, name: str) -> bool:
        return not torch.equal(states[step - 1][name], states[step][name])

    for name in ("A", "B"):
        assert [changed(step, name) for step in range(1, 6)] == [1, 1, 1, 0, 0]
    for name in ("W_enc", "W_dec"):
        assert [changed(step, name) for step in range(1, 6)] == [0, 1, 1, 1, 1]
    sae.save_inference_model(tmp_path)
    assert sae.activation_fn.sparse_activation.k == K


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_dictionary_is_not_revived_before_it_could_fire(kernels: str) -> None:
    sae = scaffold_sae(
        kernels=kernels, scaffold_plugins={"schedule": {"alone_until": 6}}
    )
    sae.b_enc.data[-1] = -1e3  # one that is dead for good
    trainer, data = trainer_for(sae, 14, batches(), dead_feature_window=2), batches()
    before, losses = state(sae), []
    for step in range(14):
        output = trainer.step(next(data))
        trainer.n_training_steps += 1
        losses.append(output.losses["auxiliary_reconstruction_loss"].item())
        if step < 6:
            for name in ("W_enc", "W_dec", "b_enc"):
                assert torch.equal(state(sae)[name], before[name])
    assert losses[:12] == [0.0] * 12
    assert min(losses[12:]) > 0


def test_dictionary_that_was_never_trained_is_noticed(tmp_path: Path) -> None:
    def trained(steps: int) -> Any:
        chosen = {"schedule": {"alone_until": 2}}
        return train(scaffold_sae(scaffold_plugins=chosen), steps=steps)

    sae = trained(2)
    for save in (sae.to_inference, lambda: sae.save_inference_model(tmp_path)):
        with pytest.warns(UserWarning, match="alone_until=2 steps, so the dictionary"):
            save()
    assert sae.activation_fn.sparse_activation.k == K
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(3).to_inference()


def test_learning_rate_factor_scales_the_step() -> None:
    def step_of(factor: float | None) -> dict[str, torch.Tensor]:
        chosen = {} if factor is None else {"schedule": {"lr_factor": factor}}
        # a start that does not depend on the first step
        sae = scaffold_sae(scaffold_init="random", scaffold_plugins=chosen)
        before = state(sae)
        trainer_for(sae, 1, batches()).step(next(batches()))
        return {name: part - before[name] for name, part in state(sae).items()}

    plain, half, none = step_of(None), step_of(0.5), step_of(0.0)
    for name in ("A", "B"):
        assert plain[name].abs().max() > 0
        assert torch.allclose(half[name], 0.5 * plain[name], atol=1e-7)
        assert torch.equal(none[name], torch.zeros_like(none[name]))
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(half[name], plain[name])


def test_orthonormal_decoder() -> None:
    sae = scaffold_sae(
        scaffold_init="random", scaffold_plugins={"orthonormal_decoder": {}}
    )
    train(sae, steps=5)
    B = sae.W_dec[:RANK].detach()
    assert torch.allclose(B @ B.T, torch.eye(RANK), atol=1e-5)

    # what the scaffold writes is kept, where the rows were not orthonormal
    other = scaffold_sae(scaffold_init="random")
    other.W_dec.data[:RANK] *= torch.tensor([[0.5], [1.0], [3.0]])
    before = (other.W_enc[:, :RANK] @ other.W_dec[:RANK]).detach()
    from saelens_scaffold.plugins.orthonormal_decoder import OrthonormalDecoder

    with torch.no_grad():
        OrthonormalDecoder().after_optimizer_step(other)
    after = (other.W_enc[:, :RANK] @ other.W_dec[:RANK]).detach()
    assert torch.allclose(before, after, atol=1e-5)


def test_orthonormal_decoder_is_as_exact_as_the_sae() -> None:
    sae = scaffold_sae(
        dtype="float64",
        scaffold_init="random",
        scaffold_plugins={"orthonormal_decoder": {}},
    )
    train(sae, steps=2)
    B = sae.W_dec[:RANK].detach()
    assert torch.allclose(B @ B.T, torch.eye(RANK).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("schedule_first", [True, False])
def test_orthonormal_decoder_with_a_schedule(schedule_first: bool) -> None:
    """Whichever is chosen first, rows are orthonormal, and what is frozen stays."""

    def chosen(schedule: dict[str, Any]) -> dict[str, Any]:
        both: dict[str, Any] = {"schedule": schedule, "orthonormal_decoder": {}}
        return both if schedule_first else dict(reversed(both.items()))

    sae = scaffold_sae(
        scaffold_init="random", scaffold_plugins=chosen({"lr_factor": 5.0})
    )
    train(sae, steps=30)
    B = sae.W_dec[:RANK].detach()
    assert torch.allclose(B @ B.T, torch.eye(RANK), atol=1e-5)

    sae = scaffold_sae(
        scaffold_init="random", scaffold_plugins=chosen({"frozen_from": 1})
    )
    trainer, data = trainer_for(sae, 20, batches()), batches()
    states = []
    for _ in range(20):
        trainer.step(next(data))
        trainer.n_training_steps += 1
        states.append(state(sae))
    for name in ("A", "B"):
        assert torch.equal(states[0][name], states[-1][name])


def test_decorrelation() -> None:
    def correlation(sae: Any) -> float:
        x = activations(500, seed=99)
        with torch.no_grad():
            S = sae.scaffold(x)
            D = sae.decode(sae.encode(x)) - S
        S, D = S - S.mean(dim=0), D - D.mean(dim=0)
        return float((S.T @ D).norm() ** 2 / (S.T @ S).norm() / (D.T @ D).norm())

    kwargs: dict[str, Any] = {
        "scaffold_init": "random",
        "sparse_encoder_input": "activation",
    }
    plain = train(scaffold_sae(**kwargs), steps=60)
    chosen = {"decorrelation": {"coefficient": 100.0}}
    sae = scaffold_sae(**kwargs, scaffold_plugins=chosen)
    output = trainer_for(sae, 1, batches()).step(next(batches()))
    assert 0 < output.losses["scaffold_decorrelation"].item() <= 100
    train(sae, steps=60)
    assert correlation(sae) < 0.5 * correlation(plain)

    # the loss is the quantity that the docstring names
    fresh = scaffold_sae(**kwargs, scaffold_plugins=chosen)
    x = next(batches())
    fresh.initialize_scaffold(x)
    with torch.no_grad():
        S, out = fresh.scaffold(x), fresh.decode(fresh.encode(x))
    S, D = S - S.mean(dim=0), (out - S) - (out - S).mean(dim=0)
    expected = 100 * (S.T @ D).norm() ** 2 / (S.T @ S).norm() / (D.T @ D).norm()
    output = fresh.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    assert torch.allclose(output.losses["scaffold_decorrelation"], expected, rtol=1e-4)


def test_live_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = scaffold_sae(scaffold_plugins={"live_metrics": {"window": 4}})
    trainer, data = trainer_for(sae, 20, batches()), batches()
    # as with W&B; else there is nobody to compute them for
    assert "dense_latents" not in trainer.step(next(batches())).metrics
    sae = scaffold_sae(scaffold_plugins={"live_metrics": {"window": 4}})
    trainer = trainer_for(sae, 20, batches())
    monkeypatch.setattr(trainer, "_is_logging_step", lambda: True)
    steps = [trainer.step(next(data)) for _ in range(3)]
    x = next(data)
    with torch.no_grad():
        s, B = sae.scaffold(x), sae.W_dec[:RANK].clone()
    output = trainer.step(x)
    fired = [
        (of.feature_acts[:, RANK:] != 0).float().mean(dim=0) for of in (*steps, output)
    ]
    metrics: dict[str, Any] = {
        name: float(value() if callable(value) else value)
        for name, value in output.metrics.items()
    }
    share = 1 - (x - s).var(dim=0).sum() / x.var(dim=0).sum()
    assert metrics["scaffold_explained_variance"] == pytest.approx(
        float(share), abs=1e-5
    )
    pca = torch.linalg.eigh(torch.cov(x.double().T)).eigenvectors[:, -RANK:].T
    assert metrics["scaffold_pca_overlap"] == pytest.approx(overlap(B, pca), abs=1e-4)
    variances = torch.linalg.eigvalsh(torch.cov(s.double().T))[-RANK:]
    shares = variances / variances.sum()
    rank = float((-(shares * shares.log()).sum()).exp())
    assert metrics["scaffold_effective_rank"] == pytest.approx(rank, rel=1e-3)
    frequency = torch.stack(fired).mean(
        dim=0
    )  # a plain mean, as the window is not full
    assert metrics["dense_latents"] == float((frequency > 0.1).sum())
    logged = trainer.build_train_step_log_dict(output, n_training_samples=1)
    assert logged["metrics/scaffold_pca_overlap"] == pytest.approx(
        metrics["scaffold_pca_overlap"]
    )


@pytest.mark.parametrize(
    "chosen",
    [{}, {"live_metrics": {}}, {"schedule": {}}],
    ids=["none", "live_metrics", "idle schedule"],
)
def test_what_only_watches_changes_nothing(chosen: dict[str, Any]) -> None:
    plain = train(scaffold_sae(), steps=10)
    watched = train(scaffold_sae(scaffold_plugins=chosen), steps=10)
    for name, weights in plain.state_dict().items():
        assert torch.equal(weights, watched.state_dict()[name]), name


def test_all_of_them_at_once_with_rank_0() -> None:
    chosen = {
        "live_metrics": {},
        "schedule": {"frozen_from": 1},
        "orthonormal_decoder": {},
        "decorrelation": {"coefficient": 1.0},
    }
    sae = scaffold_sae(scaffold_rank=0, scaffold_plugins=chosen)
    train(sae, steps=3)
    assert all(weights.isfinite().all() for weights in sae.state_dict().values())


# ---- a plugin of somebody else's

ROOT = Path(__file__).parents[1]


def code_blocks(page: Path) -> dict[str, str]:
    """The files that a page shows: blocks whose first line is a comment with a path."""
    blocks = page.read_text(encoding="utf-8").split("```")[1::2]
    named = (block.partition("\n")[2].partition("\n") for block in blocks)
    return {
        first.removeprefix("# "): rest
        for first, _, rest in named
        if first.startswith("# ") and "." in first
    }


def test_the_package_of_the_documentation_works_in_a_fresh_environment(
    tmp_path: Path,
) -> None:
    files = code_blocks(ROOT / "docs" / "plugins.md")
    package = [files["pyproject.toml"], files["shrink_scaffold.py"]]
    lines = [line for file in package for line in file.splitlines() if line.strip()]
    assert len(lines) < 30
    source = tmp_path / "package"
    source.mkdir()
    (source / "pyproject.toml").write_text(package[0])
    (source / "shrink_scaffold.py").write_text(package[1])

    venv.create(tmp_path / "env", with_pip=True)
    python = next((tmp_path / "env").glob("[bS]*/python*"))
    # It has this package and those it needs as they are here; the plugin is its own.
    here = [path for path in sys.path if path.endswith("site-packages")]
    site = next((tmp_path / "env").rglob("site-packages"))
    (site / "here.pth").write_text("\n".join([*here, str(ROOT / "src")]))
    install = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*install, "--no-build-isolation", source], check=True)

    (tmp_path / "run.py").write_text(files["run.py"])
    done = subprocess.run(
        [python, "run.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "scaffold_s" in done.stderr  # in SAELens's progress bar, cut to its width


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """Installs a package with a plugin, as pip leaves it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package: str, source: str, plugin: str) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        (info / "METADATA").write_text(about)
        entry = f"[saelens_scaffold]\n{plugin} = {package}:Plugin\n"
        (info / "entry_points.txt").write_text(entry)
        (tmp_path / f"{package}.py").write_text(source)
        importlib.invalidate_caches()

    yield install
    for module in tmp_path.glob("*.py"):
        sys.modules.pop(module.stem, None)


OFFERS = """
from saelens_scaffold.plugins.hookspecs import hookimpl
class Plugin:
    @hookimpl
    def evaluations(self): {evaluations}
    @hookimpl
    def comparison_metrics(self): {metrics}
"""


@pytest.mark.parametrize(
    ("package", "source", "said"),
    [
        ("breaks", "raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
        ("leaves", "raise SystemExit('no luck')", "SystemExit: no luck"),
        ("no_plugin", "", "AttributeError"),
        (
            "raises",
            OFFERS.format(evaluations="1 / 0", metrics="1 / 0"),
            "ZeroDivisionError",
        ),
        (
            "stops",
            OFFERS.format(evaluations="raise SystemExit", metrics="exit(1)"),
            "SystemExit",
        ),
        ("number", OFFERS.format(evaluations="return 5", metrics="return 5"), "int"),
        (
            "texts",
            OFFERS.format(evaluations="return ['x']", metrics="return 'x'"),
            "'x', no Evaluation",
        ),
        (
            "taken",
            OFFERS.format(
                evaluations="""
        from saelens_scaffold.evals.registry import EVALUATIONS
        return [EVALUATIONS["core"]]""",
                metrics="return []",
            ),
            "already an evaluation 'core'",
        ),
    ],
)
def test_broken_plugin_is_named_once_and_breaks_nothing_else(
    package: str,
    source: str,
    said: str,
    install: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from saelens_scaffold.compare.metrics import metrics_of
    from saelens_scaffold.evals.registry import EVALUATIONS, known_evaluations

    works = OFFERS.format(
        evaluations="""
        from saelens_scaffold.evals.base import Evaluation
        return [Evaluation("fine", "whole", "works:X")]""",
        metrics="""
        from saelens_scaffold.compare.metrics import ComparisonMetric
        return [ComparisonMetric("works.metric", "title", lambda _: 1.0)]""",
    )
    install("works", works, "works")
    install(package, source, f"{package}_plugin")
    scaffold_config()
    assert package not in sys.modules
    for _ in range(2):
        assert set(known_evaluations()) == {*EVALUATIONS, "fine"}
    about = [r.getMessage() for r in caplog.records]
    assert len(about) == 1
    assert f"{package}_plugin" in about[0]
    assert said in about[0]
    assert "\n" not in about[0]
    assert "works.metric" in {m.id for m in metrics_of([EVALUATIONS["core"]])}


def test_plugin_that_ends_the_process_is_an_error_when_it_is_chosen(
    install: Callable[..., None],
) -> None:
    install("ends", "raise SystemExit(0)", "bad")
    message = r"'bad' \(ends:Plugin\) cannot be imported: SystemExit: 0"
    with pytest.raises(ValueError, match=message):
        scaffold_config(scaffold_plugins={"bad": {}})
    made = "class Plugin:\n    def __init__(self): raise SystemExit(0)\n"
    install("made", made, "unmade")
    with pytest.raises(ValueError, match="'unmade' fails with .* SystemExit: 0"):
        scaffold_config(scaffold_plugins={"unmade": {}})


@pytest.mark.parametrize(
    ("name", "packages"),
    [("twin", ("first", "second")), ("schedule", ("first", "saelens-scaffold"))],
)
def test_two_packages_with_a_plugin_of_one_name(
    name: str,
    packages: tuple[str, str],
    install: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for package in {"first", "second"} & set(packages):
        install(package, "class Plugin: ...", name)
    with pytest.raises(ValueError, match="several packages") as raised:
        scaffold_config(scaffold_plugins={name: {}})
    assert all(package in str(raised.value) for package in packages)
    scaffold_config(scaffold_plugins={"live_metrics": {}})
    assert plugins.offered_by_plugins("evaluations", object) == {}
    for record in caplog.records:
        assert "first" in record.getMessage() and "second" in record.getMessage()


def test_plugin_offers_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    from saelens_scaffold.evals import registry
    from saelens_scaffold.evals.base import Evaluation

    own = Evaluation("own_eval", "whole", "own_package:IMPLEMENTATION")

    class Own:
        @hookimpl
        def evaluations(self) -> list[Any]:
            return [own]

    def install(plugin: Callable[[], Any]) -> None:
        monkeypatch.setattr(plugins, "available_plugins", lambda: {"own": None})
        monkeypatch.setattr(plugins, "load_plugin", lambda _: plugin)

    install(lambda: Own())  # made by a function
    assert registry.evaluations_named("own_eval,core")[0] is own
    install(Own)
    assert registry.evaluations_named("own_eval,core")[0] is own


def test_the_evaluation_of_the_documentation_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from saelens_scaffold.evals.registry import evaluations_named
    from saelens_scaffold.evals.runner import run_eval

    source = code_blocks(ROOT / "docs" / "plugins.md")["decoder_norm.py"]
    (tmp_path / "decoder_norm.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    decoder_norm = importlib.import_module("decoder_norm")
    plugin = {"decoder_norm": decoder_norm.DecoderNorm}
    monkeypatch.setattr(plugins, "available_plugins", lambda: plugin)
    monkeypatch.setattr(plugins, "load_plugin", plugin.__getitem__)
    (evaluation,) = evaluations_named("decoder_norm")
    config = decoder_norm.DecoderNormConfig(quantile=1.0)
    sae = scaffold_sae().to_inference()
    sae.cfg.metadata.model_name = "py-neox"
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    results = run_eval(
        "decoder_norm",
        config,
        [("own", sae)],
        output_path=tmp_path / "results",
        artifacts_path=tmp_path / "artifacts",
    )
    (result,) = results.values()
    (metric,) = evaluation.metrics
    largest = sae.W_dec[RANK:].norm(dim=-1).max().item()
    assert metric.value(result) == pytest.approx(largest)


def test_plugin_that_cannot_be_made_takes_no_evaluation_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Needs:
        def __init__(self, path: str) -> None: ...

        @hookimpl
        def evaluations(self) -> list[Any]:
            return []

    class Misspelt:
        @hookimpl
        def evaluations(self, sae: Any) -> list[Any]:
            return []

    class Works:
        @hookimpl
        def evaluations(self) -> list[Any]:
            return []

    class OnlyTrains:
        def __init__(self, coefficient: float) -> None: ...

    installed = {
        "needs": Needs,
        "misspelt": Misspelt,
        "works": Works,
        "trains": OnlyTrains,
    }
    monkeypatch.setattr(plugins, "available_plugins", lambda: installed)
    monkeypatch.setattr(plugins, "load_plugin", installed.__getitem__)
    assert plugins.offered_by_plugins("evaluations", object) == {"works": []}
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert "'misspelt'" in warned[0]
    assert "'needs'" in warned[1] and "'path'" in warned[1]


def test_chosen_on_saelenss_command_line() -> None:
    from sae_lens.llm_sae_training_runner import _parse_cfg_args

    cfg = _parse_cfg_args(
        [
            "--architecture=scaffold_batchtopk",
            "--d_in=16",
            "--d_sae=64",
            "--k=4",
            "--scaffold_rank=3",
            "--scaffold_plugins",
            '{"live_metrics": {"window": 7}, "orthonormal_decoder": {}}',
        ]
    )
    assert cfg.sae.scaffold_plugins == {  # type: ignore[attr-defined]
        "live_metrics": {"window": 7},
        "orthonormal_decoder": {},
    }
