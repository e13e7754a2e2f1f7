"""A run's directory: lock, manifest, what is finished and what is not.

The manifest is the only word on what is done. A layer's shard is on disk, whole and synced, before
the manifest names it; so a run that is killed at any moment finds the last finished layer again and
works on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UserError
from ..files import file_digest, write_json

FORMAT = 1
STATE = ".mctk"


class Workspace:
    """The output directory of one run.

    Args:
        output: The directory; made if it does not exist.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.state = output / STATE
        self._lock = FileLock(str(self.state / "lock"))
        self.manifest: dict[str, Any] = {}

    @property
    def manifest_path(self) -> Path:
        """Where the manifest lies."""
        return self.state / "manifest.json"

    def open(self, identity: dict[str, Any], commit: str | None = None) -> None:
        """Takes the lock and reads or begins the manifest.

        Args:
            identity: All that the run's result depends on.
            commit: The hub model's, to be told should it be another one next time.

        Raises:
            UserError: The directory holds something else, another run's state, or a run at work.
        """
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"output: {self.output} is a file, not a directory")
        foreign = self.output.is_dir() and any(self.output.iterdir()) and not self.state.is_dir()
        if foreign:
            raise UserError(
                f"output: {self.output} is not empty and holds no run of mctk; choose another one"
            )
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"output: another run is at work in {self.output}") from None
        for leftover in [*self.output.glob(".*.tmp"), *self.state.glob(".*.tmp")]:
            leftover.unlink()  # of a run that was killed while it wrote
        try:
            self._read(identity, commit)
        except BaseException:
            self.close()
            raise

    def _read(self, identity: dict[str, Any], commit: str | None) -> None:
        import json

        if not self.manifest_path.exists():
            self.manifest = {
                "format": FORMAT,
                "identity": identity,
                "commit": commit,
                "sizes": None,
                "layers": {},
                "outer": None,
                "finished": False,
            }
            self.save()
            return
        try:
            self.manifest = json.loads(self.manifest_path.read_text())
            known, found = self.manifest["identity"], self.manifest["format"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.manifest_path}: is damaged: {error!r}") from error
        if found != FORMAT:
            raise UserError(f"{self.manifest_path}: format {found}, this mctk knows {FORMAT}")
        difference = first_difference(known, json.loads(json.dumps(identity)))
        began = self.manifest.get("commit")
        if difference.startswith("model:") and commit and began and commit != began:
            raise UserError(
                f"output: the model has moved on the hub, from commit {began}, with which the run "
                f"in {self.output} began, to {commit}; write model: name@{began} to go on, or "
                "choose another --output"
            )
        if difference:
            raise UserError(
                f"output: {self.output} holds another run ({difference}); choose another "
                "--output, or delete it"
            )

    def close(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def save(self) -> None:
        """Writes the manifest atomically."""
        write_json(self.manifest_path, self.manifest)

    def record(self, index: int) -> dict[str, Any] | None:
        """The record of a finished layer whose shard is intact, or None."""
        return self._intact(self.manifest["layers"].get(str(index)))

    def outer(self) -> dict[str, Any] | None:
        """The record of the outer shard, if it is written and intact."""
        return self._intact(self.manifest["outer"])

    def reopen_if_damaged(self, layers: int) -> bool:
        """Makes a finished run unfinished if one of its shards is gone or damaged.

        Returns:
            Whether it was.
        """
        if not self.manifest["finished"]:
            return False
        if self.outer() is not None and all(self.record(i) is not None for i in range(layers)):
            return False
        self.manifest |= {"finished": False, "evaluated": ""}
        self.save()
        return True

    def _intact(self, record: dict[str, Any] | None) -> dict[str, Any] | None:
        if record is None:
            return None
        path = self.output / record["file"]
        if not path.exists() or path.stat().st_size != record["size"]:
            return None
        return record if file_digest(path) == record["sha256"] else None

    def add_layer(self, index: int, record: dict[str, Any]) -> None:
        """Records a layer whose shard is written."""
        self.manifest["layers"][str(index)] = self._sealed(record)
        self.save()

    def add_outer(self, record: dict[str, Any]) -> None:
        """Records the shard of embeddings and head."""
        self.manifest["outer"] = self._sealed(record)
        self.save()

    def _sealed(self, record: dict[str, Any]) -> dict[str, Any]:
        path = self.output / record["file"]
        return {**record, "size": path.stat().st_size, "sha256": file_digest(path)}


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """Names the first place where two JSON values differ; "" if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            found = first_difference(a, b, f"{path}.{i}")
            if found:
                return found
        return ""
    if old == new:
        return ""
    shown = (str(value)[:40] for value in (old, new))
    return "{}: {} there, {} now".format(path, *shown)
