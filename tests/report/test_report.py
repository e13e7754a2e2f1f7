from __future__ import annotations

import copy
import csv
import io
import json

import pytest
import yaml
from example_metrics import metrics, perplexity
from mctk.report import render_card, render_report, render_summary, side_by_side
from mctk.report.card import hub_id

RENDERERS = [render_report, render_card, render_summary, lambda m: side_by_side([m]).markdown()]


def row(markdown: str, start: str) -> list[str]:
    """The cells of the first table row that starts so."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_report_says_it_all():
    text = render_report(metrics())
    assert text.startswith("# owner/tiny-moe, compressed\n")
    assert row(text, "stored parameters")[1:] == ["11.0 M", "7.00 M", "63.6 %"]
    assert row(text, "docs")[1:4] == ["4.000", "5.000", "1.250"]
    assert row(text, "docs")[4] == "+0.2231 [+0.2000, +0.2500]"
    assert row(text, "arc")[4:] == ["0.6000 ± 0.0100", "0.5000 ± 0.0100 ‡", "0.2500", "2376"]
    assert "same choice for every document" in text
    assert "- few tokens | in all\n- layer 0: expert 1 saw no token" in text
    assert "Budget (parameters of the experts): allowed 7,010,000, attained 7,000,000" in text
    assert "attained 7,000,000, unused 0.09 %" in text
    assert "| 100, 0, 50, 7" in text
    assert "| `from_pretrained` in a fresh process gives the same bits" in text
    assert row(text, "sizes equal the plan")[1] == "NO"
    assert row(text, "tensors that differ")[1] == "12 of 40"
    assert "3 min 20 s" in text and "1.23 GB" in text
    assert "```yaml\nmodel: owner/tiny-moe\n```" in text
    assert "```bash\nmctk run recipes/small.yaml\n```" in text


def trace_of(text: str) -> list[list[str]]:
    """The cells of the error table, its header first."""
    lines = text[text.index("## Error after each pass") :].splitlines()
    end = next(i for i, line in enumerate(lines) if i and line.startswith("## "))
    table = [line for line in lines[:end] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:1] + table[2:]]


def test_errors_stand_once_a_layer_and_step():
    """A figure of the whole layer is not repeated for each bank that the step worked on."""
    header, *rows = trace_of(render_report(metrics()))
    assert header == ["layer", "after step", "layer's output", "experts.gate", "experts.down"]
    assert rows == [["0", "0", "0.0300", "0.0100", "—"], ["1", "0", "0.0300", "0.0100", "—"]]
    changed = metrics()
    both = changed["layers"][0]["trace"]
    changed["layers"] = [{"layer": 7, "trace": [*both, *({**e, "step": "stored"} for e in both)]}]
    assert [row[:2] for row in trace_of(render_report(changed))[1:]] == [
        ["7", "0"],
        ["7", "stored"],
    ]
    changed["layers"][0]["trace"] = [*both, *both]  # the same method twice is two steps
    assert len(trace_of(render_report(changed))) == 3


def test_what_the_plan_could_only_bound_is_said_to_be_bounded():
    changed = metrics()
    changed["sizes"]["at_most"] = ["active_parameters", "macs_per_token"]
    changed["sizes"]["attained"]["active_parameters"] -= 500_000
    text = render_report(changed)
    part = text[text.index("## Size") :]
    assert row(part, "active parameters")[2:] == ["≤ 2,500,000", "2,000,000", "-500,000"]
    assert row(part, "stored parameters")[2] == "7,000,000" and "≤: at most;" in part
    assert "≤" not in render_report(metrics())


def test_prediction_stands_beside_measurement():
    changed = metrics()
    changed["sizes"]["planned"]["parameters"] += 1000
    text = render_report(changed)
    assert row(text[text.index("## Size") :], "stored parameters")[1:] == [
        "11,000,000",
        "7,001,000",
        "7,000,000",
        "-1,000",
    ]
    assert row(text[text.index("## Size") :], "bytes")[-1] == "equal"


def test_a_long_table_is_folded():
    long = metrics()
    long["layers"] *= 20
    assert "<details><summary>80 rows</summary>\n\n| layer" in render_report(long)


def every_key(value, path=()):
    if isinstance(value, dict):
        for key, below in value.items():
            yield (*path, key)
            yield from every_key(below, (*path, key))
    elif isinstance(value, list) and path[-1] in ("layers", "trace"):
        yield from every_key(value[0], (*path, 0))


@pytest.mark.parametrize("path", list(every_key(metrics())), ids=lambda p: ".".join(map(str, p)))
def test_any_key_may_be_null_or_absent(path):
    for remove in (False, True):
        damaged = copy.deepcopy(metrics())
        at = damaged
        for key in path[:-1]:
            at = at[key]
        if remove:
            del at[path[-1]]
        else:
            at[path[-1]] = None
        for render in RENDERERS:
            assert "None" not in render(damaged)


def test_nothing_at_all_is_tolerated():
    for render in RENDERERS:
        assert render({})
        assert render({"layers": [], "evaluation": {}, "sizes": {}, "warnings": []})


def test_the_card_has_front_matter_and_says_how_to_load():
    text = render_card(metrics())
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "owner/tiny-moe",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mctk", "moe", "compressed"],
        "license": "apache-2.0",
    }
    assert "pip install mctk" in body and "import mctk " in body
    assert "with decompose svdllm. Nothing was trained" in body
    assert "mctk 0.1.0, torch 2.13" in body


def test_a_card_names_a_base_model_only_if_the_hub_has_it():
    local = metrics()
    local["model"] |= {"name": "recipes/demo", "hub": None}  # looks like a name on the hub
    assert hub_id(local) is None
    assert "base_model" not in render_card(local)


def test_code_is_fenced_whatever_it_holds():
    odd = metrics()
    odd["recipe_text"] = "# ``` \nmodel: x"
    assert "````yaml\n# ``` \nmodel: x\n````" in render_report(odd)


def test_the_summary_is_short():
    text = render_summary(metrics(), "runs/small")
    assert text.startswith("svdllm, remove 40 % of experts\n")
    assert text.endswith(
        "took 3 min 20 s; peak memory 1.23 GB; 2 warnings, see report.md; in runs/small"
    )
    assert len(text.splitlines()) < 25


def test_runs_stand_below_their_original():
    runs = [metrics(8_000_000, "a"), metrics(6_000_000, "b")]
    table = side_by_side(runs)
    assert [r["model"] for r in table.rows] == ["original", "svdllm, a", "svdllm, b"]
    assert [r["ppl:docs"] for r in table.rows] == [4.0, 5.0, 5.0]
    assert [r["acc:arc"] for r in table.rows] == [0.6, 0.5, 0.5]
    assert row(table.markdown(), "svdllm, b")[1:5] == ["6.00 M", "54.5 %", "2.50 M", "12.0 MB"]
    assert table.notes == ["ppl: token_ppl/v1 window=512 stride=512."]
    assert json.loads(table.json())[2]["parameters"] == 6_000_000
    header, first, *_ = csv.reader(io.StringIO(table.csv()))
    assert header[:2] == ["model", "parameters"] and first[:3] == ["original", "11000000", ""]


def test_two_originals_and_labels():
    other = metrics(5_000_000, "c")
    other["model"] = {"name": "b/other"}
    other["sizes"]["original"] = {"parameters": 9_000_000}
    table = side_by_side([metrics(), other, metrics(6_000_000, "b")], labels=["x", "y", "z"])
    assert [r["model"] for r in table.rows] == ["owner/tiny-moe", "x", "z", "b/other", "y"]


def test_perplexities_on_other_tokens_are_marked():
    other = metrics()
    other["evaluation"]["compressed"]["perplexity"]["docs"] = perplexity(6.0, "d2")
    table = side_by_side([metrics(), other])
    assert [r["ppl:docs"] for r in table.rows] == [4.0, 5.0, "6.000 †"]
    assert "not comparable" in table.notes[-1]


def test_what_steps_noted_is_listed():
    noted = {"step": "merge/a", "text": "objective 1.0 → 0.5 | done"}
    text = render_report({"layers": [{"layer": 3, "notes": [noted]}]})
    assert "## What the steps noted" in text and r"objective 1.0 → 0.5 \| done" in text
    assert "What the steps noted" not in render_report({"layers": [{"layer": 3, "notes": []}]})


def test_experts_that_stayed_are_listed():
    found = metrics()
    assert "## Experts that stayed" not in render_report(found)
    found["layers"][0]["kept"] = [0, 1, 2, 5]
    text = render_report(found)
    assert "## Experts that stayed" in text and "0-2,5" in text
