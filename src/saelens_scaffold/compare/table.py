"""Texts of `saelens-scaffold compare`: the plan before, the comparisons after."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from saelens_scaffold._util.tables import markdown
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.compare.wording import (
    REFUSALS,
    Row,
    legend,
    one_sided,
    rows_by_pair,
)

_WIDTH = 120
"""Width of lines of text; tables are as wide as they must be."""

_MATCHINGS = {
    "k": "At the same k for the sparse latents",
    "l0_total": "At the same l0_total (the scaffold's rank is paid for out of k)",
}


def comparison_text(results: Mapping[str, Any]) -> str:
    """A table for each pair of kinds of SAEs: every metric with interval and verdict."""
    n_seeds = len(results["summary"]["seeds"])
    parts: list[str] = []
    for matching, pairs in rows_by_pair(results).items():
        seeds = f"{n_seeds} seed{'s' * (n_seeds != 1)}"
        parts.append(f"{_MATCHINGS[matching]}, {seeds}:\n")
        parts += [_pair_text(*pair, rows) for pair, rows in pairs.items()]
        if said := legend([row.comparison for rows in pairs.values() for row in rows]):
            parts.append(fill(said, _WIDTH) + "\n")
    if not parts:
        parts.append(
            "Nothing to compare: no SAE has a baseline in the grid, or no evaluation of "
            "both.\n"
        )
    if alone := one_sided(results):
        table = text_table("llrr", alone)
        parts.append(f"What only one side has, mean and interval over seeds:\n{table}")
    return "\n".join(parts)


def plan_text(runs: Sequence[Run], waves: Sequence[Sequence[Run]]) -> str:
    """
    What will be trained.

    Args:
        runs: All SAEs of the experiment.
        waves: Those that are trained together.
    """
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run.arm.label, []).append(str(run.seed))
    return "\n".join(
        [
            f"{len(runs)} SAEs:",
            *(f"  {arm}, seed {', '.join(of_arm)}" for arm, of_arm in seeds.items()),
            f"in {len(waves)} wave{'s' * (len(waves) != 1)} "
            f"(of {', '.join(str(len(wave)) for wave in waves)}), each on one pass of "
            "the language model",
        ]
    )


def text_table(align: str, rows: Sequence[Mapping[str, str]]) -> str:
    """
    A table in Markdown.

    Args:
        align: A letter for each column, "l" or "r".
        rows: Cells by column header; at least one row.
    """
    table = Table(box=MARKDOWN)
    for letter, header in zip(align, rows[0], strict=True):
        justify = "right" if letter == "r" else "left"
        table.add_column(header, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    return markdown(table)


def _pair_text(judged: str, baseline: str, rows: Sequence[Row]) -> str:
    pair = f"{judged} against {baseline}"
    note, verdict = rows[0].comparison["note"], rows[0].comparison["verdict"]
    if verdict in REFUSALS:
        return fill(f"{pair}: {verdict}, {note}", _WIDTH) + "\n"
    heading = fill(f"{pair}{note and f'; {note}'}:", _WIDTH)
    table = text_table("lrrrrrl", [row.cells for row in rows])
    return f"{heading}\n{table}"
