"""Figures of an inspection show its plain data."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import STEP_LOOKUP_MAP
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.untrusted import MAX_JSON_VALUES
from saelens_scaffold.inspect import Inspection, figures, read_inspection
from test_inspect_page import HOSTILE, RANK, SCAFFOLD, TOKENS, make_inspection


@pytest.fixture(scope="module")
def found() -> Inspection:
    return TypeAdapter(Inspection).validate_python(make_inspection())


def drawn(figure: Figure, path: Path) -> None:
    """See that it can be drawn."""
    figure.savefig(path / "figure.png")


def test_the_spectrum(found: Inspection, tmp_path: Path):
    scaffold = found.saes[1].scaffold
    assert scaffold is not None
    figure = figures.spectrum(scaffold, found.variance_shares)
    drawn(figure, tmp_path)
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert heights == [of.share_of_variance for of in scaffold.directions]
    (line,) = axes.get_lines()
    assert [*line.get_ydata()] == found.variance_shares[:RANK]  # type: ignore[misc]


def test_the_share_by_position(found: Inspection, tmp_path: Path):
    scaffold = found.saes[1].scaffold
    assert scaffold is not None
    figure = figures.share_by_position(scaffold.positions)
    drawn(figure, tmp_path)
    lines = figure.axes[0].get_lines()
    shown = [[*line.get_ydata()] for line in lines]  # type: ignore[misc]
    positions = scaffold.positions
    assert shown == [positions.share_of_variance, positions.share_of_squares]
    assert [*lines[0].get_xdata()] == [*range(len(positions.n))]  # type: ignore[misc]


def test_r_squared_of_directions_and_of_dense_latents(
    found: Inspection, tmp_path: Path
):
    scaffold = found.saes[1].scaffold
    assert scaffold is not None
    for explained in (scaffold.directions, found.saes[0].dense):
        figure = figures.r_squared(explained)
        drawn(figure, tmp_path)
        (axes,) = figure.axes
        names = [label.get_text() for label in axes.get_xticklabels()]
        values = axes.get_images()[0].get_array()
        expected = [[of.r_squared[name] for name in names] for of in explained]
        assert {*names} == {*explained[0].r_squared}
        assert np.array_equal(np.asarray(values), expected)
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["latent 7", "latent 9"]


def test_activations_of_a_latent(found: Inspection, tmp_path: Path):
    latents = found.saes[1].latents
    figure = figures.activation_histogram(latents, RANK + 5)
    drawn(figure, tmp_path)
    values, edges, _ = figure.axes[0].patches[0].get_data()  # type: ignore[attr-defined]
    assert [*values] == latents.histogram[5]
    first = latents.first_bin[5]
    for i, edge in enumerate(edges):
        assert edge == pytest.approx(2 ** ((first + i) / 2))
    assert f"latent {RANK + 5}," in figure.axes[0].get_title()
    with pytest.raises(ValueError, match="not in list"):
        figures.activation_histogram(latents, RANK - 1)


def test_firing_frequencies_of_two_saes(found: Inspection, tmp_path: Path):
    figure = figures.firing_frequencies(found.saes)
    drawn(figure, tmp_path)
    curves = figure.axes[0].get_lines()[:2]
    for curve, sae in zip(curves, found.saes, strict=True):
        assert curve.get_label() == sae.name
        xs, ys = STEP_LOOKUP_MAP[curve.get_drawstyle()](*curve.get_data())
        # at 10 %, as many as fire more often
        above = sum(frequency > 0.1 for frequency in sae.latents.frequency)
        assert np.interp(0.1, xs[::-1], ys[::-1]) == pytest.approx(above)
    assert curves[0].get_linestyle() == "--"


def test_contexts_are_shown_and_never_run(found: Inspection):
    contexts = found.saes[0].latents.contexts[0]
    shown = figures.ShownContexts(contexts, 127.0, TOKENS)
    html, text = shown._repr_html_(), repr(shown)
    assert HOSTILE not in html
    assert html.count("<tr>") == len(contexts) == text.count("\n") + 1
    assert html.count("<span") == sum(len(of.tokens) for of in contexts)
    assert html.count("underline") == len(contexts)
    assert html.count("<th>127</th>") == len(contexts)
    for of, line in zip(contexts, text.split("\n"), strict=True):
        peak = figures.visible(TOKENS[of.tokens[of.peak]])
        assert line.startswith("127: ")
        assert f"[[{peak}]]" in line
        assert figures.visible("".join(TOKENS[i] for i in of.tokens[:3])) in line
    for unseen, seen in (("a\u200b\n", "aU+200B↵"), ("\t \u202e", "→ U+202E")):
        assert figures.visible(unseen) == seen


def test_an_inspection_is_read_again(found: Inspection, tmp_path: Path):
    with pytest.raises(UserError, match=r"inspect\.json cannot be read: No such file"):
        read_inspection(tmp_path / "inspect.json")
    file, content = tmp_path / "inspect.json", make_inspection()
    content["tokens"] = [
        text.replace("\ud800", "") for text in TOKENS
    ]  # no text at all
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_inspection(tmp_path) == read_inspection(file)
    assert read_inspection(file).saes[1].name == SCAFFOLD
    # as large as of 65,536 latents: other JSON may not be
    content["variance_shares"] = [0] * (MAX_JSON_VALUES + 1)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert len(read_inspection(file).variance_shares) > MAX_JSON_VALUES
    file.write_text('{"n_tokens": 3}')
    with pytest.raises(UserError, match="run it again"):
        read_inspection(file)
