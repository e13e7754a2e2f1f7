"""Ten families through the whole toolkit; `make families` takes all, and its page is tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.families import EVERY_FAMILY, FAMILIES
from tests.families.check import FRESH, check_family, check_refused
from tests.families.outcome import COLUMNS, WORKS, Outcome
from tests.families.page import PAGE, modelling_file, modelling_files, page
from tests.families.pool import check_all
from tests.families.text import NO_LANGUAGE_MODEL


@pytest.fixture(scope="module", autouse=True)
def fresh_process():
    yield
    FRESH.stop()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_works_whole(family: str, tmp_path: Path):
    outcome = check_family(family, tmp_path)
    assert not outcome.failures()
    assert list(outcome.items) == list(COLUMNS)


def test_what_is_no_language_model_is_refused_in_plain_words(tmp_path: Path):
    [first, *_] = NO_LANGUAGE_MODEL
    outcome = check_refused(first, tmp_path)
    assert outcome.refused
    [message] = set(outcome.items.values())
    assert first in message and "causal language model" in message


def test_every_modelling_file_with_experts_has_a_family():
    covered = {modelling_file(family) for family in (*EVERY_FAMILY, *NO_LANGUAGE_MODEL)}
    assert modelling_files() - covered == set()


def test_a_family_that_brings_its_process_down_does_not_stop_the_others():
    told = []
    found = check_all(["no such family"], 1, told.append)
    [outcome] = told
    assert found == {"no such family": outcome}
    assert all("died" in said for said in outcome.items.values())


def outcomes() -> dict[str, Outcome]:
    works = dict.fromkeys(COLUMNS, WORKS)
    return {
        "mixtral": Outcome("mixtral", dict(works)),
        "olmoe": Outcome("olmoe", {**works, "reap": "/tmp/some/where/config.json: a | b"}),
        "flint": Outcome("flint", dict.fromkeys(COLUMNS, "is no model"), refused=True),
    }


def test_the_page_says_what_works_and_exactly_why_not():
    text = page(outcomes())
    assert f"1 of the {len(modelling_files())} modelling files" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    assert rows["mixtral"].count("| yes") == len(COLUMNS)
    assert rows["olmoe"].count("| yes") == len(COLUMNS) - 1
    assert rows["olmoe"].endswith("| REAP: `config.json: a \\| b` |")
    assert rows["flint"].count("| refused") == len(COLUMNS)
    assert rows["flint"].endswith("| `is no model` |")


def test_the_page_that_is_shipped_has_every_family():
    text = PAGE.read_text()
    assert f"transformers {transformers.__version__}" in text
    rows = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *said = (cell.strip() for cell in line.strip("|").split("|", len(COLUMNS) + 1))
            rows[name] = said
    assert {*EVERY_FAMILY, *NO_LANGUAGE_MODEL} <= rows.keys()
    for name in (*EVERY_FAMILY, *NO_LANGUAGE_MODEL):
        *cells, remark = rows[name]
        assert len(cells) == len(COLUMNS) and set(cells) <= {"yes", "no", "refused"}, name
        assert remark or set(cells) == {"yes"}, name
