"""Figures: well-formed SVG, a text for those who hear it, and none where there is nothing."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import pytest
from comparison_factory import METHODS, comparison
from mctk.comparison import charts
from mctk.comparison import figures as module
from mctk.comparison.figures import figures, write_figures
from mctk.comparison.figures_quality import by_bytes, by_parameters
from mctk.comparison.palette import COLOURS, family_of, is_composed, looks
from mctk.comparison.standing import groups_of
from mctk.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"
ALL = [
    "parameters",
    "bytes",
    "layer_errors",
    "pass_errors",
    "ranks",
    "spectra",
    "similarity",
    "routing",
]


@pytest.fixture(scope="module")
def found():
    return comparison()


@pytest.fixture(scope="module")
def drawn(found):
    return {drawing.name: drawing for drawing in figures(found)}


def words_of(drawing):
    root = ElementTree.fromstring(drawing.svg)
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def one(draw, comparison):
    """A single figure, in the style of all."""
    with charts.styled():
        return draw(comparison)


def test_every_figure_is_drawn(drawn):
    assert list(drawn) == ALL


@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_whole_and_says_what_it_is(drawn, name):
    drawing = drawn[name]
    root = ElementTree.fromstring(drawing.svg)
    assert root.get("role") == "img" and root.get("viewBox")
    assert root.get("aria-labelledby") == f"{name}-title {name}-desc"
    assert root.find(f"{SVG}title").text == drawing.title
    assert root.find(f"{SVG}desc").text == drawing.caption
    assert all(i.get("id").startswith(f"{name}-") for i in root.iter() if i.get("id"))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing.svg))
    assert used <= {i.get("id") for i in root.iter()}
    assert not re.findall(r'(?:src|href)="(?!#|data:)', drawing.svg)
    assert "<style" not in drawing.svg  # it would rule the page around it


def test_names_of_all_methods_stand_beside_their_lines(drawn):
    words = words_of(drawn["parameters"])
    for name, _, _ in METHODS:
        assert any(word in (name, f"{name} ★", f"{name} ≈") for word in words)


def test_rounded_rows_are_named_on_the_byte_frontier(drawn):
    words = words_of(drawn["bytes"])
    assert {"8 bits", "4 bits", "3 bits", "2 bits", "D²-MoE, 4 bits −60 %"} <= set(words)
    assert "REAP −40 %" not in words


def test_the_same_comparison_gives_the_same_bytes(found, drawn):
    again = {drawing.name: drawing for drawing in figures(found)}
    assert again == drawn


def test_figures_without_data_are_left_out():
    bare = comparison(structure=False)
    bare = dataclasses.replace(
        bare, rows=[dataclasses.replace(row, trace=[], banks=[]) for row in bare.rows]
    )
    assert [drawing.name for drawing in figures(bare)] == ["parameters", "bytes"]
    none = dataclasses.replace(bare, rows=[])
    assert figures(none) == []


def test_rounding_alone_has_no_place_among_parameters():
    bare = comparison(structure=False)
    alone = dataclasses.replace(bare, rows=[row for row in bare.rows if row.budget is None])
    assert "parameters" not in [drawing.name for drawing in figures(alone)]


def test_a_row_that_gains_is_drawn(found):
    row = next(row for row in found.rows if row.status == "ok")
    windows = {
        name: dataclasses.replace(
            text,
            change=dataclasses.replace(text.change, value=-0.02),
            window_nll=[x - 511 * 0.02 for x in found.original.texts[name].window_nll],
        )
        for name, text in row.texts.items()
    }
    gains = dataclasses.replace(found, rows=[dataclasses.replace(row, texts=windows)])
    assert {"parameters", "bytes"} <= {drawing.name for drawing in figures(gains)}


def test_files_are_written(found, tmp_path, drawn):
    written = write_figures(found, tmp_path / "figures")
    assert [drawing.name for drawing in written] == ALL
    for drawing in written:
        file = tmp_path / "figures" / f"{drawing.name}.svg"
        assert file.read_text(encoding="utf-8") == drawing.svg == drawn[drawing.name].svg


def test_without_matplotlib_the_error_says_what_to_install(found, monkeypatch, tmp_path):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    assert not module.available()
    with pytest.raises(UserError, match=r"pip install 'mctk\[figures\]'"):
        write_figures(found, tmp_path)


def test_the_users_own_style_is_left_alone(found):
    import matplotlib as mpl

    with mpl.rc_context({"axes.grid": False, "font.size": 31.0}):
        before = dict(mpl.rcParams)
        figures(dataclasses.replace(found, rows=found.rows[:4]))
        assert dict(mpl.rcParams) == before


def test_many_layers_and_experts_stay_small(monkeypatch):
    import comparison_factory

    monkeypatch.setattr(comparison_factory, "LAYERS", 27)
    monkeypatch.setattr(comparison_factory, "EXPERTS", 64)
    big = comparison(tasks=False, speed=False)
    for drawing in figures(big):
        assert len(drawing.svg) < 200_000, drawing.name


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_are_readable_on_white():
    for colour in COLOURS:
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5, colour


def test_methods_are_told_apart_and_rounding_is_hollow(found):
    known = looks(found.rows)
    assert len(set(known.methods.values())) == len(known.methods)
    by_name = {row.name: row for row in found.rows}
    plain, rounded = by_name["NAEE"], by_name["NAEE, 4 bits"]
    assert family_of(plain) == family_of(rounded) == "prune"
    assert is_composed(rounded) and not is_composed(plain) and not is_composed(by_name["4 bits"])
    assert family_of(by_name["4 bits"]) == "quantize"
    look, hollow = known.of(plain), known.of(rounded)
    assert look.filled and not hollow.filled
    assert (look.colour, look.marker) == (hollow.colour, hollow.marker)
    reap = known.of(by_name["REAP"])  # of many methods a family has a colour
    assert reap.colour == look.colour and reap.marker != look.marker


def test_methods_of_one_stage_have_colours_of_their_own(found):
    rows = [row for row in found.rows if row.family == "prune"]
    known = looks(rows)
    assert not known.families
    assert len(set(known.methods.values())) == len({row.name for row in rows}) == 10
    assert len({look.colour for look in known.methods.values()}) == len(COLOURS)
    drawing = one(by_bytes, dataclasses.replace(found, rows=rows))
    assert {"NAEE", "REAP", "EAN"} <= set(words_of(drawing))  # the legend names them


def test_the_best_of_every_budget_has_a_name(found, drawn):
    labels = [group.best.label for group in groups_of(found) if group.best]
    assert {f"{label} ★" for label in labels} <= set(words_of(drawn["parameters"]))
    shares = [f"{100 * budget.remove:g}" for budget in found.budgets]
    names = {f"★ {label} −{share} %" for label, share in zip(labels, shares, strict=True)}
    assert names <= set(words_of(drawn["bytes"]))


def test_methods_whose_budget_counts_bytes_have_names(found):
    """They have no place among parameters: the best, what is tied with it, and the smallest."""
    rows = [
        dataclasses.replace(row, budget=dataclasses.replace(row.budget, unit="bytes"))
        for row in found.rows
        if row.family == "prune" and row.status == "ok"
    ]
    found = dataclasses.replace(found, rows=rows)
    assert one(by_parameters, found) is None
    words = words_of(one(by_bytes, found))
    for name in {row.label for row in rows}:
        assert any(name in word and "−60 %" in word for word in words)
    assert sum(word.startswith("★") for word in words) == 3


def test_experts_kept_are_those_of_the_experts_alone(found):
    """Rows of the router that a budget counts as well move no point."""
    row = next(row for row in found.rows if row.name == "NAEE")
    scope = dataclasses.replace(row.scope, attained=row.scope.attained - 100_000)
    less = dataclasses.replace(row, scope=scope)
    first, second = (one(by_parameters, dataclasses.replace(found, rows=[r])) for r in (row, less))
    assert first == second


def test_a_dense_model_has_no_figures_of_experts(found):
    texts = {name: {"tokens": 64, "shares": []} for name in found.structure["routing"]}
    nothing = {"layers": [], "experts": [], "routing": texts}
    spectra = {**found.structure["spectra"], "banks": {}}
    similarity = {**found.structure["similarity"], "cka": []}
    structure = {**found.structure, **nothing, "spectra": spectra, "similarity": similarity}
    names = [d.name for d in figures(dataclasses.replace(found, structure=structure))]
    assert names == ALL[:5]
