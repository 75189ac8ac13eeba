"""The report of `saelens-scaffold compare`, viewed in a browser."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page

from chromium import Visit, visit
from saelens_scaffold.compare.report.page import log_axis, page, styles, write_page
from saelens_scaffold.compare.table import comparison_text, estimate, number, p_value

HOSTILE = "<script>window.hacked = true</script>\"'&amp;"
PAIRS = {
    "scaffold_batchtopk": "batchtopk",
    "scaffold_matryoshka": f"matryoshka {HOSTILE}",
}
METRICS: list[dict[str, Any]] = [
    {
        "id": "dense_latents.dense_latents.dense_latents",
        "evaluation": "dense_latents",
        "title": "dense",
        "digits": 0,
        "better": "lower",
        "random": None,
    },
    {
        "id": "core.reconstruction_quality.explained_variance_legacy",
        "evaluation": "core",
        "title": "expl. var.",
        "digits": 3,
        "better": "higher",
        "random": None,
    },
    {
        "id": "sparse_probing.sae.sae_top_1_test_accuracy",
        "evaluation": "sparse_probing",
        "title": "top-1 accuracy",
        "digits": 3,
        "better": "higher",
        "random": None,
    },
    {
        "id": "scaffold_ablation.geometry.overlap_with_pca",
        "evaluation": "scaffold_ablation",
        "title": f"overlap {HOSTILE}",
        "digits": 2,
        "better": None,
        "random": None,
    },
]
KS = (4, 12)
SEEDS = (0, 1, 2)
RANK = 8


def make_results() -> dict[str, Any]:
    """2 base architectures x {plain, scaffold} x 2 k x 3 seeds, with every section."""
    rng = np.random.default_rng(0)
    saes = [
        _sae(rng, architecture, k, seed)
        for architecture in [a for pair in PAIRS.items() for a in reversed(pair)]
        for k in KS
        for seed in SEEDS
    ]
    return {
        "title": f"Scaffold SAEs of py-neox {HOSTILE}",
        "summary": {
            "model_name": f"py-neox {HOSTILE}",
            "hook_name": "blocks.2.hook_resid_post",
            "training_tokens": 1_000_000,
            "seeds": list(SEEDS),
            "n_saes": len(saes),
        },
        "config": {
            "model_name": f"py-neox {HOSTILE}",
            "grid": {"k": list(KS), "scaffold_rank": [RANK], "seed": list(SEEDS)},
            "shared": {"d_sae": 2048, "lr": 1e-3, "note": "a: b # c"},
        },
        "provenance": {
            "command": f"saelens-scaffold compare 'config {HOSTILE}.yaml'",
            "versions": {"sae-lens": "6.54.12", "torch": "2.15.0"},
            "created": "2026-12-01T12:00:00+00:00",
            "hardware": "2 CPU cores",
            "evaluation_seeds": [0, 1],
            "training": [
                {
                    "wave": wave,
                    "saes": [sae["name"] for sae in saes[wave::2]],
                    "seconds": 812.4,
                    "hardware": "a GPU",
                    "versions": {"sae-lens": "6.54.12", "torch": f"2.15.{wave}"},
                }
                for wave in range(2)
            ],
        },
        "metrics": METRICS,
        "saes": saes,
        "curves": _curves(saes),
        "comparisons": _comparisons(saes),
        "reference": [
            {
                "what": "dense latents, BatchTopK",
                "value": "31 → 5 (−84 %)",
                "source": "arXiv 2606.14040, table 1",
                "definition": "latents that fire on more than 10 % of the tokens",
                "metric": "dense_latents.dense_latents.dense_latents",
                "our_definition": "Number of sparse latents that fire more often",
                "mark": "differs: a <b>small</b> model",
                "ours": [{"arm": f"scaffold_batchtopk {HOSTILE}", "shown": "7 → 0"}],
                "command": "saelens-scaffold eval dense_latents",
            },
            {
                "what": f"top-1 accuracy {HOSTILE}",
                "value": "+0.02",
                "source": "arXiv 2606.14040",
                "definition": "accuracy of a probe on one latent",
                "metric": None,
                "our_definition": "",
                "mark": "same definition",
                "ours": [],
                "command": "saelens-scaffold eval sparse_probing",
            },
        ],
    }


def _sae(
    rng: np.random.Generator, architecture: str, k: int, seed: int
) -> dict[str, Any]:
    rank = RANK if architecture in PAIRS else 0
    axes = {"k": k, "scaffold_rank": rank} if rank else {"k": k}
    arm = " ".join([architecture, *(f"{axis}={value}" for axis, value in axes.items())])
    values = {
        "dense_latents": float(rng.integers(0, 3) if rank else rng.integers(6, 9)),
        "core": 0.4 + 0.01 * k + 0.015 * rank + rng.normal(0, 0.004),
        "sparse_probing": 0.8 + 0.002 * k + rng.normal(0, 0.01),
        "scaffold_ablation": 0.97 + rng.normal(0, 0.003) if rank else None,
    }
    frequencies = rng.normal(-2.2, 0.7, 2040).clip(-5, -1.1 if rank else -0.05)
    counts, edges = np.histogram(frequencies, bins=50, range=(-5, 0))
    shares, share_edges = np.histogram(rng.beta(1, 12, 2040), bins=20, range=(0, 1))
    return {
        "name": f"{arm} seed={seed}",
        "path": f"saes/{architecture}-k{k}-seed{seed}",
        "architecture": architecture,
        "arm": arm,
        "axes": axes,
        "seed": seed,
        "scaffold_rank": rank,
        "l0_nominal": float(k + rank),
        "l0_total": k + rank + rng.normal(0, 0.1),
        "weights_sha256": rng.bytes(32).hex(),
        "metrics": {
            metric["id"]: {
                "value": (value := values[metric["evaluation"]]),
                "ci_low": None if value is None else value - 0.01,
                "ci_high": None if value is None else value + 0.02,
                "file": f"eval_results/{metric['evaluation']}/{arm}-{seed}.json",
            }
            for metric in METRICS
        },
        "evaluations": {
            "scaffold_ablation": {"cross_entropy": _cross_entropy(rng, rank)}
        },
        "firing_histogram": {"log10_edges": edges.tolist(), "counts": counts.tolist()},
        "scaffold": {
            "singular_values": sorted(rng.uniform(0.2, 1.4, rank).tolist())[::-1],
            "alignment_histogram": {
                "edges": share_edges.tolist(),
                "counts": shares.tolist(),
            },
        }
        if rank
        else None,
    }


def _cross_entropy(rng: np.random.Generator, rank: int) -> dict[str, float | None]:
    """As the evaluation's output has it, which knows less of plain SAEs."""
    ratios: dict[str, float | None] = {"ce_clean": 2.1, "ce_loss_score": 0.9}
    for name, ratio, needs_scaffold in (
        ("reconstruction", 1.2, False),
        ("pca_mean_ablated", 2.8, False),
        ("random_mean_ablated", 1.01, False),
        ("scaffold_mean_ablated", 7.5, True),
        ("scaffold_projected_out", 5.0, True),
        ("aligned_latents", 2.9, True),
    ):
        known = rank > 0 or not needs_scaffold
        value = ratio * rng.uniform(0.9, 1.1) if known else None
        ratios[f"ce_ratio_{name}"] = value
        if name not in ("reconstruction", "random_mean_ablated"):
            ratios[f"ce_ratio_{name}_ci_low"] = value and 0.95 * value
            ratios[f"ce_ratio_{name}_ci_high"] = value and 1.05 * value
    return ratios


def _curves(saes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    curves = []
    for metric in METRICS:
        for architecture in dict.fromkeys(sae["architecture"] for sae in saes):
            points = []
            for k in KS:
                runs = [
                    sae
                    for sae in saes
                    if sae["architecture"] == architecture and sae["axes"]["k"] == k
                ]
                values = [run["metrics"][metric["id"]]["value"] for run in runs]
                if None not in values:
                    points.append(
                        {
                            "axes": runs[0]["axes"],
                            "l0": float(np.mean([run["l0_total"] for run in runs])),
                            "mean": float(np.mean(values)),
                            "ci_low": min(values),
                            "ci_high": max(values),
                            "n_seeds": len(values),
                        }
                    )
            label = architecture
            if architecture in PAIRS:
                label += f" scaffold_rank={RANK}"
            curves.append(
                {
                    "architecture": architecture,
                    "label": label,
                    "metric": metric["id"],
                    "points": points,
                }
            )
    return curves


def _comparisons(saes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    comparisons = []
    for matching in ("k", "l0_total"):
        for treatment, baseline in PAIRS.items():
            for k in KS:
                for metric in METRICS:
                    comparisons.append(
                        _comparison(saes, matching, treatment, baseline, k, metric)
                    )
    return comparisons


def _comparison(
    saes: list[dict[str, Any]],
    matching: str,
    treatment: str,
    baseline: str,
    k: int,
    metric: dict[str, Any],
) -> dict[str, Any]:
    runs = {
        architecture: [
            sae
            for sae in saes
            if sae["architecture"] == architecture and sae["axes"]["k"] == k
        ]
        for architecture in (treatment, baseline)
    }
    values = {
        architecture: [sae["metrics"][metric["id"]]["value"] for sae in of]
        for architecture, of in runs.items()
    }
    missing = any(None in of for of in values.values())
    differences = (
        [] if missing else list(np.subtract(values[treatment], values[baseline]))
    )
    low, high = (min(differences), max(differences)) if differences else (None, None)
    if low is None or high is None:
        verdict = "not measured"
    elif low <= 0 <= high:
        verdict = "not distinguishable"
    else:
        verdict = "higher" if low > 0 else "lower"
    sides = {
        name: {
            "architecture": architecture,
            "arm": runs[architecture][0]["arm"],
            "axes": runs[architecture][0]["axes"],
        }
        for name, architecture in (("treatment", treatment), ("baseline", baseline))
    }
    l0s = [sae["l0_total"] for sae in runs[treatment]]
    sides["treatment"]["l0_total"] = float(np.mean(l0s))
    ends = (k, 2 * k) if matching == "l0_total" else (k,)
    sides["baseline"]["measured"] = [
        {"arm": f"{baseline} k={end}", "k": end, "l0_total": end + 0.1} for end in ends
    ]
    is_open = verdict == "not distinguishable"
    return {
        "matching": matching,
        **sides,
        "interpolated": matching == "l0_total",
        "metric": metric["id"],
        "treatment_mean": None if missing else float(np.mean(values[treatment])),
        "baseline_mean": None if missing else float(np.mean(values[baseline])),
        "n_treatment": 0 if missing else len(SEEDS),
        "n_baseline": 0 if missing else len(SEEDS),
        "differences": {
            str(seed): difference
            for seed, difference in zip(SEEDS, differences, strict=False)
        },
        "mean": None if missing else float(np.mean(differences)),
        "ci_low": low,
        "ci_high": high,
        "confidence": 0.95,
        "method": "" if missing else "Welch's t",
        "p_value": None if missing else 0.4 if is_open else 0.004,
        "p_holm": None if missing else 0.8 if is_open else 0.048,
        "detectable": None if missing else 0.25,
        "verdict": verdict,
        "note": "the baseline has no scaffold" if missing else "",
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture(scope="module")
def file(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(results, path)
    return path


@pytest.fixture(scope="module")
def desktop(browser: Browser, file: Path) -> Visit:
    return visit(browser, file, viewport={"width": 1280, "height": 900})


@pytest.fixture(scope="module")
def phone(browser: Browser, file: Path) -> Visit:
    return visit(
        browser,
        file,
        viewport={"width": 390, "height": 844},
        device_scale_factor=2,
        is_mobile=True,
        has_touch=True,
    )


def headings(page: Page) -> list[str]:
    return page.locator("h2").all_text_contents()


def test_page_loads_without_network_or_complaint(desktop: Visit, file: Path):
    assert desktop.requests == [file.as_uri()]
    assert desktop.complaints == []
    assert headings(desktop.page) == [
        "Verdicts",
        "Beside the paper’s figures",
        "Metrics against L0",
        "Firing frequencies",
        "Scaffold ablation",
        "Scaffold spectrum",
        "Alignment with the scaffold",
        "Every number",
        "Provenance",
    ]


def test_names_are_shown_and_never_run(desktop: Visit, results: dict[str, Any]):
    page = desktop.page
    assert page.evaluate("window.hacked") is None
    assert page.title() == results["title"]
    assert page.locator("h1").inner_text() == results["title"]
    shown = page.locator("body").inner_text()
    assert results["summary"]["model_name"] in shown
    assert results["provenance"]["command"] in shown
    assert "<wbr>" not in shown
    # plotly reads some HTML in what it writes beside a point
    series = list(plotted(page, "curves-1"))
    point = {"curveNumber": series.index(f"matryoshka {HOSTILE}"), "pointNumber": 0}
    page.evaluate("point => Plotly.Fx.hover('curves-1', [point])", point)
    page.wait_for_selector("#curves-1 .hoverlayer text.name")
    name = page.locator("#curves-1 .hoverlayer text.name").text_content()
    assert name == f"matryoshka {HOSTILE}"


def test_content_security_policy_forbids_network_and_further_scripts(desktop: Visit):
    forbidden = desktop.page.evaluate(
        """async () => {
            const found = [];
            const listen = (event) => found.push(event.effectiveDirective);
            document.addEventListener("securitypolicyviolation", listen);
            await fetch("https://example.org/").catch(() => {});
            const image = document.createElement("img");
            image.src = "https://example.org/image.png";
            const script = document.createElement("script");
            script.text = "window.hacked = true";
            document.body.append(image, script);
            await new Promise((resolve) => setTimeout(resolve, 100));
            image.remove();
            script.remove();
            document.removeEventListener("securitypolicyviolation", listen);
            return found;
        }"""
    )
    assert sorted(forbidden) == ["connect-src", "img-src", "script-src-elem"]
    assert desktop.page.evaluate("window.hacked") is None
    desktop.complaints.clear()


def test_every_plot_is_drawn(desktop: Visit, results: dict[str, Any]):
    drawn = desktop.page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [
            plot.id,
            plot.querySelectorAll(".main-svg .scatterlayer .trace, .main-svg .barlayer .trace")
                .length,
        ]))"""
    )
    n_plain = n_scaffold = len(PAIRS)
    by_k = {
        f"{section}-{i}": n
        for section, n in (
            ("firing", n_plain + n_scaffold),
            ("ablation", n_plain + n_scaffold),
            ("spectrum", n_scaffold),
            ("alignment", n_scaffold),
        )
        for i, _ in enumerate(KS, start=1)
    }
    # plain SAEs have no overlap with PCA
    curves = {"curves-1": 4, "curves-2": 4, "curves-3": 4, "curves-4": n_scaffold}
    assert drawn == curves | by_k


def plotted(page: Page, plot: str) -> dict[str, dict[str, Any]]:
    """plotly's traces, by series."""
    traces = page.evaluate("id => document.getElementById(id).data", plot)
    return {trace["legendgroup"]: trace for trace in traces}


def test_curves_are_the_means_and_intervals(desktop: Visit, results: dict[str, Any]):
    for i, metric in enumerate(METRICS, start=1):
        traces = plotted(desktop.page, f"curves-{i}")
        for curve in results["curves"]:
            if curve["metric"] != metric["id"] or not curve["points"]:
                continue
            trace, points = traces[curve["label"]], curve["points"]
            assert trace["x"] == [point["l0"] for point in points]
            assert trace["y"] == [point["mean"] for point in points]
            up, down = trace["error_y"]["array"], trace["error_y"]["arrayminus"]
            ends = [(p["ci_low"], p["ci_high"]) for p in points]
            assert np.allclose(np.subtract(trace["y"], down), [low for low, _ in ends])
            assert np.allclose(np.add(trace["y"], up), [high for _, high in ends])


def test_firing_curves_count_the_dense_latents(desktop: Visit, results: dict[str, Any]):
    for i, k in enumerate(KS, start=1):
        traces = plotted(desktop.page, f"firing-{i}")
        for architecture in PAIRS.values():
            dense = np.mean(
                [
                    sum(
                        count
                        for edge, count in zip(
                            sae["firing_histogram"]["log10_edges"],
                            sae["firing_histogram"]["counts"],
                            strict=False,
                        )
                        if edge > -1.05
                    )
                    for sae in results["saes"]
                    if sae["architecture"] == architecture and sae["axes"]["k"] == k
                ]
            )
            trace = traces[architecture]
            at_threshold = int(np.argmin(np.abs(np.log10(trace["x"]) + 1)))
            assert trace["x"][at_threshold] == pytest.approx(0.1)
            assert trace["y"][at_threshold] == pytest.approx(dense)


def test_ablation_bars_reach_from_one_to_the_mean(
    desktop: Visit, results: dict[str, Any]
):
    trace = plotted(desktop.page, "ablation-1")[
        f"scaffold_batchtopk scaffold_rank={RANK}"
    ]
    ratios = [
        sae["evaluations"]["scaffold_ablation"]["cross_entropy"]
        for sae in results["saes"]
        if sae["architecture"] == "scaffold_batchtopk" and sae["axes"]["k"] == KS[0]
    ]
    bar = trace["y"].index("scaffold<br>mean<br>ablated")
    mean = np.mean([ratio["ce_ratio_scaffold_mean_ablated"] for ratio in ratios])
    highest = max(ratio["ce_ratio_scaffold_mean_ablated_ci_high"] for ratio in ratios)
    assert trace["base"][bar] + trace["x"][bar] == pytest.approx(mean)
    assert mean + trace["error_x"]["array"][bar] == pytest.approx(highest)
    # whose scaffold could not be removed, there being none
    plain = plotted(desktop.page, "ablation-1")["batchtopk"]
    assert "scaffold<br>mean<br>ablated" not in plain["y"]


def test_series_look_the_same_in_every_plot(desktop: Visit):
    looks: dict[str, set[tuple[str, str]]] = {}
    for plot in ("curves-1", "curves-4", "firing-1", "spectrum-2", "alignment-1"):
        for series, trace in plotted(desktop.page, plot).items():
            line = trace["line"]
            looks.setdefault(series, set()).add((line["color"], line["dash"]))
    assert all(len(look) == 1 for look in looks.values())
    for scaffold, plain in PAIRS.items():
        [(colour, dash)] = looks[f"{scaffold} scaffold_rank={RANK}"]
        assert dash == "solid"
        assert looks[plain] == {(colour, "dash")}
    assert len({colour for look in looks.values() for colour, _ in look}) == len(PAIRS)


def test_every_number_is_the_input(desktop: Visit, results: dict[str, Any]):
    rows = desktop.page.evaluate(
        """() => [...document.querySelectorAll("#all-saes tbody tr")].map((row) => ({
            name: row.cells[0].textContent,
            cells: [...row.querySelectorAll("td[data-metric]")].map((cell) => ({
                metric: cell.dataset.metric,
                value: Number(cell.dataset.value),
                text: cell.textContent,
                file: cell.title,
            })),
        }))"""
    )
    assert [row["name"] for row in rows] == [sae["name"] for sae in results["saes"]]
    digits = {metric["id"]: metric["digits"] for metric in METRICS}
    for row, sae in zip(rows, results["saes"], strict=True):
        known = {
            metric: found
            for metric, found in sae["metrics"].items()
            if found["value"] is not None
        }
        assert {cell["metric"] for cell in row["cells"]} == set(known)
        for cell in row["cells"]:
            found, n = known[cell["metric"]], digits[cell["metric"]]
            assert cell["value"] == found["value"]
            assert cell["file"] == found["file"]
            shown = re.findall(r"−?[\d.]+", cell["text"])
            expected = [found["value"], found["ci_low"], found["ci_high"]]
            assert [float(number.replace("−", "-")) for number in shown] == [
                pytest.approx(value, abs=0.5001 * 10**-n) for value in expected
            ]


def test_verdicts_say_which_and_whether_it_is_better(
    desktop: Visit, results: dict[str, Any]
):
    better = {metric["id"]: metric["better"] for metric in METRICS}
    legends = desktop.page.locator("#verdicts p.quiet").all_text_contents()
    for matching, legend in zip(("k", "l0_total"), legends, strict=True):
        cells = desktop.page.evaluate(
            """matching => [...document.querySelectorAll(
                `table[data-matching="${matching}"] tbody td`
            )].map((cell) => [
                cell.dataset.metric,
                cell.firstChild.textContent,
                cell.querySelector(".verdict").textContent,
                cell.querySelector("small")?.textContent,
                [...cell.classList].find((name) => ["better", "worse"].includes(name)),
            ])""",
            matching,
        )
        comparisons = [c for c in results["comparisons"] if c["matching"] == matching]
        assert len(cells) == len(comparisons)
        told_apart = sum(c["verdict"] in ("higher", "lower") for c in comparisons)
        judged = sum(c["method"] != "" for c in comparisons)
        assert 0 < told_apart < judged < len(comparisons)
        assert f"{told_apart} of {judged} differences" in legend
        assert f"{told_apart} of {judged} are after Holm's correction" in legend
        assert "the 95% interval of the difference of means (Welch's t)" in legend
        assert ("both ends of the bracket" in legend) == (matching == "l0_total")
        for cell, comparison in zip(cells, comparisons, strict=True):
            metric, difference, verdict, detectable, judged = cell
            assert metric == comparison["metric"]
            assert verdict == comparison["verdict"]
            is_open = verdict == "not distinguishable"
            assert (detectable is not None) == is_open
            if comparison["mean"] is None:
                assert difference == "-"
            else:
                shown = float(difference.split()[0].replace("−", "-"))
                assert shown == pytest.approx(comparison["mean"], abs=0.0501)
            expected = None
            if comparison["verdict"] in ("higher", "lower") and better[metric]:
                is_better = comparison["verdict"] == better[metric]
                expected = "better" if is_better else "worse"
            assert judged == expected


def test_provenance_is_complete(desktop: Visit, results: dict[str, Any]):
    section = desktop.page.locator("#provenance")
    config = yaml.safe_load(section.locator("pre").last.inner_text())
    assert config == results["config"]
    text = section.text_content() or ""
    for sae in results["saes"]:
        assert sae["weights_sha256"][:12] in text
        assert sae["path"] in text
    for wave in results["provenance"]["training"]:
        assert ", ".join(wave["saes"]) in text
    # the second wave's differ from those of the whole
    assert "torch 2.15.1" in text


def test_legend_hides_a_series_in_every_plot(desktop: Visit):
    page = desktop.page
    name = f"scaffold_batchtopk scaffold_rank={RANK}"
    entry = page.locator(f"#curves button[data-series='{name}']")

    def visible() -> set[Any]:
        plots = page.locator(".plot").evaluate_all("plots => plots.map((p) => p.id)")
        return {plotted(page, plot)[name].get("visible", True) for plot in plots}

    entry.click()
    assert visible() == {False}
    pressed = page.locator(f"button[data-series='{name}'][aria-pressed='false']")
    assert pressed.count() == 5  # the legend of each section
    entry.click()
    assert visible() == {True}


def test_table_sorts_by_a_column(desktop: Visit, results: dict[str, Any]):
    page = desktop.page
    overlap = page.locator("#all-saes thead th").last
    column = "rows => rows.map((row) => row.cells[row.cells.length - 1].dataset.value)"
    for ascending in (True, False):
        overlap.click()
        shown = page.locator("#all-saes tbody tr").evaluate_all(column)
        known = [float(value) for value in shown if value is not None]
        assert known == sorted(known, reverse=not ascending)
        # plain SAEs, which have none, come last either way
        assert shown[len(known) :] == [None] * (len(results["saes"]) - len(known))
    name = page.locator("#all-saes thead th").first
    name.click()
    names = page.locator("#all-saes tbody th").all_text_contents()
    assert names.index("batchtopk k=4 seed=0") < names.index("batchtopk k=12 seed=0")


def test_phone_reads_without_sideways_scrolling(phone: Visit):
    page = phone.page
    assert phone.complaints == []
    page.locator("details").evaluate_all("all => all.forEach((one) => one.open = true)")
    width, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner == 390
    plots = page.locator(".plot").evaluate_all(
        """plots => plots.map((plot) => {
            const svg = plot.querySelector(".main-svg").getBoundingClientRect();
            return [svg.left, svg.right];
        })"""
    )
    assert all(left >= 0 and right <= inner for left, right in plots)
    assert all(right - left > 0.85 * inner for left, right in plots)
    small = page.evaluate(
        """() => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            const found = [];
            for (let node; (node = walker.nextNode()); ) {
                const parent = node.parentElement;
                if (!node.data.trim() || parent.closest("script, style")) continue;
                const size = parseFloat(getComputedStyle(parent).fontSize);
                if (size < 14) found.push([node.data, size]);
            }
            return found;
        }"""
    )
    assert small == []
    # labels of the axes within the plot that they belong to
    cut = page.locator(".plot").evaluate_all(
        """plots => plots.flatMap((plot) => {
            const box = plot.getBoundingClientRect();
            return [...plot.querySelectorAll(".main-svg text")]
                .filter((text) => text.textContent)
                .filter((text) => {
                    const { left, right } = text.getBoundingClientRect();
                    return left < box.left - 1 || right > box.right + 1;
                })
                .map((text) => `${plot.id}: ${text.textContent}`);
        })"""
    )
    assert cut == []


def test_plots_follow_the_width_of_the_window(desktop: Visit):
    page = desktop.page
    page.set_viewport_size({"width": 500, "height": 900})
    page.wait_for_function(
        """() => [...document.querySelectorAll(".plot")].every(
            (plot) => plot.querySelector(".main-svg").getBoundingClientRect().right <= 500
        )"""
    )
    page.set_viewport_size({"width": 1280, "height": 900})


def test_dark_pages_are_dark_with_light_text(phone: Visit):
    page = phone.page
    brightness = """element => {
        const style = getComputedStyle(element);
        const value = (colour) => Math.max(...colour.match(/[\\d.]+/g).slice(0, 3));
        return [value(style.backgroundColor), value(style.color), value(style.fill)];
    }"""
    page.emulate_media(color_scheme="dark")
    background, text, _ = page.locator("body").evaluate(brightness)
    assert background < 50
    assert text > 200
    for label in (".xtick text", ".ytick text", ".xtitle"):
        _, _, fill = page.locator(f".plot {label}").first.evaluate(brightness)
        assert fill > 200


def test_published_figures_stand_with_both_definitions(results: dict[str, Any]):
    html = page(results)
    section = html[html.index('<section id="reference">') :]
    first, second = section.split("<tr>")[2:4]
    for text in (
        "latents that fire on more than 10 % of the tokens",
        "Number of sparse latents that fire more often",
        "differs: a &lt;b&gt;small&lt;/b&gt; model",
        "7 → 0",
    ):
        assert text in first
    assert "same definition" in second
    assert "not measured" in second
    assert "<script>window" not in section


def test_what_was_not_measured_is_left_out(browser: Browser, tmp_path: Path):
    results = make_results()
    results.update(comparisons=[], curves=[], reference=[])
    for sae in results["saes"]:
        sae.update(evaluations={}, firing_histogram=None, scaffold=None)
        sae["metrics"] = {
            metric: found
            for metric, found in sae["metrics"].items()
            if metric.startswith("core.")
        }
    write_page(results, tmp_path / "bare.html")
    bare = visit(browser, tmp_path / "bare.html")
    assert bare.complaints == []
    assert headings(bare.page) == ["Every number", "Provenance"]
    heads = bare.page.locator("#all-saes thead th").all_text_contents()
    assert heads[-2:] == ["l0_total", "coreexpl. var."]


def test_one_seed_and_one_k_make_a_page(browser: Browser, tmp_path: Path):
    results = make_results()
    k = KS[0]
    results["summary"]["seeds"] = [0]
    results["saes"] = [
        sae for sae in results["saes"] if sae["seed"] == 0 and sae["axes"]["k"] == k
    ]
    for curve in results["curves"]:
        curve["points"] = [
            point | {"ci_low": None, "ci_high": None, "n_seeds": 1}
            for point in curve["points"]
            if point["axes"]["k"] == k
        ]
    results["comparisons"] = [
        comparison
        | {"ci_low": None, "ci_high": None, "verdict": "one seed", "confidence": 0.95}
        for comparison in results["comparisons"]
        if comparison["treatment"]["axes"]["k"] == k
    ]
    write_page(results, tmp_path / "one.html")
    one = visit(browser, tmp_path / "one.html")
    assert one.complaints == []
    verdicts = one.page.locator("table[data-matching='k'] .verdict").all_text_contents()
    assert set(verdicts) == {"one seed"}
    assert one.page.locator(".better, .worse").count() == 0
    # a single point needs an axis with ticks as well
    ticks = one.page.locator("#curves-4 .xtick text").all_text_contents()
    assert len(ticks) >= 2


def test_rank_zero_of_a_scaffold_architecture_is_plain():
    results = make_results()
    results["comparisons"] = []
    for sae in results["saes"]:
        if sae["architecture"] == "batchtopk":
            sae["architecture"] = "scaffold_batchtopk"
            sae["axes"]["scaffold_rank"] = 0
    looks = styles(results)
    plain = looks["scaffold_batchtopk scaffold_rank=0"]
    scaffold = looks[f"scaffold_batchtopk scaffold_rank={RANK}"]
    assert plain["is_plain"] and not scaffold["is_plain"]
    assert plain["colour"] == scaffold["colour"]


def test_ranks_of_one_architecture_differ_in_their_symbols():
    results = make_results()
    for sae in copy.deepcopy(results["saes"]):
        if sae["scaffold_rank"]:
            sae["scaffold_rank"] = sae["axes"]["scaffold_rank"] = 24
            results["saes"].append(sae)
    looks = styles(results)
    assert len(looks) == 6
    assert len({tuple(look.values()) for look in looks.values()}) == 6
    small, large = (looks[f"scaffold_batchtopk scaffold_rank={r}"] for r in (RANK, 24))
    assert small["colour"] == large["colour"]
    assert small["symbol"] != large["symbol"]


def test_numbers_of_terminal_and_page():
    assert number(None, 2) == "-"
    assert (number(-1234.56, 1), number(0.5, 2, "+")) == ("-1,234.6", "+0.50")
    interval = {"mean": 0.5, "ci_low": -0.25, "ci_high": 1.25}
    assert estimate(interval, "mean", 2, "+") == "+0.50 [-0.25, +1.25]"
    assert estimate({**interval, "ci_low": None}, "mean", 2) == "0.50"
    shown = [p_value(p) for p in (None, 0.0004, 0.001, 0.25)]
    assert shown == ["", "<0.001", "0.001", "0.250"]


@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=20))
def test_logarithmic_axes_hold_their_values(values: list[float]):
    low, high = log_axis(values)["range"]
    assert low < math.log10(min(values)) and math.log10(max(values)) < high


def test_page_is_one_file_that_a_failure_leaves_alone(
    results: dict[str, Any], tmp_path: Path
):
    path = tmp_path / "report.html"
    write_page(results, path)
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_page({"title": "no more than that"}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    html = page(results)
    assert html.count("plotly.js v") == 1
    # the results are JSON, and so is what the page is made of
    assert page(json.loads(json.dumps(results))) == html


def test_hook_points_that_differ_are_not_said(results: dict[str, Any]) -> None:
    summary = {**results["summary"], "hook_name": None}
    said = " ".join(page({**results, "summary": summary}).split())
    assert "</b>, trained on the same" in said


def test_metrics_of_no_evaluation_and_missing_seeds(results: dict[str, Any]) -> None:
    metrics = [{**metric, "evaluation": None} for metric in results["metrics"]]
    few = [
        {**comparison, "n_treatment": 1, "n_baseline": 2, "verdict": "one seed"}
        for comparison in results["comparisons"]
    ]
    html = page({**results, "metrics": metrics, "comparisons": few})
    assert "None" not in html.partition('id="provenance"')[0]
    assert "one seed (1 against 2 seeds)" in html


def test_brackets_and_refusals_are_shown(results: dict[str, Any]) -> None:
    html = page(results)
    for k in KS:
        between = f"between k={k} (l0_total {k}.1) and k={2 * k} (l0_total {2 * k}.1)"
        assert between in html.replace("<wbr>", "")
    refused = {
        "verdict": "bracket too wide",
        "note": "train batchtopk with k=12",
        **dict.fromkeys(
            ("mean", "ci_low", "ci_high", "treatment_mean", "baseline_mean")
        ),
        **dict.fromkeys(("p_value", "p_holm", "detectable")),
        "method": "",
        "differences": {},
        "n_treatment": 0,
        "n_baseline": 0,
    }
    comparisons = [
        comparison | (refused if comparison["interpolated"] else {})
        for comparison in results["comparisons"]
    ]
    html = page({**results, "comparisons": comparisons})
    verdict = '-<span class="verdict">bracket too wide</span></td>'
    assert html.count(verdict) == len(comparisons) // 2
    assert "<td>train batchtopk with k=12</td>" in html


def test_metrics_of_one_side_are_shown_with_their_value_at_random(
    results: dict[str, Any],
) -> None:
    overlap = METRICS[-1]
    random = {**overlap, "id": "scaffold_ablation.geometry.overlap_of_random"}
    curves = [curve for curve in results["curves"] if curve["metric"] == overlap["id"]]
    at_random = [
        {
            **curve,
            "metric": random["id"],
            "points": [
                {**point, "mean": 0.031, "ci_low": 0.03, "ci_high": 0.032}
                for point in curve["points"]
            ],
        }
        for curve in curves
    ]
    alone = {
        **results,
        "metrics": [
            *METRICS[:-1],
            {**overlap, "title": "overlap", "random": random["id"]},
            {**random, "title": "overlap of random"},
        ],
        "curves": [*results["curves"], *at_random],
        "comparisons": [
            comparison
            for comparison in results["comparisons"]
            if comparison["metric"] != overlap["id"]
        ],
    }
    (point, *_) = next(c for c in curves if c["points"])["points"]
    arm = f"scaffold_batchtopk k={KS[0]} scaffold_rank={RANK}"
    mean = f"{point['mean']:.2f} [{point['ci_low']:.2f}, {point['ci_high']:.2f}]"
    cells = (arm, "scaffold_ablation: overlap", mean, "0.03 [0.03, 0.03]")
    printed = comparison_text(alone)
    assert re.search(r" +\| +".join(map(re.escape, cells)), printed)
    # one row for each kind of scaffold SAEs, and none for plain ones or the random one
    section = page(alone).partition('id="one-sided"')[2].partition("</section>")[0]
    assert section.count('<th scope="row">') == len(PAIRS) * len(KS)
    assert all(cell in section for cell in cells[1:])
    assert "overlap of random" not in section
    assert 'id="one-sided"' not in page(results)


def test_tokens_that_differ_are_not_said(results: dict[str, Any]) -> None:
    def said(tokens: int | None) -> str:
        summary = {**results["summary"], "training_tokens": tokens}
        return " ".join(page({**results, "summary": summary}).split())

    assert "trained on the same 40,960 tokens:" in said(40_960)
    assert "trained on the same tokens:" in said(None)
