"""The figure of a model card."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saelens_scaffold._util.plots import finish_firing_axes
from saelens_scaffold.hub.sources import UploadedSAE

_MAX_CURVES = 10
"""As many as can be told apart."""


def write_firing_frequencies(saes: Sequence[UploadedSAE], path: Path) -> bool:
    """
    Plot how often sparse latents fire, one curve for each SAE, and save it as a PNG.

    A point (x, y) of a curve: y sparse latents fire on more than x of the tokens.
    Scaffold SAEs have solid lines, plain ones dashed lines.

    Args:
        saes: The SAEs, of which the first ten with known frequencies are drawn.
        path: Where to write.

    Returns:
        Whether there was anything to draw.
    """
    known = [sae for sae in saes if sae.facts.frequencies is not None]
    if not known:
        return False
    from matplotlib.figure import Figure  # not needed to load SAEs

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for sae in known[:_MAX_CURVES]:
        frequencies = np.asarray(sae.facts.frequencies)
        alive = np.sort(frequencies[frequencies > 0])[::-1]
        axes.step(
            alive,
            np.arange(1, len(alive) + 1),
            linestyle="-" if sae.rank else "--",
            linewidth=1.6,
            label=f"{sae.sae_id} (rank {sae.rank})" if sae.rank else sae.sae_id,
        )
    finish_firing_axes(axes, known[0].facts.threshold)
    # no version and no date, so that the same plot is the same file
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
    return True
