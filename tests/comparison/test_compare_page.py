"""The page: escaped, whole, free of requests; and in a real browser it sorts and fits."""

from __future__ import annotations

import dataclasses
import html as entities
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparison_factory import comparison
from mctk.comparison import charts
from mctk.comparison.page import html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VOID = {"meta", "br", "hr", "img", "input", "link", "use"}
NASTY = """</script><script>alert("x")</script><b onclick='y'>&amp; "q" 'a'"""


@pytest.fixture(scope="module")
def found():
    return comparison()


@pytest.fixture(scope="module")
def page(found):
    return html(found)


class Outline(HTMLParser):
    """Checks that every element is closed where it should be, and takes notes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])
        if given.get("href", "").startswith("#"):
            self.links.append(given["href"][1:])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def test_the_page_is_well_formed(page):
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.links) <= set(outline.ids)


def test_the_page_asks_nobody_for_anything(page):
    assert "default-src 'none'" in entities.unescape(page)
    outline = Outline(page)
    for tag, given in outline.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert given.get(name, "#").startswith(("#", "data:")), (tag, given)
    assert not re.search(r"@import|url\((?!#)", page)


def test_what_comes_from_files_is_escaped(found):
    row = next(row for row in found.rows if row.status == "ok")
    failed = next(row for row in found.rows if row.status == "failed")
    step = dataclasses.replace(row.steps[0], options={"text": NASTY}, targets=[NASTY])
    text = next(iter(row.texts))
    rows = [
        dataclasses.replace(
            row,
            label=NASTY,
            chain=NASTY,
            path=NASTY,
            steps=[step],
            flags=[dataclasses.replace(found.rows[40].flags[0], text=NASTY)]
            if found.rows[40].flags
            else [],
            banks=[dataclasses.replace(row.banks[0], summary=NASTY, bank=NASTY)],
            trace=[dataclasses.replace(row.trace[0], step=NASTY)],
        ),
        dataclasses.replace(failed, reason=NASTY, label=NASTY),
    ]
    hostile = dataclasses.replace(
        found,
        name=NASTY,
        model=dataclasses.replace(found.model, name=NASTY),
        rows=rows,
        protocols=[NASTY],
        command=NASTY,
        source=NASTY,
        versions={NASTY: NASTY},
        tasks=[*found.tasks, NASTY],
        calibrations=[dataclasses.replace(found.calibrations[0], sources=[NASTY])],
    )
    hostile = dataclasses.replace(
        hostile, rows=[dataclasses.replace(rows[0], tasks={NASTY: row.tasks["piqa"]}), rows[1]]
    )
    assert text in hostile.rows[0].texts
    written = html(hostile)
    outline = Outline(written)
    assert [tag for tag, _ in outline.tags].count("script") == 1
    assert all("onclick" not in given for _, given in outline.tags)
    assert "alert" not in re.findall(r"<script>(.*?)</script>", written, re.DOTALL)[0]


def test_figures_stand_in_the_page_with_captions(found, page):
    assert page.count("<figure ") == page.count("<figcaption>") == page.count("<svg ") == 8


def test_without_matplotlib_the_page_says_so(found, monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    bare = html(found)
    Outline(bare)
    assert "<svg" not in bare and "mctk[figures]" in bare


def test_failed_rows_are_folded_with_their_reason(page):
    assert "<details><summary>failed</summary>layer 2: experts.gate has 3 groups" in page


def test_details_have_steps_as_yaml(page):
    assert "- merge: fisher" in page and "version: 2" in page


def test_every_seed_has_its_own_details():
    seeds = html(comparison(structure=False, seeds=2))
    Outline(seeds)
    assert "<h3>seed 1</h3>" in seeds


# --- a real browser ------------------------------------------------------------------------------

PROBE_HEAD = """<script>
window.problems = [];
window.addEventListener('error', (e) => window.problems.push(String(e.message)));
window.addEventListener('securitypolicyviolation', (e) => window.problems.push(e.blockedURI));
</script>"""
PROBE = """<script>
const all = (selector) => [...document.querySelectorAll(selector)];
const column = (at) => all('#board tbody').map((body) => [...body.rows]
  .filter((row) => row.dataset.place !== undefined)
  .map((row) => row.classList.contains('failed') ? null
    : at ? parseFloat(row.cells[at].dataset.value) : row.dataset.name))
  .filter((rows) => rows.length);
const heads = all('#board thead th');
const at = heads.findIndex((head) => head.textContent.includes('wordnet'));
const button = heads[at].querySelector('button');
const found = {before: column(at)};
button.click(); found.up = column(at); found.sortUp = heads[at].getAttribute('aria-sort');
button.click(); found.down = column(at); found.sortDown = heads[at].getAttribute('aria-sort');
heads[0].querySelector('button').click(); found.names = column(0);
const shown = () => heads.filter((head) => getComputedStyle(head).display !== 'none').length;
found.columns = all('.choice button').map((choice) => { choice.click(); return shown(); });
document.querySelector('.choice button').click();
found.width = [innerWidth, document.documentElement.scrollWidth];
found.overlaps = []; found.outside = []; found.small = 99;
for (const svg of all('figure svg')) {
  const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
  const words = [...svg.querySelectorAll('text')].filter((text) => text.textContent.trim());
  const boxes = words.map((text) => text.getBoundingClientRect());
  words.forEach((text, i) => {
    const a = boxes[i], name = text.textContent;
    found.small = Math.min(found.small, scale * parseFloat(getComputedStyle(text).fontSize));
    if (a.left < frame.left - 1 || a.right > frame.right + 1
      || a.top < frame.top - 1 || a.bottom > frame.bottom + 1) found.outside.push(name);
    for (let k = i + 1; k < words.length; k++) {
      const b = boxes[k];
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        found.overlaps.push([name, words[k].textContent]);
    }
  });
}
location.hash = document.querySelector('#board tbody th a').getAttribute('href');
setTimeout(() => {
  found.opened = document.getElementById(location.hash.slice(1)).open;
  found.requests = performance.getEntriesByType('resource').length;
  found.problems = window.problems;
  document.body.innerHTML = '<pre id="probe"></pre>';
  document.getElementById('probe').textContent = JSON.stringify(found);
}, 50);
</script>"""


@pytest.fixture(scope="module")
def browser():
    known = [path for name in BROWSERS if (path := shutil.which(name))]
    if not known:
        pytest.skip("no Chromium or Chrome")
    return known[0]


def opened(browser, page, directory, width):
    """What the page looks like to a browser's script, and what its console said."""
    file = directory / "page.html"
    probed = page.replace("<head>", "<head>" + PROBE_HEAD).replace("</body>", PROBE + "</body>")
    file.write_text(probed, encoding="utf-8")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    options = ["--headless", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [browser, *sandbox, *options, f"--user-data-dir={directory / 'profile'}",
         f"--window-size={width},900", "--virtual-time-budget=20000", file.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    written = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert written, done.stdout[-2000:]
    return json.loads(entities.unescape(written.group(1))), console


@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser_it_sorts_and_fits(browser, page, found, tmp_path: Path, width):
    seen, console = opened(browser, page, tmp_path, width)
    assert console == [] and seen["problems"] == [] and seen["requests"] == 0
    assert (seen["sortUp"], seen["sortDown"]) == ("ascending", "descending")
    groups = [len(rows) for rows in seen["before"]]
    assert sum(groups) == len(found.rows)
    for up, down in zip(seen["up"], seen["down"], strict=True):
        known = [value for value in up if value is not None]
        assert known == sorted(known) and up[len(known) :] == [None] * (len(up) - len(known))
        assert [value for value in down if value is not None] == sorted(known, reverse=True)
        assert down[len(known) :] == up[len(known) :]  # what failed stays at the end
    assert [len(rows) for rows in seen["names"]] == groups
    quality, cost, every = seen["columns"]
    assert quality + cost == every + 1
    assert seen["width"][1] <= seen["width"][0]
    assert seen["opened"]
    assert seen["overlaps"] == [] and seen["outside"] == []
    if width > 1000:
        assert seen["small"] >= 8
