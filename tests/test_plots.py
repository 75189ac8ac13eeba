"""Pictures say what they say they do."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import STEP_LOOKUP_MAP
from matplotlib.figure import Figure

from saelens_scaffold._util.plots import draw_firing_curve


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=20))
def test_a_curve_counts_the_latents_above(percents: list[int]) -> None:
    shares = [n / 100 for n in percents]
    axes = Figure().subplots()
    draw_firing_curve(axes, [*shares, 0.0], "-")

    (line,) = axes.get_lines()
    # as matplotlib draws them
    xs, ys = STEP_LOOKUP_MAP[line.get_drawstyle()](*line.get_data())
    for x in np.arange(min(percents), max(percents)) / 100 + 0.005:
        (height,) = {
            y
            for x0, x1, y in zip(xs, xs[1:], ys, strict=False)
            if min(x0, x1) < x < max(x0, x1)
        }
        assert height == sum(share > x for share in shares)
