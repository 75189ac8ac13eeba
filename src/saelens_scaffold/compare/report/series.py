"""What the curves of a comparison are of, and how each looks in every plot."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from saelens_scaffold.compare.grid import Arm

# Each can be told from the others, and from both a white and a black page.
COLOURS = ("#3b7dd8", "#d9742b", "#2f9e77", "#b65fc4", "#b8931f", "#d1495b", "#7d8794")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star")
BAR_PATTERNS = ("", "/", "x", "-", "|", ".")


class Style(NamedTuple):
    """
    How a series looks in every plot.

    Attributes:
        colour: A scaffold SAE's is that of the plain one it is compared with.
        is_plain: Whether it has no scaffold: dashed and hollow.
        variant: Tells series of one architecture apart, by symbol or pattern.
    """

    colour: str
    is_plain: bool
    variant: int

    @property
    def symbol(self) -> str:
        """plotly's name of its marker."""
        return SYMBOLS[self.variant % len(SYMBOLS)]

    @property
    def bar_pattern(self) -> str:
        """plotly's name of the pattern of its bars."""
        return BAR_PATTERNS[self.variant % len(BAR_PATTERNS)]


def series_of(architecture: str, axes: Mapping[str, Any]) -> str:
    """The name of what a curve over k is of: the architecture and all axes but k."""
    return Arm(architecture, axes).without("k").label


def styles(results: Mapping[str, Any]) -> dict[str, Style]:
    """How each series looks, in the order in which the SAEs are listed."""
    is_plain: dict[str, bool] = {}
    architecture_of: dict[str, str] = {}
    for sae in results["saes"]:
        series = series_of(sae["architecture"], sae["axes"])
        is_plain[series] = sae["scaffold_rank"] == 0
        architecture_of[series] = sae["architecture"]
    twins = _twins(results)
    families = [twins.get(a, a) for a in dict.fromkeys(architecture_of.values())]
    families = list(dict.fromkeys(families))
    found: dict[str, Style] = {}
    for series, architecture in architecture_of.items():
        family = families.index(twins.get(architecture, architecture))
        look = (COLOURS[family % len(COLOURS)], is_plain[series])
        variant = sum(style[:2] == look for style in found.values())
        found[series] = Style(*look, variant)
    return found


def _twins(results: Mapping[str, Any]) -> dict[str, str]:
    """
    The plain architecture whose colour a scaffold architecture shares.

    It is the one it is compared with, if no other has its colour already: solid and
    dashed lines could not tell three apart.
    """
    has_scaffold = {s["architecture"] for s in results["saes"] if s["scaffold_rank"]}
    twins: dict[str, str] = {}
    for comparison in results["comparisons"]:
        treatment = comparison["treatment"]["architecture"]
        baseline = comparison["baseline"]["architecture"]
        if (
            treatment in has_scaffold
            and baseline not in has_scaffold
            and baseline not in twins.values()
        ):
            twins.setdefault(treatment, baseline)
    return twins
