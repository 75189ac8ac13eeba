"""The picture of a model card."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.plots import finish_firing_axes
from saelens_scaffold.hub.facts import facts_of
from saelens_scaffold.hub.sources import UploadedSAE

MAX_CURVES = 10
"""As many as can be told apart."""


def write_firing_frequencies(saes: Sequence[UploadedSAE], path: Path) -> bool:
    """
    Draw how often sparse latents fire, a curve for each SAE, and save it as a PNG.

    A point (x, y) of a curve says: y sparse latents fire on more than x of the tokens.
    Scaffold SAEs have solid lines, plain ones dashed lines.

    Args:
        saes: The SAEs. The first ten whose frequencies are known are drawn.
        path: Where to write.

    Returns:
        Whether there was anything to draw.
    """
    known = [(sae, facts_of(sae)) for sae in saes]
    known = [(sae, facts) for sae, facts in known if facts.frequencies is not None]
    if not known:
        return False
    from matplotlib.figure import Figure  # not needed by those who only load SAEs

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for sae, facts in known[:MAX_CURVES]:
        assert facts.frequencies is not None
        alive = np.sort(facts.frequencies[facts.frequencies > 0])[::-1]
        axes.step(
            alive,
            np.arange(1, len(alive) + 1),
            linestyle="-" if sae.rank else "--",
            linewidth=1.6,
            label=f"{sae.sae_id} (rank {sae.rank})" if sae.rank else sae.sae_id,
        )
    finish_firing_axes(axes, known[0][1].threshold)
    with new_file(path) as temporary:
        # no version or date, so that the same picture is the same file
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})
    return True
