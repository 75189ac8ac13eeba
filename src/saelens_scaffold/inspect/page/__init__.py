"""
Page of an inspection: one HTML file that needs no network.

page.html says what was inspected and how to read the numbers, page.js shows the rest, of
the elements in elements.js.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saelens_scaffold._util import pages
from saelens_scaffold._util.files import new_file
from saelens_scaffold.inspect import explanations, sides, statistics, sums
from saelens_scaffold.saes.facts import DENSE_THRESHOLD

CHUNK = 256
"""Latents whose contexts are parsed together, when the first of them is looked at."""

SHOWN_COMPONENTS = 64
"""Principal components whose share of the variance the page has."""

_DIRECTLY = ("n_tokens", "cross_entropy", "n_removal_tokens", "tokens", "pairs")


def write_page(inspection: Mapping[str, Any], path: Path) -> None:
    """
    Write the page of an inspection.

    Args:
        inspection: Contents of inspect.json.
        path: HTML file; an existing one is replaced once the new one is complete.
    """
    with new_file(path) as temporary:
        temporary.write_text(page(inspection), encoding="utf-8")


def page(inspection: Mapping[str, Any]) -> str:
    """
    The page of an inspection.

    Args:
        inspection: Contents of inspect.json.
    """
    saes = inspection["saes"]
    n = len(saes)
    templates = pages.environment("inspect/page")
    return templates.get_template("page.html").render(
        title=f"Inside {n} {'SAE' if n == 1 else 'SAEs'} of {inspection['model_name']}",
        inspection=inspection,
        explanations=explanations,
        matched_cosine=sides.MATCHED_COSINE,
        data={"inspection": _shown(inspection), **dict(_chunks(saes))},
        libraries=[templates.get_template("elements.js").render()],
    )


def _shown(inspection: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs from the start."""
    texts = explanations.PREDICTORS
    return {
        **{name: inspection[name] for name in _DIRECTLY},
        "chunk": CHUNK,
        "bin_width": statistics.DIRECTION_BIN,
        "variance_shares": inspection["variance_shares"][:SHOWN_COMPONENTS],
        "dense": (
            f"Sparse latents that fire on more than {DENSE_THRESHOLD:.0%} of the tokens. "
            f"Explained are those among the {sums.MAX_DENSE} of each SAE that fire most "
            f"often, and on more than {sums.MAY_BE_DENSE:.0%}, of the "
            f"{inspection['n_sample_tokens']:,} tokens before those that are counted"
        ),
        "predictors": {n: texts.get(n, n) for n in inspection["predictors"]},
        "saes": [_shown_sae(sae) for sae in inspection["saes"]],
    }


def _shown_sae(sae: Mapping[str, Any]) -> dict[str, Any]:
    """An SAE with compact contexts, and of the latents only the tokens that they fire on."""
    latents, scaffold = sae["latents"], sae["scaffold"]
    strongest = [
        list(dict.fromkeys(of["tokens"][of["peak"]] for of in contexts))
        for contexts in latents["contexts"]
    ]
    shown = {**sae, "latents": {**latents, "contexts": None, "strongest": strongest}}
    if scaffold:
        ends = ("high", "low")
        directions = [
            {**of, **{end: [_compact(c) for c in of[end]] for end in ends}}
            for of in scaffold["directions"]
        ]
        shown["scaffold"] = {**scaffold, "directions": directions}
    return shown


def _chunks(saes: list[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Contexts of `CHUNK` latents each, by the id of their element."""
    for i, sae in enumerate(saes):
        contexts = sae["latents"]["contexts"]
        for start in range(0, len(contexts), CHUNK):
            of_latents = contexts[start : start + CHUNK]
            compact = [[_compact(c) for c in of] for of in of_latents]
            yield f"contexts-{i}-{start // CHUNK}", compact


def _compact(context: Mapping[str, Any]) -> list[Any]:
    fields = ("sequence", "position", "peak", "tokens", "values")
    return [context[name] for name in fields]
