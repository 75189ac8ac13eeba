"""
Figures of an inspection, for notebooks.

Each shows plain data of an `Inspection`; nothing is computed that is not in there. With
`%matplotlib inline`, a notebook shows a figure that a cell returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.figure import Figure

from saelens_scaffold._util.plots import draw_firing_curve, finish_firing_axes
from saelens_scaffold.inspect.explanations import PREDICTORS
from saelens_scaffold.inspect.output import (
    Context,
    DenseLatent,
    Direction,
    InspectedSAE,
    Latents,
    Positions,
    Scaffold,
)
from saelens_scaffold.saes.facts import DENSE_THRESHOLD

_HIGH, _LOW = "224,122,31", "59,125,216"
_MARKS = {"\n": "↵", "\r": "␍", "\t": "→"}


def spectrum(scaffold: Scaffold, variance_shares: Sequence[float]) -> Figure:
    """
    Variance along a scaffold's directions, beside that along the principal components.

    Args:
        scaffold: The scaffold.
        variance_shares: Those of the principal components: `Inspection.variance_shares`.
    """
    figure, shares = _figure(), [of.share_of_variance for of in scaffold.directions]
    axes, numbers = figure.subplots(), range(len(shares))
    axes.bar(numbers, shares, label="scaffold direction")
    principal = variance_shares[: len(shares)]
    axes.plot(range(len(principal)), principal, "k.--", label="principal component")
    axes.set(xlabel="number", ylabel="share of the variance")
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    return figure


def share_by_position(positions: Positions) -> Figure:
    """What a scaffold carries of the activations at each position of the sequence."""
    figure = _figure()
    axes = figure.subplots()
    axes.plot(positions.share_of_variance, label="of the variance")
    axes.plot(positions.share_of_squares, "--", label="of ‖x‖²")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.xaxis.set_major_formatter("{x:.0f}")
    limits = {"xlim": (0, len(positions.n) - 1), "ylim": (0, None)}
    axes.set(xlabel="position", ylabel="scaffold's share", **limits)
    axes.legend()
    return figure


def r_squared(explained: Sequence[Direction | DenseLatent]) -> Figure:
    """
    Held-out R² of every predictor, a row for each direction or dense latent.

    Args:
        explained: `Scaffold.directions`, or `InspectedSAE.dense`.
    """
    names = [
        name for name in PREDICTORS if any(name in of.r_squared for of in explained)
    ]
    values = [[of.r_squared.get(name, np.nan) for name in names] for of in explained]
    figure = Figure(figsize=(6.4, 1 + 0.3 * len(explained)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.array(values), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, of_row in enumerate(values):
        for column, value in enumerate(of_row):
            colour = "white" if value > 0.6 else "black"
            text = f"{max(value, 0):.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour)
    labels = [
        f"latent {of.latent}" if isinstance(of, DenseLatent) else f"direction {i}"
        for i, of in enumerate(explained)
    ]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(labels)), labels)
    return figure


def activation_histogram(latents: Latents, latent: int) -> Figure:
    """
    How many tokens a latent fires on, by its activation.

    Args:
        latents: The dictionary.
        latent: Number of the latent in the SAE.

    Raises:
        ValueError: It has no such sparse latent.
    """
    row, figure = latents.index.index(latent), _figure()
    axes, counts = figure.subplots(), latents.histogram[row]
    edges = 2 ** ((latents.first_bin[row] + np.arange(len(counts) + 1)) / 2)
    axes.stairs(counts, edges, fill=True)
    title = (
        f"latent {latent}, which fires on {latents.frequency[row]:.2%} of the tokens"
    )
    axes.set(xscale="log", xlabel="activation", ylabel="tokens", title=title)
    return figure


def firing_frequencies(saes: Sequence[InspectedSAE]) -> Figure:
    """How many sparse latents of each SAE fire more often than a share of the tokens."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for sae in saes:
        style = "-" if sae.scaffold else "--"
        draw_firing_curve(axes, sae.latents.frequency, style, label=sae.name)
    finish_firing_axes(axes, DENSE_THRESHOLD)
    return figure


@dataclass
class ShownContexts:
    """
    Contexts as a notebook shows them: tokens above zero are orange, those below blue, the
    strongest is underlined.

    Attributes:
        contexts: The contexts, as in `Direction.high` or an entry of `Latents.contexts`.
        scale: Their scale: that of the direction, or the latent's in `Latents.scale`.
        tokens: Text of each id of a token: `Inspection.tokens`.
    """

    contexts: Sequence[Context]
    scale: float
    tokens: Sequence[str]

    def _repr_html_(self) -> str:
        rows = map(self._row, self.contexts)
        return f'<table style="font-family: monospace">{"".join(rows)}</table>'

    def _row(self, context: Context) -> str:
        spans: list[str] = []
        for i, (token, value) in enumerate(
            zip(context.tokens, context.values, strict=True)
        ):
            colour = _HIGH if value > 0 else _LOW
            style = f"background: rgba({colour},{abs(value) / 127:.2f})"
            if i == context.peak:
                style += "; text-decoration: underline"
            text = escape(visible(self.tokens[token]))
            spans.append(f'<span style="{style}">{text}</span>')
        peak = context.values[context.peak] * self.scale / 127
        text = (
            f'<td style="text-align: left; white-space: pre-wrap">{"".join(spans)}</td>'
        )
        return f"<tr><th>{peak:.3g}</th>{text}</tr>"

    def __repr__(self) -> str:
        lines: list[str] = []
        for of in self.contexts:
            texts = [visible(self.tokens[token]) for token in of.tokens]
            texts[of.peak] = f"[[{texts[of.peak]}]]"
            lines.append(
                f"{of.values[of.peak] * self.scale / 127:.3g}: {''.join(texts)}"
            )
        return "\n".join(lines)


def visible(text: str) -> str:
    """A token's text, with marks for what cannot be seen: ↵, →, or a code as in U+200B."""
    return "".join(
        c if c.isprintable() else _MARKS.get(c, f"U+{ord(c):04X}") for c in text
    )


def _figure() -> Figure:
    return Figure(figsize=(6.4, 3), layout="constrained")
