"""A comparison as terminal text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv as reader
import dataclasses
import io
import re
from html import unescape

import pytest
from comparison_factory import METHODS, comparison
from mctk.comparison import raw
from mctk.comparison.fields import fields_of, final_errors, leaders, perplexity
from mctk.comparison.latex import escape, latex
from mctk.comparison.markdown import literal, markdown
from mctk.comparison.notes import protocol, winner
from mctk.comparison.page import html
from mctk.comparison.result import Interval
from mctk.comparison.standing import groups_of, ordered, score
from mctk.comparison.terminal import terminal
from rich.console import Console

NASTY = r"<b>a|b</b> & 100% $x_1$ #{y} \z ~ ^ “q”"


@pytest.fixture(scope="module")
def found():
    return comparison(structure=False)


def printed(comparison, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    terminal(comparison, console)
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
    star = next(i for i, line in enumerate(lines) if line.startswith("★"))
    assert first < star < first + 5  # what is said of the winner stands between
    stars = [line for line in lines if line.startswith("★") and "best of its budget" not in line]
    assert len(stars) == 3


def test_a_failed_row_is_a_row_with_its_reason(found):
    for text in (printed(found), markdown(found)):
        assert re.search(r"HC-SMoE +\|? +failed", text)
        assert "3 groups left" in text.replace("\n", " ")
    assert r"failed: layer 2: experts.gate" in latex(found)


def test_flags_have_a_mark_and_a_meaning(found):
    text = markdown(found)
    assert "REAP †" in text
    assert "† stores less than its budget allows" in text


def test_markdown_grids_are_regular(found):
    for block in re.findall(r"(?:^\|.*\n)+", markdown(found), re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block[:300]


def test_markdown_shows_chance_and_standard_errors(found):
    line = next(x for x in markdown(found).splitlines() if x.startswith("| guessing"))
    assert "0.250" in line and "0.500" in line and "0.333" in line
    assert re.search(r"0\.\d{3} ± 0\.011", markdown(found))
    assert re.search(r"0\.\d{3} ± 0\.006", markdown(found))  # of the mean of three tasks


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
        assert "change" in keys
        assert not any(key.startswith(("task:", "average", "retained")) for key in keys)
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
    text = latex(found)
    columns = len(re.search(r"\\begin\{tabular\}\{l(r+)\}", text).group(1)) + 1
    for line in text.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1, line
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == len(groups_of(found))
    assert text.count(r"\midrule") == 2 * len(groups_of(found))
    few = latex(dataclasses.replace(found, rows=found.rows[:12]))
    assert few.count(r"\begin{table*}") == 1 and few.count(r"\midrule") == 4
    depth = 0
    for sign in re.sub(r"\\[{}]", "", text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0


def test_latex_reads_text_as_text(found):
    row = dataclasses.replace(found.rows[0], label=NASTY)
    text = latex(dataclasses.replace(found, rows=[row]))
    assert escape(NASTY) in text
    assert not re.search(r"(?<!\\)[#$%_](?!.*\\\$)", escape("#$%_"))
    assert escape("D²-MoE & 50 %") == r"D\textsuperscript{2}-MoE \& 50 \%"
    assert escape("\\") == r"\textbackslash{}"


def test_latex_says_its_protocol_and_marks_the_best(found):
    text = latex(found)
    assert r"token\_ppl/v1 window=512 stride=512" in text
    assert r"\textbf{D\textsuperscript{2}-MoE}" in text


def test_seeds_are_shown_as_mean_and_spread():
    seeds = comparison(structure=False, seeds=3)
    text = markdown(seeds)
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
    for text in (printed(early), markdown(early)):
        assert "3 rows are pending" in text
    raw.csv(early), latex(early)


def test_figures_that_are_not_finite_are_shown_as_missing(found):
    row = found.rows[0]
    texts = {
        name: dataclasses.replace(t, perplexity=None, nll=None, change=None, window_nll=[None])
        for name, t in row.texts.items()
    }
    broken = dataclasses.replace(found, rows=[dataclasses.replace(row, texts=texts), found.rows[3]])
    for text in (printed(broken), markdown(broken), latex(broken)):
        assert "nan" not in text.lower()
    assert "perplexity" in raw.csv(broken)


def test_interval_without_bounds_is_a_number(found):
    row = found.rows[0]
    texts = {
        name: dataclasses.replace(t, change=Interval(0.5), window_nll=[])
        for name, t in row.texts.items()
    }
    bare = dataclasses.replace(found, rows=[dataclasses.replace(row, texts=texts)])
    assert re.search(r"\| +\**0\.500\** +\|", markdown(bare))


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.8504, "12.85"), (153.21, "153.2"), (8041.4, "8041"), (1234567.0, "1.2e+06"), (None, "—")],
)
def test_perplexities_have_four_figures(value, text):
    assert perplexity(value) == text


def test_rows_stand_in_one_order_everywhere(found):
    """Rows without a budget by bytes, LaTeX among the outputs."""
    group = groups_of(found)[-1]
    assert group.budget is None
    labels = [entry.label for entry in ordered(found, group)]
    assert labels == ["2 bits", "3 bits", "4 bits", "8 bits"]
    for text in (printed(found), markdown(found), latex(found)):
        part = text[text.index(group.title) :]
        places = [re.search(rf"^\W*{label}", part, re.MULTILINE).start() for label in labels]
        assert places == sorted(places)


def test_rows_of_any_size_have_no_best_figure(found):
    fields, group = fields_of(found), groups_of(found)[-1]
    assert group.best is None and not leaders(fields, group.ranked)


def test_markdown_reads_text_as_text(found):
    assert literal("<b>50 %</b> *of* svd_llm") == r"\<b>50 %\</b> \*of\* svd_llm"
    assert literal("_x_ [a](b) `c` &amp; a & b") == r"\_x\_ \[a\](b) \`c\` \&amp; a & b"
    rows = [dataclasses.replace(row, label="<b>*x*</b>") for row in found.rows]
    text = markdown(dataclasses.replace(found, rows=rows))
    assert r"\<b>\*x\*\</b>" in text
    assert not re.search(r"(?<!\\)<b>|(?<!\\)\*x", text)


def test_markdown_and_page_say_the_same_of_the_winner(found):
    group = groups_of(found)[1]
    said = winner(found, group)
    assert said.startswith(f"{group.best.label} is best")
    assert all(entry.label in said for entry in group.tied) and "behind" in said
    assert f"By mean log-perplexity {said}." in markdown(found)
    assert f"<li>{group.title}: {said}.</li>" in unescape(html(found, []))


def fewer(comparison, windows):
    """The comparison as if its texts had so many windows."""

    def texts(subject):
        return {k: dataclasses.replace(t, windows=windows) for k, t in subject.texts.items()}

    original = dataclasses.replace(comparison.original, texts=texts(comparison.original))
    rows = [dataclasses.replace(row, texts=texts(row)) for row in comparison.rows]
    return dataclasses.replace(comparison, original=original, rows=rows)


def test_intervals_from_few_windows_are_marked_everywhere(found):
    few = fewer(found, 4)
    said = "interval from 4 windows of a text"
    for text in (printed(few), markdown(few), html(few, [])):
        assert re.search(r"\d\](</small>)?!|\d\]!", text) and said in text
    assert said in latex(few)
    line = next(reader.DictReader(io.StringIO(raw.csv(few))))
    assert line["windows:code"] == "4"
    for text in (printed(found), markdown(found), html(found, []), latex(found)):
        assert "windows of a text" not in text and not re.search(r"\d\]!", text)


def test_shared_time_is_told_from_that_of_rows(found):
    seconds = {"calibrate": 74.0, "compress": 300.0, "evaluate": 60.0, "total": 500.0}
    for calls, words in ((1, ""), (3, ", 3 calls together"), (None, ", all calls together")):
        lines = protocol(dataclasses.replace(found, seconds=seconds, calls=calls))
        assert f"Time that rows share{words}: calibrate 1 min 14 s" in lines
        assert f"Time for single rows{words}: compress 5 min 00 s, evaluate 1 min 00 s" in lines
        assert any(line.startswith(f"By the clock{words}: 8 min 20 s") for line in lines)


def test_a_layer_that_was_left_alone_has_no_error(found):
    row = found.rows[0]
    row = dataclasses.replace(row, trace=[p for p in row.trace if p.layer in (1, 2)])
    errors = final_errors(row, 4)
    assert errors[0] == errors[3] == 0 and errors[1] > 0
    field = next(f for f in fields_of(found) if f.key == "layer_error")
    assert field.value(row) == pytest.approx(sum(errors.values()) / 4)
    line = list(reader.DictReader(io.StringIO(raw.csv(dataclasses.replace(found, rows=[row])))))[1]
    assert line["layer_error:0"] == "0.0"
    assert final_errors(dataclasses.replace(row, trace=[]), 4) == {}
