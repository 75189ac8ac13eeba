"""Dark matter against planted errors, and against plain PyTorch on the embedded model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformer_lens import HookedTransformer

from eval_helpers import D_MODEL, HOOK, eval_sae, write_texts
from saelens_scaffold import pursuit
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.dark_matter import DarkMatterEvalConfig
from saelens_scaffold.evals.dark_matter.errors import Batch, LinearErrors
from saelens_scaffold.evals.dark_matter.metrics import Metrics
from saelens_scaffold.evals.dark_matter.norms import NormPredictions
from saelens_scaffold.evals.intervals import SequenceBootstrap
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.runner import run_eval
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models import load_embedded_model, load_stdlib_text
from saelens_scaffold.models.fused import fuse
from saelens_scaffold_cli import main

CONTEXT, N_FIT, N_TEST = 64, 3_000, 1_500
LATER = "blocks.1.hook_resid_post"


def config(**overrides: Any) -> DarkMatterEvalConfig:
    kwargs: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset": "python-stdlib",
        "dataset_split": "test",
        "n_fit_tokens": N_FIT,
        "n_tokens": N_TEST,
        "n_bootstrap": 50,
        **overrides,
    }
    return DarkMatterEvalConfig(**kwargs)


def evaluate(path: Path, saes: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    results = run_eval(
        "dark_matter",
        config(**overrides),
        list(saes.items()),
        output_path=path / "out",
        artifacts_path=path / "artifacts",
    )
    return {name: results[f"{name}_custom_sae"] for name in saes}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    model = load_embedded_model()
    fuse(model)  # as evaluations do: near-equal singular values feel rounding
    return model


@pytest.fixture(scope="module")
def split_tokens(model: HookedTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences to fit on, and those to test on."""
    texts = (row["text"] for row in load_stdlib_text("test"))  # type: ignore[index]
    tokens = (model.to_tokens(t, prepend_bos=False, truncate=False)[0] for t in texts)
    stream = concat_and_batch_sequences(tokens, CONTEXT, 0, None, 0)
    parts = []
    for n_tokens in (N_FIT, N_TEST):
        part: list[torch.Tensor] = []
        while sum(int((s != 0).sum()) for s in part) < n_tokens:
            part.append(next(stream))
        parts.append(torch.stack(part))
    return parts[0], parts[1]


def predicting(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens that are no BOS, nor followed by one."""
    return F.pad((tokens[:, :-1] != 0) & (tokens[:, 1:] != 0), (0, 1))


def activations(
    model: HookedTransformer, tokens: torch.Tensor, hook: str = HOOK
) -> torch.Tensor:
    _, cache = model.run_with_cache(tokens, names_filter=hook)
    return cache[hook][predicting(tokens)]


def lstsq(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # what rounding left in directions that have no variance is not to be read
    x, y = x.double(), y.double()
    return torch.linalg.lstsq(x, y, rcond=1e-6, driver="gelsd").solution


def with_ones(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)


def r_squared(y: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Of each column."""
    left, total = (y - predicted).pow(2).sum(0), (y - y.mean(0)).pow(2).sum(0)
    return 1 - left / total


# ---- on the embedded model, against all tokens in memory


@torch.no_grad()
def test_equals_a_reference_in_memory(
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
):
    sae, other = eval_sae(), eval_sae(seed=1, d_sae=200)
    result = evaluate(tmp_path, {"sae": sae, "other": other})["sae"]
    metrics = result["eval_result_metrics"]

    fit, test = (activations(model, tokens).double() for tokens in split_tokens)
    e, e_test = (x - sae.decode(sae.encode(x.float())) for x in (fit, test))
    w, total = lstsq(fit, e), (test - test.mean(0)).pow(2).sum()
    left = e_test - test @ w
    affine_left = e_test - with_ones(test) @ lstsq(with_ones(fit), e)
    squares, left_squares = (of.pow(2).sum() for of in (e_test, left))
    expected = {
        "reconstruction": {
            "fvu": squares / total,
            "fvu_nonlinear": left_squares / total,
            "fvu_nonlinear_with_intercept": affine_left.pow(2).sum() / total,
            "fvu_linear": (squares - left_squares) / total,
            "fvu_nonlinear_in_sample": (e - fit @ w).pow(2).sum()
            / (fit - fit.mean(0)).pow(2).sum(),
        },
        "linear_error": {
            "r_squared": r_squared(e_test, test @ w).mean(),
            "r_squared_in_sample": r_squared(e, fit @ w).mean(),
            "r_squared_pooled": 1
            - left_squares / (e_test - e_test.mean(0)).pow(2).sum(),
            "share_linear": (test @ w).pow(2).sum() / squares,
            "share_nonlinear": left_squares / squares,
        },
    }

    def of_norm(y: torch.Tensor, y_test: torch.Tensor) -> torch.Tensor:
        return r_squared(y_test, test @ lstsq(fit, y))

    def squared(of: torch.Tensor) -> torch.Tensor:
        return of.pow(2).sum(1, keepdim=True)

    norm, norm_test = (squared(of).sqrt() for of in (e, e_test))
    from_x = r_squared(norm_test, with_ones(test) @ lstsq(with_ones(fit), norm))
    x_norm, x_norm_test = (with_ones(squared(x).sqrt()) for x in (fit, test))
    expected["norms"] = {
        "r_squared_squared_error": of_norm(squared(e), squared(e_test)),
        "r_squared_error": from_x,
        "r_squared_error_from_norm": r_squared(
            norm_test, x_norm_test @ lstsq(x_norm, norm)
        ),
        "r_squared_squared_nonlinear_error": of_norm(
            squared(e - fit @ w), squared(left)
        ),
        "r_squared_squared_activation": of_norm(squared(fit), squared(test)),
    }
    for category, of in expected.items():
        for name, value in of.items():
            assert metrics[category][name] == pytest.approx(float(value), abs=1e-4), (
                name
            )

    # the paper's scaling: the error norm of this SAE from the other's
    inputs = []
    for x in (fit, test):
        other_e = x - other.decode(other.encode(x.float()))
        other_w = lstsq(fit, fit - other.decode(other.encode(fit.float())))
        inputs.append((squared(other_e).sqrt(), squared(other_e - x @ other_w).sqrt()))
    (scaling,) = result["error_scaling"]
    assert scaling["predictor"] == "other"
    for name, n in ("r_squared", 1), ("r_squared_with_nonlinear", 2):
        z, z_test = (with_ones(torch.cat(of[:n], dim=1)) for of in inputs)
        value = r_squared(norm_test, z_test @ lstsq(z, norm))
        assert scaling[name] == pytest.approx(float(value), abs=1e-4)


@torch.no_grad()
def test_single_numbers_predict_as_in_a_reference(
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
):
    sae = eval_sae(rank=4)
    norms = evaluate(tmp_path, {"sae": sae})["sae"]["eval_result_metrics"]["norms"]
    found: list[dict[str, torch.Tensor]] = []
    for tokens in split_tokens:
        x, at = activations(model, tokens), predicting(tokens)
        acts = sae.encode(x)
        losses = F.pad(model(tokens, return_type="loss", loss_per_token=True), (0, 1))
        found.append(
            {
                "y": (x - sae.decode(acts)).norm(dim=1, keepdim=True),
                "l0": (acts[:, 4:] != 0).sum(1, keepdim=True),
                "loss": losses[at][:, None],
                "token": tokens[at],
            }
        )
    fit, test = found
    for name in "l0", "loss":
        w = lstsq(with_ones(fit[name]), fit["y"])
        expected = r_squared(test["y"], with_ones(test[name]).double() @ w)
        value = norms[f"r_squared_error_from_{name}"]
        assert value == pytest.approx(float(expected), abs=1e-4)
    means = [
        fit["y"][fit["token"] == t].mean() if t in fit["token"] else fit["y"].mean()
        for t in test["token"]
    ]
    expected = r_squared(test["y"], torch.stack(means)[:, None])
    assert norms["r_squared_error_from_token"] == pytest.approx(
        float(expected), abs=1e-4
    )


@torch.no_grad()
def test_cross_entropies_are_of_the_hooked_model(
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
):
    sae = eval_sae()
    result = evaluate(tmp_path, {"sae": sae})["sae"]["eval_result_metrics"]
    fit = activations(model, split_tokens[0])
    w = lstsq(fit, fit - sae.decode(sae.encode(fit))).float()
    tokens = split_tokens[1]

    def ce(change: Any = lambda x: x) -> float:
        def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            return torch.where((tokens != 0)[..., None], change(x), x)

        logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, hook)])
        at = predicting(tokens)
        return float(F.cross_entropy(logits[at], tokens.roll(-1, 1)[at]))

    def reconstructed(x: torch.Tensor) -> torch.Tensor:
        return sae.decode(sae.encode(x))

    clean, of_sae = ce(), ce(reconstructed)
    linear, nonlinear = ce(lambda x: reconstructed(x) + x @ w), ce(lambda x: x - x @ w)
    expected = {
        "ce_clean": clean,
        "ce_reconstruction": of_sae,
        "ce_with_linear_error": linear,
        "ce_with_nonlinear_error": nonlinear,
        "ce_recovered_by_linear_error": (of_sae - linear) / (of_sae - clean),
        "ce_recovered_by_nonlinear_error": (of_sae - nonlinear) / (of_sae - clean),
    }
    for name, value in expected.items():
        assert result["cross_entropy"][name] == pytest.approx(value, abs=1e-3), name
    shares = result["linear_error"]
    recovered = result["cross_entropy"]["fvu_recovered_by_linear_error"]
    assert recovered == pytest.approx(1 - shares["share_nonlinear"])


def numbers(content: Any) -> list[float]:
    """All estimates of a result, without the ends of intervals."""
    if isinstance(content, Mapping):
        return [n for k, v in content.items() if "_ci_" not in k for n in numbers(v)]
    if isinstance(content, list):
        return [number for value in content for number in numbers(value)]
    return [content] if isinstance(content, float) else []


def test_batches_and_the_order_of_saes_change_nothing(tmp_path: Path):
    saes = {"sae": eval_sae(rank=4), "other": eval_sae(seed=1)}
    one = evaluate(tmp_path / "a", saes, baseline="other", n_tokens=800)
    reverse = dict(reversed(saes.items()))
    other = evaluate(
        tmp_path / "b", reverse, baseline="other", n_tokens=800, llm_batch_size=7
    )
    for name in saes:
        parts = "eval_result_metrics", "eval_result_details", "error_scaling"
        a, b = ([numbers(of[name][part]) for part in parts] for of in (one, other))
        for left, right in zip(a, b, strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


# ---- twins, hook points and pursuit, on the embedded model


@torch.no_grad()
def test_a_scaffold_is_compared_with_its_plain_twin(
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
):
    scaffold, twin = eval_sae(rank=4), eval_sae(seed=1)
    found = evaluate(tmp_path, {"own": scaffold, "twin": twin}, baseline="twin")
    own, plain = (found[name]["eval_result_metrics"] for name in ("own", "twin"))
    assert plain["scaffold"]["linear_error_taken"] is None
    taken = own["scaffold"]
    for kind in "linear", "nonlinear":
        both = [of["reconstruction"][f"fvu_{kind}"] for of in (own, plain)]
        assert taken[f"{kind}_error_taken"] == pytest.approx(1 - both[0] / both[1])
        difference = both[0] - both[1]
        assert taken[f"fvu_{kind}_difference"] == pytest.approx(difference)
        low, high = (
            taken[f"fvu_{kind}_difference_ci_{end}"] for end in ("low", "high")
        )
        assert low <= difference <= high

    x = activations(model, split_tokens[0]).double()
    w = lstsq(x, x - twin.decode(twin.encode(x.float())))
    basis = torch.linalg.qr(scaffold.W_dec[:4].double().T).Q
    linear = (x - x.mean(0)) @ w
    share = (linear @ basis).pow(2).sum() / linear.pow(2).sum()
    assert taken["share_of_linear_error"] == pytest.approx(float(share), abs=1e-6)
    variances = torch.linalg.svdvals(linear).pow(2)
    best = float(variances[:4].sum() / variances.sum())
    assert taken["share_of_linear_error_best"] == pytest.approx(best, abs=1e-6)
    singular, principal = (torch.linalg.svd(of)[2] for of in (w, linear.T @ linear))
    overlaps = {of["rank"]: of for of in found["own"]["scaffold_overlaps"]}
    for rank in 2, 4, 16:
        for name, of in ("singular_vectors", singular), ("linear_error", principal):
            cosines = torch.linalg.svdvals(of[:rank] @ basis)
            expected = pytest.approx(float(cosines.pow(2).mean()), abs=1e-6)
            assert overlaps[rank][f"with_{name}"] == expected
        assert overlaps[rank]["of_random"] == max(4, rank) / D_MODEL


@torch.no_grad()
@pytest.mark.parametrize("earlier", ["early", {"late": "early"}])
def test_an_earlier_sae_gives_further_inputs(
    earlier: Any,
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
):
    early, late = eval_sae(), eval_sae(seed=1, hook_name=LATER)
    saes = {"early": early, "late": late}
    found = evaluate(tmp_path, saes, earlier=earlier)
    assert found["early"]["eval_result_metrics"]["earlier"] == dict.fromkeys(
        found["late"]["eval_result_metrics"]["earlier"]
    )
    assert found["early"]["error_scaling"] == []  # at another hook point

    inputs, errors, totals = [], [], []
    for tokens in split_tokens:
        x, before = (activations(model, tokens, hook) for hook in (LATER, HOOK))
        reconstruction = early.decode(early.encode(before))
        both = torch.cat([x, reconstruction, before - reconstruction], dim=1)
        inputs.append(both.double())
        errors.append((x - late.decode(late.encode(x))).double())
        totals.append((x - x.mean(0)).pow(2).sum())
    of = found["late"]["eval_result_metrics"]
    names = {
        1: ("reconstruction", "fvu_nonlinear"),
        2: ("earlier", "fvu_nonlinear_with_reconstruction"),
        3: ("earlier", "fvu_nonlinear_with_reconstruction_and_error"),
    }
    for n, (category, name) in names.items():
        fit, test = (x[:, : n * D_MODEL] for x in inputs)
        left = errors[1] - test @ lstsq(fit, errors[0])
        expected = float(left.pow(2).sum() / totals[1])
        assert of[category][name] == pytest.approx(expected, abs=1e-4), name
    with_it, without = (of[names[n][0]][names[n][1]] for n in (2, 1))
    explained = of["earlier"]["nonlinear_error_explained"]
    assert explained == pytest.approx(1 - with_it / without)


@torch.no_grad()
def test_pursuit(
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
):
    sae = eval_sae(rank=4)
    of = evaluate(tmp_path, {"sae": sae}, pursuit=True)["sae"]["eval_result_metrics"]
    fit, test = (activations(model, tokens) for tokens in split_tokens)
    e, e_test = (x - sae.decode(pursuit.encode(sae, x)) for x in (fit, test))
    left = e_test - test.double() @ lstsq(fit, e)
    total = (test - test.mean(0)).pow(2).sum()
    for name, error in ("fvu", e_test), ("fvu_nonlinear", left):
        expected = float(error.pow(2).sum() / total)
        assert of["pursuit"][f"{name}_pursuit"] == pytest.approx(expected, abs=1e-4)
    assert of["pursuit"]["fvu_pursuit"] < of["reconstruction"]["fvu"]


# ---- what cannot be


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"n_fit_tokens": 256},
            "n_fit_tokens is 256; the linear map to the error of SAE",
        ),
        ({"baseline": "none"}, "baseline is 'none'; it must be one of the SAEs"),
        ({"baseline": "late"}, "it must be an SAE at blocks.0.hook_resid_post"),
        ({"earlier": "none"}, "earlier is 'none'; it must be one of the SAEs"),
        ({"earlier": "late"}, "no SAE in the call is at a later hook point"),
        (
            {"earlier": {"early": "late"}},
            "a hook point before blocks.0.hook_resid_post",
        ),
        ({"earlier": "early", "n_fit_tokens": 768}, "has 768 inputs and needs more"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(
    fields: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    eval_sae(rank=4).save_model(tmp_path / "early")
    eval_sae(seed=1, hook_name=LATER).save_model(tmp_path / "late")
    arguments = [
        *("eval", "dark_matter", f"--output_path={tmp_path}/out", "--device=cpu"),
        *("--dataset=python-stdlib", "--sae_path"),
        *(str(tmp_path / name) for name in ("early", "late")),
    ]
    for name, value in fields.items():
        arguments += ["--set", f"dark_matter.{name}={json.dumps(value)}"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1]
    assert "Fitting" not in err


def test_an_sae_without_linear_decoder_cannot_be_pursued():
    sae = eval_sae()
    decode = sae.decode
    sae.decode = lambda acts: decode(acts).relu()
    check = EVALUATIONS["dark_matter"].load().check
    check(config(), [SelectedSAE("sae", "custom_sae", sae)])
    with pytest.raises(UserError, match="needs a linear decoder"):
        check(config(pursuit=True), [SelectedSAE("sae", "custom_sae", sae)])


def test_a_text_of_too_few_tokens(tmp_path: Path):
    text = write_texts(tmp_path / "short.jsonl", ["def f(x):\n    return x\n" * 12] * 2)
    with pytest.raises(UserError, match=r"tokens to fit on; a map of 256 inputs needs"):
        evaluate(
            tmp_path, {"sae": eval_sae()}, dataset=str(text), dataset_split="train"
        )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = {"scaffold": eval_sae(rank=4), "plain": eval_sae(seed=1)}
    for name, sae in names.items():
        sae.save_model(tmp_path / name)
    arguments = [
        *("eval", "dark_matter", "--dataset=python-stdlib", "--baseline=plain"),
        *(f"--output_path={tmp_path}/out", "--device=cpu", "--sae_path"),
        *(str(tmp_path / name) for name in names),
        *("--set", f"dark_matter.n_fit_tokens={N_FIT}"),
        *("--set", "dark_matter.n_tokens=500", "--set", "dark_matter.n_bootstrap=20"),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "dark_matter: FVU" in shown.out and "linear error taken" in shown.out
    assert "dark_matter: judged the whole SAE" in shown.out
    files = sorted((tmp_path / "out" / "dark_matter").glob("*.json"))
    assert len(files) == 2
    before = [file.read_text() for file in files]
    assert main(arguments) == 0  # current
    assert [file.read_text() for file in files] == before
    # errors are predicted from those of the others in the call, which are others now
    eval_sae(seed=2).save_model(tmp_path / "third")
    capsys.readouterr()
    at = arguments.index("--sae_path") + 1
    assert main([*arguments[:at], str(tmp_path / "third"), *arguments[at:]]) == 0
    said = capsys.readouterr().err
    assert (
        "plain: measuring again, measured with other weights of the SAE third" in said
    )


# ---- planted errors, whose parts are known

N, D, PER_SEQUENCE = 400_000, 6, 100
MEAN, SCALES = torch.linspace(-1, 2, D), torch.linspace(0.5, 2, D)


def measured(
    x: torch.Tensor, errors: dict[str, torch.Tensor], **scalars: torch.Tensor
) -> Metrics:
    """Half of the tokens fitted on, half tested on."""
    fallback = torch.zeros(len(x), dtype=torch.long)
    l0, loss, token = (scalars.get(of, fallback) for of in ("l0", "loss", "token"))
    batches = [
        Batch(
            x=x[at],
            reconstructions={key: x[at] - e[at] for key, e in errors.items()},
            l0=dict.fromkeys(errors, l0[at]),
            token=token[at],
            loss=loss[at],
            sequence=torch.arange(len(at)) // PER_SEQUENCE,
        )
        for at in torch.arange(len(x)).split(len(x) // 20)
    ]
    linear = LinearErrors(D, [*errors], {}, "cpu")
    for batch in batches[:10]:
        linear.fit(batch)
    norms = NormPredictions(linear, [*errors], True, int(token.max()) + 1, "cpu")
    for batch in batches[:10]:
        norms.fit(batch)
    norms.solve()
    bootstrap = SequenceBootstrap(200, seed=0)
    for batch in batches[10:]:
        weights = bootstrap.draw(len(batch.x) // PER_SEQUENCE)
        linear.test(batch, weights)
        norms.test(batch, weights)
    return Metrics(linear, norms, 0.95)


def gaussian(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Standard normal numbers, and activations made of them, shape (N, D)."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(N, D, generator=g)
    return z, MEAN + SCALES * z, g


def selected(key: str) -> SelectedSAE:
    return SelectedSAE(key, "custom_sae", eval_sae())


def test_planted_vectors_are_found():
    z, x, g = gaussian(0)
    w = torch.randn(D, D, generator=g) / 3
    # linear in x, and of mean zero and not correlated with it: E[z (z² - 1)] = E[z³] = 0
    amplitudes = torch.linspace(0.2, 1, D)
    sae = selected("a")
    metrics = measured(x, {sae.key: x @ w + amplitudes * (z.pow(2) - 1)})

    covariance = torch.diag(SCALES.pow(2))
    products = covariance + torch.outer(MEAN, MEAN)
    linear, total = (w.T @ products @ w).trace(), covariance.trace()
    nonlinear = 2 * amplitudes.pow(2)  # Var[z²] = 2
    explained = (w.T @ covariance @ w).diagonal()
    expected = {
        "fvu": (linear + nonlinear.sum()) / total,
        "fvu_linear": linear / total,
        "fvu_nonlinear": nonlinear.sum() / total,
        "fvu_nonlinear_with_intercept": nonlinear.sum() / total,
        "fvu_in_sample": (linear + nonlinear.sum()) / total,
        "fvu_nonlinear_in_sample": nonlinear.sum() / total,
        "r_squared": (explained / (explained + nonlinear)).mean(),
        "r_squared_in_sample": (explained / (explained + nonlinear)).mean(),
        "r_squared_pooled": explained.sum() / (explained + nonlinear).sum(),
        "share_linear": linear / (linear + nonlinear.sum()),
        "share_nonlinear": nonlinear.sum() / (linear + nonlinear.sum()),
    }
    found = {
        **vars(metrics.reconstruction(sae)),
        **vars(metrics.linear_error(sae.key)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=0.01), name
    low, high = found["fvu_nonlinear_ci_low"], found["fvu_nonlinear_ci_high"]
    assert low <= float(expected["fvu_nonlinear"]) <= high


def directions(norms: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Errors of given norms, whose directions have nothing to do with activations."""
    of = torch.randn(N, D, generator=g)
    return norms[:, None] * of / of.norm(dim=1, keepdim=True)


def test_planted_norms_are_found():
    z, x, g = gaussian(1)
    token = torch.randint(0, 20, (N,), generator=g)
    l0 = torch.randint(0, 9, (N,), generator=g)
    loss = torch.randn(N, generator=g)
    by_token = torch.linspace(-0.3, 0.3, 20)
    parts = {
        "x": 0.3 * z[:, 0],
        "l0": 0.1 * l0.float(),
        "loss": 0.2 * loss,
        "token": by_token[token],
        "rest": 0.1 * torch.randn(N, generator=g),
    }
    sae = selected("a")
    norms = 5 + torch.stack([*parts.values()]).sum(dim=0)
    error = directions(norms, g)
    metrics = measured(x, {sae.key: error}, token=token, l0=l0, loss=loss)
    found = vars(metrics.norm_metrics(sae, [])[0])
    names = {"x": "error", **{of: f"error_from_{of}" for of in ("l0", "loss", "token")}}
    for part, name in names.items():
        both = torch.stack([norms, parts[part]])[:, N // 2 :]
        expected = float(torch.corrcoef(both)[0, 1].pow(2))
        assert found[f"r_squared_{name}"] == pytest.approx(expected, rel=0.01), name

    # A map fitted on n tokens costs d / n out of sample, and seems to gain it in sample.
    of_vector = vars(metrics.linear_error(sae.key))
    cost = 2 * D / (N / 2)
    for name in "r_squared", "r_squared_pooled":
        low, high = of_vector[f"{name}_ci_low"], of_vector[f"{name}_ci_high"]
        assert low - cost <= 0 <= high + cost
        assert low <= 0 <= of_vector[f"{name}_in_sample"] < cost
        assert abs(of_vector[name]) < cost


@pytest.mark.parametrize("intercept", [False, True])
def test_a_planted_squared_norm_is_found(intercept: bool):
    z, x, g = gaussian(2)
    v, constant, noise = torch.linspace(0.5, 1, D), 20.0, 1.0
    squared = constant + z @ v + noise * torch.randn(N, generator=g)
    sae = selected("a")
    metrics = measured(x, {sae.key: directions(squared.sqrt(), g)})
    variance = v.pow(2).sum() + noise**2
    cross = MEAN * constant + SCALES * v
    products = torch.diag(SCALES.pow(2)) + torch.outer(MEAN, MEAN)
    of_map = cross @ torch.linalg.solve(products, cross)
    left = noise**2 if intercept else variance + constant**2 - of_map
    _, details, _ = metrics.norm_metrics(sae, [])
    wanted = ("squared error norm", "activation", intercept)
    (found,) = (d for d in details if (d.target, d.predictor, d.intercept) == wanted)
    expected = float(1 - left / variance)
    assert found.r_squared == pytest.approx(expected, rel=0.01)
    assert found.r_squared_in_sample == pytest.approx(expected, rel=0.01)


def test_a_planted_scaling_is_found():
    z, x, g = gaussian(3)
    left = 1 + torch.rand(N, generator=g)
    linear = x @ (torch.eye(D) / 2)
    smaller = linear + directions(left, g)
    rest = 0.1 * torch.randn(N, generator=g)
    norms = 2 + 0.5 * smaller.norm(dim=1) + 0.4 * left + rest
    larger = directions(norms, g)
    a, b = selected("a"), selected("b")
    metrics = measured(x, {a.key: smaller, b.key: larger})
    _, _, (scaling,) = metrics.norm_metrics(b, [a])
    both = 1 - 0.01 / float(norms.var())
    one = float(torch.corrcoef(torch.stack([norms, smaller.norm(dim=1)]))[0, 1].pow(2))
    assert scaling.r_squared == pytest.approx(one, rel=0.01)
    assert scaling.r_squared_with_nonlinear == pytest.approx(both, rel=0.01)
    gain = (both - one) / (1 - one)
    assert scaling.explained_by_nonlinear == pytest.approx(gain, rel=0.01)
