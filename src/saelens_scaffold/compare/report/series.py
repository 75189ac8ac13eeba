"""Series of the report's plots, and how each looks in all of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from saelens_scaffold.compare.grid import Arm

# Distinct from each other on a white and on a black page.
COLOURS = ("#3b7dd8", "#d9742b", "#2f9e77", "#b65fc4", "#b8931f", "#d1495b", "#7d8794")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star")
BAR_PATTERNS = ("", "/", "x", "-", "|", ".")


class Style(NamedTuple):
    """
    Look of a series.

    Attributes:
        colour: Colour; a scaffold SAE shares that of its plain baseline.
        is_plain: Whether the SAEs have no scaffold: dashed and hollow.
        symbol: plotly's name of the marker, which tells series of one colour apart.
        bar_pattern: plotly's name of the bars' pattern, likewise.
    """

    colour: str
    is_plain: bool
    symbol: str
    bar_pattern: str


def series_of(architecture: str, axes: Mapping[str, Any]) -> str:
    """Name of a series: the architecture and all axes but k."""
    return Arm(architecture, axes).without("k").label


def styles(results: Mapping[str, Any]) -> dict[str, Style]:
    """The look of each series, in the order of the SAEs."""
    twins = _twins(results)
    families: list[str] = []
    found: dict[str, Style] = {}
    for sae in results["saes"]:
        architecture: str = sae["architecture"]
        series = series_of(architecture, sae["axes"])
        if series in found:
            continue
        family = twins.get(architecture, architecture)
        if family not in families:
            families.append(family)
        colour = COLOURS[families.index(family) % len(COLOURS)]
        is_plain = sae["scaffold_rank"] == 0
        alike = sum(style[:2] == (colour, is_plain) for style in found.values())
        found[series] = Style(
            colour,
            is_plain,
            SYMBOLS[alike % len(SYMBOLS)],
            BAR_PATTERNS[alike % len(BAR_PATTERNS)],
        )
    return found


def _twins(results: Mapping[str, Any]) -> dict[str, str]:
    """
    The plain architecture whose colour a scaffold architecture shares.

    It is the baseline, unless another architecture has its colour already: solid and
    dashed lines cannot tell three apart.
    """
    has_scaffold = {s["architecture"] for s in results["saes"] if s["scaffold_rank"]}
    twins: dict[str, str] = {}
    for comparison in results["comparisons"]:
        treatment = comparison["treatment"]["architecture"]
        baseline = comparison["baseline"]["architecture"]
        is_taken = baseline in has_scaffold or baseline in twins.values()
        if treatment in has_scaffold and not is_taken:
            twins.setdefault(treatment, baseline)
    return twins
