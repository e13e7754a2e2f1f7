"""A comparison as terminal text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv as reader
import dataclasses
import io
import re

import pytest
from comparison_factory import METHODS, comparison
from mctk.compare import raw, tables
from mctk.compare.fields import fields_of, leaders, perplexity
from mctk.compare.latex import escape
from mctk.compare.result import Interval
from mctk.compare.standing import groups_of, score
from rich.console import Console

NASTY = r"<b>a|b</b> & 100% $x_1$ #{y} \z ~ ^ “q”"


@pytest.fixture(scope="module")
def found():
    return comparison(structure=False)


def printed(comparison, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    tables.terminal(comparison, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160, 240])
def test_the_terminal_keeps_within_its_width(found, width):
    lines = printed(found, width).splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if re.search(r"\d+\.\d %", line)]
    assert len(rows) >= len(found.rows)


def test_wider_terminals_show_more(found):
    assert "agreement" not in printed(found, 100).split("Left to")[0]
    assert "agreement" in printed(found, 200).split("original")[0]


def test_the_original_stands_on_top_and_the_best_first(found):
    lines = printed(found).splitlines()
    original = next(i for i, line in enumerate(lines) if line.lstrip().startswith("original"))
    first = next(i for i, line in enumerate(lines) if "20 % of" in line)
    assert original < first
    assert lines[first + 1].startswith("★")
    stars = [line for line in lines if line.startswith("★") and "best of its budget" not in line]
    assert len(stars) == 3


def test_a_failed_row_is_a_row_with_its_reason(found):
    for text in (printed(found), tables.markdown(found)):
        assert re.search(r"HC-SMoE +\|? +failed", text)
        assert "3 groups left" in text.replace("\n", " ")
    assert r"failed: layer 2: experts.gate" in tables.latex(found)


def test_flags_have_a_mark_and_a_meaning(found):
    text = tables.markdown(found)
    assert "REAP †" in text
    assert "† stores less than its budget allows" in text


def test_markdown_grids_are_regular(found):
    for block in re.findall(r"(?:^\|.*\n)+", tables.markdown(found), re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block[:300]


def test_markdown_shows_chance_and_standard_errors(found):
    line = next(x for x in tables.markdown(found).splitlines() if x.startswith("| guessing"))
    assert "0.250" in line and "0.500" in line and "0.333" in line
    assert re.search(r"0\.\d{3} ± 0\.011", tables.markdown(found))


def test_columns_without_figures_disappear():
    bare = comparison(tasks=False, speed=False, structure=False)
    titles = [field.title for field in fields_of(bare)]
    assert "tasks" not in titles and "peak memory" not in titles and "decode tok/s" not in titles
    full = [field.title for field in fields_of(comparison(structure=False))]
    assert {"tasks", "above chance", "peak memory", "decode tok/s"} <= set(full)


def test_the_retained_share_is_one_for_the_original_and_none_at_chance(found):
    field = next(f for f in fields_of(found) if f.key == "retained")
    assert field.value(found.original) == pytest.approx(1)
    guess = found.original.average.chance
    row = dataclasses.replace(
        found.rows[0], average=dataclasses.replace(found.rows[0].average, value=guess)
    )
    assert field.value(row) == pytest.approx(0)


def test_bold_figures_are_the_best_of_their_column(found):
    fields = fields_of(found)
    for group in groups_of(found):
        best = leaders(fields, group.entries)
        keys = {key for _, key in best}
        assert "change" in keys and not any(key.startswith("task:") for key in keys)
        for row, key in best:
            field = next(f for f in fields if f.key == key)
            values = {e.row.key: e.mean(field.value) for e in group.entries if e.done}
            ends = min if field.better == "low" else max
            assert values[row] == ends(values.values())


def test_csv_gives_every_figure_back(found):
    lines = list(reader.DictReader(io.StringIO(raw.csv(found))))
    assert len(lines) == len(found.rows) + 1
    assert lines[0]["name"] == "original"
    for line, row in zip(lines[1:], found.rows, strict=True):
        assert line["name"] == row.name and line["status"] == row.status
        if row.status != "ok":
            assert line["reason"] == row.reason and line["bytes"] == ""
            continue
        assert int(line["bytes"]) == row.sizes.bytes
        for name, text in row.texts.items():
            assert float(line[f"perplexity:{name}"]) == text.perplexity
            assert float(line[f"change:{name}:low"]) == text.change.low
            assert float(line[f"kl:{name}"]) == text.divergence.kl.value
        assert float(line["change"]) == score(found, row)
        assert float(line["layer_error:3"]) == row.trace[-1].error


def test_csv_survives_commas_quotes_and_lines(found):
    row = dataclasses.replace(found.rows[0], label='a,"b"\nc')
    text = raw.csv(dataclasses.replace(found, rows=[row]))
    assert list(reader.DictReader(io.StringIO(text)))[1]["label"] == 'a,"b"\nc'


def test_latex_rows_have_as_many_cells_as_columns(found):
    text = tables.latex(found)
    columns = len(re.search(r"\\begin\{tabular\}\{l(r+)\}", text).group(1)) + 1
    for line in text.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1, line
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == len(groups_of(found))
    assert text.count(r"\midrule") == 2 * len(groups_of(found))
    few = tables.latex(dataclasses.replace(found, rows=found.rows[:12]))
    assert few.count(r"\begin{table*}") == 1 and few.count(r"\midrule") == 4
    depth = 0
    for sign in re.sub(r"\\[{}]", "", text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0


def test_latex_reads_text_as_text(found):
    row = dataclasses.replace(found.rows[0], label=NASTY)
    text = tables.latex(dataclasses.replace(found, rows=[row]))
    assert escape(NASTY) in text
    assert not re.search(r"(?<!\\)[#$%_](?!.*\\\$)", escape("#$%_"))
    assert escape("D²-MoE & 50 %") == r"D\textsuperscript{2}-MoE \& 50 \%"
    assert escape("\\") == r"\textbackslash{}"


def test_latex_says_its_protocol_and_marks_the_best(found):
    text = tables.latex(found)
    assert r"token\_ppl/v1 window=512 stride=512" in text
    assert r"\textbf{D\textsuperscript{2}-MoE}" in text


def test_seeds_are_shown_as_mean_and_spread():
    seeds = comparison(structure=False, seeds=3)
    text = tables.markdown(seeds)
    assert re.search(r"\| ★ [^|]+ \|[^\n]+ ± ", text)
    assert "mean ± standard deviation over 3 calibrations" in text
    assert "seeds 0, 1, 2: failed" in text
    assert len(raw.csv(seeds).splitlines()) == 1 + 1 + 3 * 3 * len(METHODS) + 4


def test_an_unfinished_comparison_says_so(found):
    rows = [
        dataclasses.replace(row, status="pending", sizes=None, scope=None, texts={}, tasks={},
                            average=None, speed=None, trace=[], banks=[], seconds={}, flags=[])
        for row in found.rows[:3]
    ]  # fmt: skip
    early = dataclasses.replace(found, rows=rows, finished=False)
    for text in (printed(early), tables.markdown(early)):
        assert "3 rows are pending" in text
    raw.csv(early), tables.latex(early)


def test_figures_that_are_not_finite_are_shown_as_missing(found):
    row = found.rows[0]
    texts = {
        name: dataclasses.replace(t, perplexity=None, nll=None, change=None, window_nll=[None])
        for name, t in row.texts.items()
    }
    broken = dataclasses.replace(found, rows=[dataclasses.replace(row, texts=texts), found.rows[3]])
    for text in (printed(broken), tables.markdown(broken), tables.latex(broken)):
        assert "nan" not in text.lower()
    assert "perplexity" in raw.csv(broken)


def test_interval_without_bounds_is_a_number(found):
    row = found.rows[0]
    texts = {
        name: dataclasses.replace(t, change=Interval(0.5), window_nll=[])
        for name, t in row.texts.items()
    }
    bare = dataclasses.replace(found, rows=[dataclasses.replace(row, texts=texts)])
    assert re.search(r"\| +\**0\.500\** +\|", tables.markdown(bare))


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.8504, "12.85"), (153.21, "153.2"), (8041.4, "8041"), (1234567.0, "1.2e+06"), (None, "—")],
)
def test_perplexities_have_four_figures(value, text):
    assert perplexity(value) == text
