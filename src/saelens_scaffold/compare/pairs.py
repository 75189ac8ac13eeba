"""What an experiment will compare with what, before anything is measured."""

from collections.abc import Sequence

from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Arm, Run
from saelens_scaffold.compare.matching import MeasuredSAE, compare_arms
from saelens_scaffold.compare.metrics import ComparisonMetric


def pairs_text(config: CompareConfig, runs: Sequence[Run]) -> str:
    """
    For each kind of SAEs that is judged, what it is compared with, by the SAEs' k.

    Args:
        config: The experiment.
        runs: Its SAEs.
    """
    sparsity = ComparisonMetric("sparsity", "sparsity", lambda _: None)
    found = compare_arms(
        [
            MeasuredSAE(
                run, {sparsity.id: run.nominal_l0_total or 0.0}, run.nominal_l0_total
            )
            for run in runs
        ],
        [sparsity],
        config.baselines,
        config.confidence,
    )
    arms = dict.fromkeys(run.arm for run in runs)
    rivals: dict[Arm, list[str]] = {
        arm: [] for arm in arms if arm.architecture in config.baselines
    }
    for comparison in found:
        if comparison.differences:
            how = ", interpolated" * comparison.interpolated
            rivals[comparison.treatment].append(
                f"{comparison.baseline.label} (same {comparison.matching}{how})"
            )
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
