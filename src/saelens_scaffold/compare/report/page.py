"""The report of a comparison: one HTML page that needs no network."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from saelens_scaffold._util.files import new_file
from saelens_scaffold.compare.metrics import metric_name
from saelens_scaffold.compare.report import figures
from saelens_scaffold.compare.report.figures import Plot, Results
from saelens_scaffold.compare.report.series import Style, styles
from saelens_scaffold.compare.wording import (
    at_l0,
    baseline_text,
    confidence_text,
    legend,
    one_sided,
    verdict_text,
)

# What matching means, for the headings of the tables.
MATCHINGS = {
    "k": (
        "At the same k",
        "As many sparse latents fire for each token in both, and the scaffold comes on top.",
    ),
    "l0_total": (
        "At the same l0_total",
        "The scaffold's rank is paid for out of k: as many latents fire for each token in "
        "both, those of the scaffold included.",
    ),
}

# Of the legend: plotly's symbols, about 10 pixels wide around the origin.
SYMBOL_PATHS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "diamond": "M0-5.5 5.5 0 0 5.5-5.5 0z",
    "triangle-up": "M0-5 5 4h-10z",
    "triangle-down": "M0 5 5-4h-10z",
    "star": "M0-6 1.5-2 6-2 2.3.8 3.7 5 0 2.4-3.7 5-2.3.8-6-2-1.5-2z",
}


class PlotSection(NamedTuple):
    """Plots under a heading, with what they show and the series that they show it of."""

    id: str
    title: str
    text: str
    plots: Sequence[Plot]
    series: Mapping[str, Style]


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """
    Write the report of a comparison.

    Args:
        results: The comparison's results, as in its results.json.
        path: Of the HTML file; what is there already is replaced once the new one is whole.
    """
    with new_file(path) as temporary:
        temporary.write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """
    The report of a comparison as one HTML page, its plots and plotly.js included.

    The page's content security policy forbids any network access, and any script but the
    two that are part of it, whatever the names in the results hold.

    Args:
        results: The comparison's results, as in its results.json. What they have no data
            for is left out.
    """
    plots = _plot_sections(results)
    verdicts = _verdict_tables(results)
    alone = one_sided(results)
    contents = [
        *([("verdicts", "Verdicts")] if verdicts else []),
        *([("one-sided", "One side only")] if alone else []),
        *([("reference", "The paper’s figures")] if results["reference"] else []),
        *((section.id, section.title) for section in plots),
        ("numbers", "Every number"),
        ("provenance", "Provenance"),
    ]
    script = (
        resources.files("saelens_scaffold.compare.report")
        .joinpath("page.js")
        .read_text("utf-8")
    )
    return (
        _environment()
        .get_template("page.html")
        .render(
            results=results,
            summary=results["summary"],
            seeds=_seeds(results),
            series=styles(results),
            contents=contents,
            verdicts=verdicts,
            one_sided=alone,
            metrics=_measured_metrics(results),
            plot_sections=plots,
            symbols=SYMBOL_PATHS,
            figures={
                f"{section.id}-{i}": plot.figure.to_plotly_json()
                for section in plots
                for i, plot in enumerate(section.plots, start=1)
            },
            scripts=[get_plotlyjs(), script],
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("saelens_scaffold", "compare/report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        sha256=_csp_hash,
        number=_number,
        estimate=_estimate,
        yaml=_yaml,
        breakable=_breakable,
    )
    return environment


def _csp_hash(script: str) -> str:
    """How a content security policy names a script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _breakable(name: str) -> Markup:
    """An arm's name, for narrow columns: `axis=value` stays whole as long as it fits."""
    words = (
        escape(word) if "=" in word else escape(word).replace("_", Markup("_<wbr>"))
        for word in name.split(" ")
    )
    return Markup(" ").join(words)


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _seeds(results: Results) -> str:
    seeds = results["summary"]["seeds"]
    return f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"


def _measured_metrics(results: Results) -> list[Mapping[str, Any]]:
    """The metrics that any SAE has a value for."""
    return [
        metric
        for metric in results["metrics"]
        if any(
            sae["metrics"].get(metric["id"], {}).get("value") is not None
            for sae in results["saes"]
        )
    ]


def _plot_sections(results: Results) -> list[PlotSection]:
    looks = styles(results)
    over_seeds, whiskers = "one seed", ""
    if len(results["summary"]["seeds"]) > 1:
        over_seeds = f"mean over {_seeds(results)}"
        confidence = confidence_text(results["comparisons"])
        whiskers = f"; whiskers: {confidence or 'the'} intervals over seeds"
    line = "Plain SAEs are dashed and hollow, scaffold SAEs solid."
    wanted: list[tuple[str, str, str, Callable[[Results], list[Plot]]]] = [
        (
            "curves",
            "Metrics against L0",
            "Each metric against the measured number of latents that fire for each token, "
            f"the scaffold's included ({over_seeds}{whiskers}). A line joins the values of k. {line}",
            figures.metric_curves,
        ),
        (
            "firing",
            "Firing frequencies",
            "How many sparse latents (y) fire on more than a share x of the tokens "
            f"({over_seeds}). Latents right of the dotted line, at "
            f"{figures.DENSE_THRESHOLD:.0%}, are called dense. {line}",
            figures.firing_frequencies,
        ),
        (
            "ablation",
            "Scaffold ablation",
            "Cross-entropy of the language model with each intervention at the hook point, "
            f"as a multiple of the clean one ({over_seeds}; whiskers: from the lowest to the "
            "highest seed, each with its interval over sequences where there is one). 1 "
            "is a language model that does not notice. Plain SAEs are hollow, scaffold "
            "SAEs filled; bars stand in the order of the legend.",
            figures.ablation_ratios,
        ),
        (
            "spectrum",
            "Scaffold spectrum",
            f"Singular values of the scaffold's linear map A B ({over_seeds}): how strongly "
            "it passes on each direction of its subspace.",
            figures.scaffold_spectra,
        ),
        (
            "alignment",
            "Alignment with the scaffold",
            "How many sparse latents (y) have more than a share x of their decoder "
            f"direction's squared length inside the scaffold's span ({over_seeds}).",
            figures.alignments,
        ),
    ]
    sections: list[PlotSection] = []
    for id_, title, text, draw in wanted:
        plots = draw(results)
        drawn = {trace["legendgroup"] for plot in plots for trace in plot.traces}
        shown = {series: look for series, look in looks.items() if series in drawn}
        if plots:
            sections.append(PlotSection(id_, title, text, plots, shown))
    return sections


def _verdict_tables(results: Results) -> list[dict[str, Any]]:
    """A table for each way of matching: pairs of arms as rows, metrics as columns."""
    by_matching: dict[str, list[Mapping[str, Any]]] = {}
    for comparison in results["comparisons"]:
        by_matching.setdefault(comparison["matching"], []).append(comparison)
    tables: list[dict[str, Any]] = []
    for matching, comparisons in by_matching.items():
        compared = {comparison["metric"] for comparison in comparisons}
        metrics = [metric for metric in results["metrics"] if metric["id"] in compared]
        cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for comparison in comparisons:
            pair = _names(comparison)
            metric = next(m for m in metrics if m["id"] == comparison["metric"])
            cells.setdefault(pair, {})[metric["id"]] = _cell(
                comparison, metric, len(results["summary"]["seeds"])
            )
        title, text = MATCHINGS.get(matching, (f"At the same {matching}", ""))
        tables.append(
            {
                "matching": matching,
                "title": title,
                "text": text,
                "legend": legend(comparisons),
                "metrics": metrics,
                "rows": [
                    (pair, [by_metric.get(metric["id"]) for metric in metrics])
                    for pair, by_metric in cells.items()
                ],
            }
        )
    return tables


def _names(comparison: Mapping[str, Any]) -> tuple[str, str]:
    treatment = comparison["treatment"]
    judged = at_l0(treatment["arm"], treatment["l0_total"])
    return judged, baseline_text(comparison["baseline"])


def _cell(
    comparison: Mapping[str, Any], metric: Mapping[str, Any], n_seeds: int
) -> dict[str, Any]:
    """What a comparison shows of itself."""
    # means of counts are no counts
    digits = max(metric["digits"], 1)
    verdict = comparison["verdict"]
    kind = verdict if verdict in ("higher", "lower") else "undecided"
    if kind != "undecided" and metric["better"]:
        kind += " better" if verdict == metric["better"] else " worse"
    estimate = {
        "value": comparison["mean"],
        "ci_low": comparison["ci_low"],
        "ci_high": comparison["ci_high"],
    }
    return {
        "metric": metric["id"],
        "metric_title": metric_name(metric),
        "kind": kind,
        "verdict": verdict_text(comparison, n_seeds),
        "difference": _estimate(estimate, digits, sign="+"),
        "treatment": _number(comparison["treatment_mean"], digits),
        "baseline": _number(comparison["baseline_mean"], digits),
        "by_seed": ", ".join(
            f"{seed}: {_number(difference, digits, sign='+')}"
            for seed, difference in comparison["differences"].items()
        ),
        "method": comparison["method"],
        "p_value": _number(comparison["p_value"], 3),
        "p_holm": _number(comparison["p_holm"], 3),
        "detectable": _number(comparison["detectable"], digits)
        if verdict == "not distinguishable" and comparison["detectable"] is not None
        else "",
        "note": comparison["note"],
    }


def _number(value: float | None, digits: int, sign: str = "-") -> str:
    """A number as a paper prints it, or a dash if there is none."""
    if value is None:
        return "-"
    rounded = round(value, digits) + 0.0  # which makes a zero of a negative one
    return f"{rounded:{sign},.{digits}f}".replace("-", "−")


def _estimate(found: Mapping[str, Any], digits: int, sign: str = "-") -> str:
    """A number with its interval, if it has one."""
    shown = _number(found["value"], digits, sign)
    if found["ci_low"] is None or found["ci_high"] is None:
        return shown
    ends = (_number(found[end], digits, sign) for end in ("ci_low", "ci_high"))
    return f"{shown} [{', '.join(ends)}]"
