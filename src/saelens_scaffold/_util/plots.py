"""Every matplotlib picture of firing frequencies."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_firing_curve(
    axes: "Axes", frequencies: Sequence[float], style: str, **look: Any
) -> None:
    """
    Draw a curve whose point (x, y) says that y latents fire more often than x.

    Args:
        axes: Where to draw it.
        frequencies: Share of the tokens on which each latent fires.
        style: Of the line, as in "--".
        look: As for matplotlib's `plot`.
    """
    alive = np.sort([frequency for frequency in frequencies if frequency > 0])[::-1]
    counts = np.arange(1, len(alive) + 1)
    # a latent counts below its own frequency, which is to the left: the later step
    axes.step(alive, counts, style, where="post", linewidth=1.6, **look)


def finish_firing_axes(axes: "Axes", threshold: float) -> None:
    """
    Label axes on which curves say how many latents fire more often than x.

    Args:
        axes: With the curves.
        threshold: Share of the tokens above which a latent is called dense.
    """
    dense = f"dense: above {threshold:g}"
    axes.axvline(threshold, color="grey", linewidth=0.8, label=dense)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(1e-4, 1),
        xlabel="firing frequency x (share of tokens)",
        ylabel="sparse latents firing more often than x",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.2)
