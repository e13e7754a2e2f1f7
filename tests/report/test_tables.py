from __future__ import annotations

import pytest
from mctk.report.tables import (
    Column,
    Table,
    count,
    duration,
    fixed,
    percent,
    scientific,
    section,
    size,
    whole,
)


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (count, 46_702_792_704, "46.7 B"),
        (count, 999_960, "1.00 M"),
        (count, 812, "812"),
        (count, 0, "0"),
        (count, 9_996, "10.0 k"),
        (size, 93_405_585_408, "93.4 GB"),
        (size, 12, "12 B"),
        (whole, 1234567, "1,234,567"),
        (percent, 0.4, "40.0 %"),
        (scientific, 0.0123, "0.0123"),
        (scientific, 3.2e-6, "3.2e-06"),
        (scientific, 0.0, "0.0000"),
        (duration, 8.21, "8.2 s"),
        (duration, 59.99, "60.0 s"),
        (duration, 200, "3 min 20 s"),
        (duration, 7500, "2 h 05 min"),
        (fixed(2, sign=True), 0.5, "+0.50"),
        (count, None, "—"),
        (size, float("nan"), "—"),
        (fixed(3), True, "—"),
    ],
)
def test_numbers(form, value, expected):
    assert form(value) == expected


def test_markdown_is_aligned_and_escaped():
    columns = [Column("a", "name", left=True), Column("b", "value", fixed(1))]
    table = Table(columns, [{"a": "x|y\nz", "b": 1.25}, {"b": "n.a."}], ["A note."])
    assert table.markdown() == (
        "| name   | value |\n"
        "| ------ | ----: |\n"
        "| x\\|y z |   1.2 |\n"
        "| —      |  n.a. |\n"
        "\n"
        "A note.  "
    )
    assert table.csv() == 'a,b\n"x|y\nz",1.25\n,n.a.'


def test_a_section_without_content_vanishes():
    assert section("Title", "", "") == ""
    assert section("Title", "", "text", level=3) == "### Title\n\ntext"
