"""A hub's cache laid out on disk as its client does it: what was downloaded, usable offline."""

from __future__ import annotations

import hashlib
from pathlib import Path


def cache_model(home: Path, name: str, source: Path, refs: tuple[str, ...] = ("main",)) -> str:
    """Puts a model directory into the cache of an HF_HOME.

    Args:
        home: HF_HOME.
        name: owner/name.
        source: The directory whose files are the snapshot.
        refs: Branches and tags that stand for it.

    Returns:
        The snapshot's commit.
    """
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    contents = {file.name: file.read_bytes() for file in sorted(source.iterdir())}
    commit = hashlib.sha1(repr(sorted(contents.items())).encode()).hexdigest()
    snapshot = place / "snapshots" / commit
    for folder in (snapshot, place / "blobs", place / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        blob = place / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file).symlink_to(Path("..", "..", "blobs", blob.name))
    for ref in refs:
        (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return commit
