"""The axes of every matplotlib picture of firing frequencies."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
