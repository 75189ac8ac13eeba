"""Report of a comparison: one HTML page that needs no network."""

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from saelens_scaffold._util.files import new_file
from saelens_scaffold.compare import table
from saelens_scaffold.compare.config import yaml_text
from saelens_scaffold.compare.report import figures


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """
    Write the report of a comparison.

    Args:
        results: Contents of the comparison's results.json.
        path: HTML file; an existing one is replaced once the new one is complete.
    """
    with new_file(path) as temporary:
        temporary.write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """
    The report of a comparison as one HTML page, with its plots and plotly.js.

    The page's content security policy forbids any network access, and any script but the
    page's own two, whatever the names in the results contain.

    Args:
        results: Contents of the comparison's results.json. Sections without data are left
            out.
    """
    plots = {
        "curves": figures.metric_curves(results),
        "firing": figures.firing_frequencies(results),
        "ablation": figures.ablation_ratios(results),
        "spectrum": figures.scaffold_spectra(results),
        "alignment": figures.alignments(results),
    }
    series = figures.styles(results)
    drawn = {
        f"{section}-{i}": plot
        for section, of_section in plots.items()
        for i, plot in enumerate(of_section, start=1)
    }
    cells = [cell for sae in results["saes"] for cell in sae["metrics"].items()]
    made = table.environment()
    made.filters |= {"sha256": _csp_hash, "minus": _minus, "breakable": _breakable}
    made.filters["yaml"] = yaml_text
    return made.get_template("page.html").render(
        results=results,
        wording=table,
        comparisons=table.rows_by_pair(results),
        one_sided=table.one_sided(results),
        measured_metrics={name for name, found in cells if found["value"] is not None},
        plots=plots,
        styles=series,
        figures={"plots": drawn, "styles": series},
        plotly=get_plotlyjs(),
    )


def _csp_hash(script: str) -> str:
    """Hash by which a content security policy allows a script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _minus(numbers: str) -> str:
    """Numbers with true minus signs."""
    return re.sub(r"-(?=\d)", "−", numbers)


def _breakable(name: str) -> Markup:
    """An arm's name for narrow columns: `axis=value` stays whole as long as it fits."""
    words = (
        escape(word) if "=" in word else escape(word).replace("_", Markup("_<wbr>"))
        for word in name.split(" ")
    )
    return Markup(" ").join(words)
