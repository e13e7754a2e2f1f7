"""What mkdocs does beside its own work when it builds the site (`mkdocs.yml` names this file).

Pages are written for the files that people read in the repository. Here pages from outside of
`docs/` and generated ones are added, links that lead out of `docs/` are turned to them, lists are
set apart from the lines before them, and code blocks named by one word, as this dialect of Markdown
wants it.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).parents[2]
# Pages that are files elsewhere in the repository.
TAKEN = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/demo/README.md": "demo.md",
}
MADE: dict[str, Callable[[], str]] = {
    "methods/index.md": reference.methods,
    "reference/keys.md": reference.keys,
    "reference/options.md": reference.options,
    "reference/commands.md": reference.commands,
    "reference/shipped.md": reference.shipped,
}
# A list that follows a line of text without an empty line between them.
_MARKER = re.compile(r"(?:[-*]|\d+\.) ")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside of `docs/`, those that are made, and the style."""
    for source, page in TAKEN.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page, make in MADE.items():
        files.append(File.generated(config, page, content=make()))
    style = str(Path(__file__).with_name("site.css"))
    files.append(File.generated(config, "site.css", abs_src_path=style))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to where they lead on the site, and sets lists apart."""
    place = page.file.src_uri
    source = next((s for s, p in TAKEN.items() if p == place), f"docs/{place}")
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE)
    for at in range(0, len(parts), 2):  # every second part is code
        parts[at] = re.sub(
            r"(\]\(|src=\")([^)\s\"]+)",
            lambda found: found[1] + _turned(found[2], source, place),
            parts[at],
        )
        parts[at] = re.sub(r"<(recipe|file)>", r"&lt;\1&gt;", parts[at])  # a name, and no tag
    whole = re.sub(r"^```(\w+) .*$", r"```\1", "".join(parts), flags=re.MULTILINE)
    return _apart(whole)


def _turned(link: str, source: str, page: str) -> str:
    """Where a link of a repository's file leads on the site."""
    if re.match(r"[a-z]+:|#", link):
        return link
    path, hash_, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    recipe = re.fullmatch(r"recipes/(\w+)\.yaml", target)
    if recipe:
        target, hash_, anchor = "reference/shipped.md", "#", recipe[1]
    elif target in ("recipes/demo", "docs/methods"):
        target = {"recipes/demo": "demo.md", "docs/methods": "methods/index.md"}[target]
    elif target in TAKEN:
        target = TAKEN[target]
    else:
        target = target.removeprefix("docs/")
    return posixpath.relpath(target, posixpath.dirname(page) or ".") + hash_ + anchor


def _apart(markdown: str) -> str:
    """An empty line before each list that follows a paragraph without one."""
    lines: list[str] = []
    fenced = inside = False  # in a code block; in a list
    for line in markdown.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        if not fenced:
            marked = bool(_MARKER.match(line))
            if marked and not inside and lines and lines[-1].strip():
                lines.append("")
            if marked:
                inside = True
            elif not line.strip() or line.startswith("#"):
                inside = False
        lines.append(line)
    return "\n".join(lines) + "\n"
