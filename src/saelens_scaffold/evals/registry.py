"""Every evaluation that can be run by name: this package's own, SAEBench's, and plugins'."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import (
    AT_MOST_ONE,
    NOT_NEGATIVE,
    SHARE,
    Bounds,
    Evaluation,
    Metric,
)
from saelens_scaffold.plugins.manager import evaluation_plugins

_BOUNDS = {"share": SHARE, "not_negative": NOT_NEGATIVE, "at_most_one": AT_MOST_ONE}


def evaluations_named(names: str) -> list[Evaluation]:
    """
    The evaluations of a list of names, each once.

    Args:
        names: Separated by commas.

    Raises:
        UserError: There is no evaluation of such a name.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    # Plugins are looked for only where they can matter.
    known = EVALUATIONS if set(wanted) <= set(EVALUATIONS) else known_evaluations()
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        said = ", ".join(map(repr, unknown)) or repr(names)
        raise UserError(
            f"there is no evaluation {said}; there are {', '.join(sorted(known))}"
        )
    return [known[name] for name in dict.fromkeys(wanted)]


def known_evaluations() -> dict[str, Evaluation]:
    """
    Every evaluation by name, those of installed plugins included.

    Raises:
        UserError: A plugin's evaluation has the name of another.
    """
    known = dict(EVALUATIONS)
    for offered in evaluation_plugins().hook.evaluations():
        for evaluation in offered:
            if evaluation.name in known:
                raise UserError(
                    f"a plugin offers an evaluation {evaluation.name!r}, which there is already"
                )
            known[evaluation.name] = evaluation
    return known


def _read_evaluations() -> dict[str, Evaluation]:
    text = (
        files("saelens_scaffold.evals")
        .joinpath("evaluations.yaml")
        .read_text(encoding="utf-8")
    )
    return {name: _evaluation(name, **d) for name, d in yaml.safe_load(text).items()}


def _evaluation(
    name: str,
    implementation: str,
    metrics: Sequence[dict[str, Any]] = (),
    **fields: Any,
) -> Evaluation:
    return Evaluation(
        name,
        implementation=f"saelens_scaffold.evals.{implementation}",
        metrics=tuple(_metric(**metric) for metric in metrics),
        **fields,
    )


def _metric(bounds: str | list[float] | None = None, **fields: Any) -> Metric:
    found: Bounds = (None, None)
    if isinstance(bounds, str):
        found = _BOUNDS[bounds]
    elif bounds is not None:
        found = (bounds[0], bounds[1])
    return Metric(**fields, bounds=found)


EVALUATIONS: dict[str, Evaluation] = _read_evaluations()
