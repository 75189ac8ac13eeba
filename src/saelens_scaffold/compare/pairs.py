"""The comparisons of an experiment, before anything is measured."""

from collections.abc import Sequence

from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Arm, Run
from saelens_scaffold.compare.matching import MeasuredSAE, pairs_of


def pairs_text(config: CompareConfig, runs: Sequence[Run]) -> str:
    """
    The baseline of each kind of SAEs that has one, by the SAEs' k.

    Args:
        config: The experiment.
        runs: Its SAEs.
    """
    found = pairs_of(
        [MeasuredSAE(run, {}, run.nominal_l0_total) for run in runs],
        config.baselines,
        config.max_bracket,
    )
    rivals: dict[Arm, list[str]] = {
        run.arm: [] for run in runs if run.arm.architecture in config.baselines
    }
    for pair in found:
        how = f"same {pair.matching}"
        if pair.interpolated:
            ends = " and ".join(f"{end.k:g}" for end in pair.known)
            how += f", interpolated between k={ends}"
        if pair.refusal:
            how = f"{pair.refusal}, {pair.note}"
        rivals[pair.treatment].append(f"{pair.baseline.label} ({how})")
    if not any(rivals.values()):
        judged = ", ".join(f"{j} with {b}" for j, b in config.baselines.items())
        return (
            "comparisons: none, as the grid has no SAE together with its baseline; "
            f"`baselines` compares {judged or 'nothing'}"
        )
    lines = [
        f"  {arm.label} with {', '.join(of_arm) or 'nothing: it has no partner'}"
        for arm, of_arm in rivals.items()
    ]
    return "\n".join(["comparisons:", *lines])
