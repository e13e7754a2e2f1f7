"""Make the demo model's text: four domains, split into train, calibration and test by document.

The sources are files of Debian packages, so anyone can fetch the same bytes. Installing the
packages works as well as unpacking them with ``dpkg-deb -x`` into the folder given as ``--root``.
Writes ``train/<domain>.jsonl``, ``calibration/<domain>.jsonl`` and ``test/<domain>.jsonl`` with one
``{"text": ...}`` object a line, and ``text.json`` with counts and SHA-256 sums.
"""

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "wordnet-base python3.11-doc libpython3.11-minimal libpython3.11-stdlib"
    " bible-kjv bible-kjv-text"
)
DOMAINS = ("wordnet", "docs", "code", "bible")
Document = tuple[str, str]  # (name within the domain, text)

SYNSETS_PER_DOCUMENT = 40
# Longer documents go to training whole: a few of them would fill a held-out part by themselves.
LONGEST_HELD_OUT = 40_000
# Paragraphs at least this long are kept once over all parts (licence headers, shared boilerplate).
DUPLICATE_PARAGRAPH = 120

PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
# Character tables and generated data, which are Python in name only, and other people's packages.
CODE_SKIPPED = ("encodings/", "pydoc_data/", "test/", "dist-packages/", "_sysconfigdata")
# The licence texts themselves and a change log of more than ten thousand one-line entries.
DOCS_SKIPPED = ("license.rst", "copyright.rst", "whatsnew/changelog.rst")


def wordnet_documents(root: Path) -> Iterator[Document]:
    """Glosses with their words and examples; neighbours of one lexicographer file together."""
    for suffix, part_of_speech in PARTS_OF_SPEECH.items():
        entries: dict[str, list[str]] = {}
        data = (root / "usr/share/wordnet" / f"data.{suffix}").read_text(encoding="latin-1")
        for line in data.splitlines():
            if line.startswith("  "):  # the licence at the top of the file
                continue
            fields, gloss = line.split(" | ", 1)
            columns = fields.split()
            count = int(columns[3], 16)
            words = [columns[4 + 2 * i].replace("_", " ") for i in range(count)]
            words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in words]
            entry = f"{', '.join(words)} ({part_of_speech}): {gloss.strip()}"
            entries.setdefault(columns[1], []).append(entry)
        for lexfile, lines in entries.items():
            for start in range(0, len(lines), SYNSETS_PER_DOCUMENT):
                group = lines[start : start + SYNSETS_PER_DOCUMENT]
                yield f"{suffix}.{lexfile}.{start}", "\n".join(group)


def docs_documents(root: Path) -> Iterator[Document]:
    """The reStructuredText sources of Python's documentation, a file each."""
    base = root / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(base.rglob("*.rst.txt")):
        name = path.relative_to(base).as_posix()
        if not name.startswith(DOCS_SKIPPED):
            yield name, path.read_text(encoding="utf-8")


def code_documents(root: Path) -> Iterator[Document]:
    """Python's standard library, a file each."""
    base = root / "usr/lib/python3.11"
    for path in sorted(base.rglob("*.py")):
        name = path.relative_to(base).as_posix()
        if path.is_symlink() or name.startswith(CODE_SKIPPED):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few files declare another encoding
            continue
        # One module says it is offered under the GPL as well; leave such files out.
        if "GPL" not in text:
            yield name, text


def bible_documents(root: Path) -> Iterator[Document]:
    """The King James Bible, a chapter each, verses numbered."""
    command = [root / "usr/bin/bible", "-p", f"{root}/usr/lib/", "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        reference, verse = line.split(" ", 1)
        chapter, number = reference.split(":")
        chapters.setdefault(chapter, []).append(f"{number} {verse}")
    for chapter, verses in chapters.items():
        yield chapter, "\n".join(verses)


READERS = {
    "wordnet": wordnet_documents,
    "docs": docs_documents,
    "code": code_documents,
    "bible": bible_documents,
}


def clean(text: str) -> str:
    """Unix line ends, no trailing blanks, no runs of empty lines."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\f", "").split("\n")]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip()


def read_domain(domain: str, root: Path, salt: str) -> list[str]:
    """A domain's documents without exact duplicates, in the order of their salted hashes."""
    by_hash: dict[str, str] = {}
    seen: set[str] = set()
    for name, raw in READERS[domain](root):
        text = clean(raw)
        if len(text) < 200 or text in seen:
            continue
        seen.add(text)
        by_hash[hashlib.sha256(f"{salt}/{domain}/{name}".encode()).hexdigest()] = text
    if not by_hash:
        raise SystemExit(f"no {domain} documents below {root}: are the packages there? {PACKAGES}")
    return [by_hash[key] for key in sorted(by_hash)]


def split(documents: list[str], sizes: dict[str, int]) -> dict[str, list[str]]:
    """Fill test, then calibration, up to their sizes in bytes; all the rest is for training."""
    parts: dict[str, list[str]] = {"test": [], "calibration": [], "train": []}
    filled = dict.fromkeys(sizes, 0)
    for text in documents:
        size = len(text.encode())
        open_parts = [part for part in sizes if filled[part] + size / 2 < sizes[part]]
        if size <= LONGEST_HELD_OUT and open_parts:
            parts[open_parts[0]].append(text)
            filled[open_parts[0]] += size
        else:
            parts["train"].append(text)
    return parts


def drop_repeats(texts: list[str], seen: set[str]) -> list[str]:
    """Leave out long paragraphs met before; ``seen`` goes on from part to part."""
    kept = []
    for text in texts:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= DUPLICATE_PARAGRAPH:
                if key in seen:
                    continue
                seen.add(key)
            paragraphs.append(paragraph)
        if rest := "\n\n".join(paragraphs).strip():
            kept.append(rest)
    return kept


def main() -> None:
    """Read the four sources and write the twelve files and their sums."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Debian packages: {PACKAGES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages are")
    parser.add_argument("--out", type=Path, required=True, help="folder of calibration/ and test/")
    parser.add_argument("--train-out", type=Path, required=True, help="folder of train/")
    parser.add_argument("--salt", default="mctk-demo-1", help="of the hash that splits")
    parser.add_argument("--test-bytes", type=int, default=125_000, help="per domain")
    parser.add_argument("--calibration-bytes", type=int, default=260_000, help="per domain")
    args = parser.parse_args()

    sizes = {"test": args.test_bytes, "calibration": args.calibration_bytes}
    split_texts = {
        domain: split(read_domain(domain, args.root, args.salt), sizes) for domain in DOMAINS
    }
    seen: set[str] = set()
    report: dict[str, dict[str, dict[str, int | str]]] = {}
    # Held-out parts first: they stay whole, and training loses what it would share with them.
    for part in ("test", "calibration", "train"):
        folder = (args.train_out if part == "train" else args.out) / part
        folder.mkdir(parents=True, exist_ok=True)
        for domain in DOMAINS:
            texts = drop_repeats(split_texts[domain][part], seen)
            rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
            data = "".join(rows).encode()
            (folder / f"{domain}.jsonl").write_bytes(data)
            report.setdefault(part, {})[domain] = {
                "documents": len(texts),
                "bytes": sum(len(text.encode()) for text in texts),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    summary = {"salt": args.salt, "packages": PACKAGES.split(), "parts": report}
    (args.out / "text.json").write_text(json.dumps(summary, indent=1) + "\n")
    for part, domains in report.items():
        for domain, counts in domains.items():
            print(f"{part:12}{domain:9}{counts['documents']:6} documents{counts['bytes']:10} bytes")


if __name__ == "__main__":
    main()
