"""Every evaluation that can be run by name: this package's own, SAEBench's, and plugins'."""

from pathlib import Path

import yaml
from pydantic import TypeAdapter

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import Evaluation
from saelens_scaffold.plugins.manager import leave_out, offered_by_plugins


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

    A plugin's evaluation with the name of another is left out, with a warning.
    """
    known = dict(EVALUATIONS)
    for plugin, offered in offered_by_plugins("evaluations", Evaluation).items():
        for evaluation in offered:
            if evaluation.name in known:
                taken = f"there is already an evaluation {evaluation.name!r}"
                leave_out(plugin, taken)
            else:
                known[evaluation.name] = evaluation
    return known


def _read_evaluations() -> dict[str, Evaluation]:
    text = Path(__file__).with_name("evaluations.yaml").read_text(encoding="utf-8")
    of_fields = TypeAdapter(Evaluation).validate_python
    read = yaml.safe_load(text).items()
    return {name: of_fields({"name": name, **fields}) for name, fields in read}


EVALUATIONS: dict[str, Evaluation] = _read_evaluations()
