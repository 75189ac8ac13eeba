"""How far a metric between two sparsities is from what is interpolated there.

Reads the curves of a comparison whose grid has one architecture at many k. Each point
between two others is interpolated from these, along L0 and along log L0, and the errors
are put together by the ratio of the two others' L0.

    saelens-scaffold compare benchmarks/interpolation.yaml --output_path interpolation
    python benchmarks/interpolation.py interpolation/results.json
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np

RATIOS = (1.6, 2.1, 3.1, 4.2, math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results.json of the comparison")
    options = parser.parse_args()
    results = json.loads(options.results.read_text("utf-8"))
    titles = {metric["id"]: metric["title"] for metric in results["metrics"]}
    print(
        "| metric | ratio of L0 | brackets | difference of the ends | error along L0 "
        "| along log L0 | outside the ends |"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    for curve in results["curves"]:
        points = [(point["l0"], point["mean"]) for point in curve["points"]]
        found: dict[float, list[tuple[float, float, float, bool]]] = {}
        for low, between, high in itertools.combinations(points, 3):
            ratio = next(r for r in RATIOS if high[0] / low[0] <= r)
            ends = np.array([low, high])
            line = np.interp(between[0], ends[:, 0], ends[:, 1])
            log = np.interp(math.log(between[0]), np.log(ends[:, 0]), ends[:, 1])
            is_outside = not min(ends[:, 1]) <= between[1] <= max(ends[:, 1])
            found.setdefault(ratio, []).append(
                (
                    abs(high[1] - low[1]),
                    float(line) - between[1],
                    float(log) - between[1],
                    is_outside,
                )
            )
        for ratio, errors in sorted(found.items()):
            gap, line, log, outside = np.array(errors).T
            below = f"up to {ratio:g}" if ratio < math.inf else f"above {RATIOS[-2]:g}"
            print(
                f"| {titles[curve['metric']]} | {below} | {len(errors)} | {gap.mean():.3f} "
                f"| {line.mean():+.3f} | {log.mean():+.3f} | {int(outside.sum())} |"
            )


if __name__ == "__main__":
    main()
