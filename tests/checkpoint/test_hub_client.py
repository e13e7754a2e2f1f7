"""The hub's real client against a small server: what it asks for, downloads and says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.families import tiny

COMMIT, TOKEN = "c" * 40, "hf_secret"
SCRIPT = """
import json, sys
from pathlib import Path
from mctk.checkpoint import open_source
from mctk.errors import UserError

def tried(name, **options):
    try:
        source = open_source(name, **options)
    except UserError as error:
        return str(error)
    files = sorted(p.name for p in source.path.rglob("*") if p.is_file())
    return {"commit": source.commit, "files": files, "tensors": len(source.tensors),
            "place": str(source.path)}

found = {"plan": tried("owner/name@v1", weights=False), "read": tried("owner/name@v1")}
found |= {name: tried(name) for name in ("owner/gone", "owner/gated", "owner/name@v9")}
print(json.dumps(found))
"""


class Server(ThreadingHTTPServer):
    """Serves one repository, and refuses others as the hub does.

    Attributes:
        stored: The repository's files.
        seen: Paths that were asked for, and the tokens that came with them.
    """

    def __init__(self, stored: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stored = stored
        self.seen: list[tuple[str, str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, path, self.headers.get("Authorization")))
        if "owner/gone" in path:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "owner/gated" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == "/api/models/owner/name/revision/v1":
            self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT}).encode())
        elif path.startswith("/api/models/owner/name/revision/"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            files = [p for p in sorted(self.server.stored.rglob("*")) if p.is_file()]
            tree = [
                {
                    "type": "file",
                    "path": str(p.relative_to(self.server.stored)),
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in files
            ]
            self.answer(200, json.dumps(tree).encode())
        elif found := re.fullmatch(rf"/owner/name/resolve/{COMMIT}/(.+)", path):
            file = self.server.stored / found[1]
            if file.is_file():
                self.file(file)
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(404, b"{}")

    def file(self, file: Path) -> None:
        content = file.read_bytes()
        tags = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            tags["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], tags)
        else:
            self.answer(200, content, tags)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    stored = tmp_path / "stored"
    tiny("mixtral").save_pretrained(stored, max_shard_size="40kB")
    for name in ("pytorch_model.bin", "original/params.json", "consolidated.safetensors"):
        (stored / name).parent.mkdir(exist_ok=True)
        (stored / name).write_bytes(b"{}")
    server = Server(stored)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_real_client(server, tmp_path):
    """One process for all: the client reads its environment when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plan, read = found["plan"], found["read"]
    assert plan["commit"] == read["commit"] == COMMIT
    assert plan["place"] == read["place"] and plan["place"].startswith(str(tmp_path / "home"))
    shards = {p.name for p in server.stored.glob("model-*.safetensors")}
    assert len(shards) > 1 and not shards & set(plan["files"])
    assert set(read["files"]) == set(plan["files"]) | shards
    assert plan["tensors"] == read["tensors"] > 0
    asked = " ".join(path for _, path, _ in server.seen)
    for name in ("pytorch_model.bin", "original/", "consolidated.safetensors"):
        assert name not in asked
    tokens = {token for _, path, token in server.seen if "owner/" in path}
    assert tokens == {f"Bearer {TOKEN}"}
    assert asked.count("/revision/v1") == 2  # once for each that opens it

    assert "the hub has no model owner/gone; check the name." in found["owner/gone"]
    assert "owner/gated is gated: ask for access at " in found["owner/gated"]
    assert "owner/name has no branch, tag or commit 'v9'" in found["owner/name@v9"]
