"""The report of `saelens-scaffold compare`, looked at in a browser."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from chromium import launch
from playwright.sync_api import Browser, Page, sync_playwright

from saelens_scaffold.compare.page import page, write_page

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
    },
    {
        "id": "core.reconstruction_quality.explained_variance_legacy",
        "evaluation": "core",
        "title": "expl. var.",
        "digits": 3,
        "better": "higher",
    },
    {
        "id": "sparse_probing.sae.sae_top_1_test_accuracy",
        "evaluation": "sparse_probing",
        "title": "top-1 accuracy",
        "digits": 3,
        "better": "higher",
    },
    {
        "id": "scaffold_ablation.geometry.overlap_with_pca",
        "evaluation": "scaffold_ablation",
        "title": f"overlap {HOSTILE}",
        "digits": 2,
        "better": None,
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
                "ours": "7 → 0",
                "command": "saelens-scaffold eval dense_latents",
            },
            {
                "what": f"top-1 accuracy {HOSTILE}",
                "value": "+0.02",
                "source": "arXiv 2606.14040",
                "ours": None,
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
        ("pca_projected_out", 2.8, False),
        ("random_projected_out", 1.01, False),
        ("scaffold_subtracted", 7.5, True),
        ("scaffold_projected_out", 5.0, True),
        ("aligned_latents", 2.9, True),
    ):
        known = rank > 0 or not needs_scaffold
        value = ratio * rng.uniform(0.9, 1.1) if known else None
        ratios[f"ce_ratio_{name}"] = value
        if name not in ("reconstruction", "random_projected_out"):
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
    return {
        "matching": matching,
        **sides,
        "interpolated": matching == "l0_total",
        "metric": metric["id"],
        "treatment_mean": None if missing else float(np.mean(values[treatment])),
        "baseline_mean": None if missing else float(np.mean(values[baseline])),
        "differences": {
            str(seed): difference
            for seed, difference in zip(SEEDS, differences, strict=False)
        },
        "mean": None if missing else float(np.mean(differences)),
        "ci_low": low,
        "ci_high": high,
        "confidence": 0.95,
        "method": "paired bootstrap over seeds",
        "verdict": verdict,
        "note": "the baseline has no scaffold" if missing else "",
    }
