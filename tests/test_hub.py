"""The Hub, through huggingface_hub's own code: from its cache, and from an endpoint on loopback.

`FakeHub` answers the few calls that a download makes, with the real checkpoint files of a folder.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"
LOCATE = """
import sys
from resources.checkpoints import locate
from resources.errors import CheckpointError
try:
    found = locate(sys.argv[1])
    print(found.revision, sorted(path.name for path in found.folder.rglob("*") if path.is_file()))
except CheckpointError as error:
    print("refused:", error)
"""


def locate(source, **environment):
    """`locate` in a fresh process: huggingface_hub reads its variables when it is imported."""
    # Whatever this machine's own variables say must not leak in.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    result = subprocess.run(
        [sys.executable, "-c", LOCATE, source],
        env={**clean, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def cache(made_checkpoint, tmp_path):
    """A Hub cache as huggingface_hub lays it out: a commit's snapshot of links into blobs, and a ref to it."""
    root = tmp_path / "hf"
    repository = root / "hub" / "models--tiny--bert"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in made_checkpoint().iterdir():
        blob = blobs / sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../..") / "blobs" / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return root


def test_cached_snapshot_is_used_offline(cache):
    found = locate("tiny/bert", HF_HOME=cache, HF_HUB_OFFLINE=1)
    assert found.startswith(f"{COMMIT} ")
    assert "model.safetensors" in found


def test_offline_and_not_in_the_cache(cache):
    found = locate("tiny/other", HF_HOME=cache, HF_HUB_OFFLINE=1)
    assert found.startswith("refused: source: tiny/other is not in the Hub cache")
    assert "HF_HUB_OFFLINE" in found


class FakeHub(BaseHTTPRequestHandler):
    """`/api/models/<id>/revision/<revision>`, `.../tree/<revision>` and `/<id>/resolve/<commit>/<file>`, for tiny/bert alone."""

    folder: Path
    asked: list[str]

    def log_message(self, *args):
        pass

    def _send(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        self.asked.append(self.path)
        if "tiny/bert" not in self.path:
            self._send(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        elif parts[0] == "api":
            revision = parts[-1] if {"revision", "tree"} & set(parts) else "main"
            commits = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}
            if revision not in commits:
                self._send(404, b'{"error": "no such revision"}', X_Error_Code="RevisionNotFound")
                return
            if "tree" in parts:
                entries = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": COMMIT}
                    for path in sorted(self.folder.iterdir())
                ]
                self._send(200, json.dumps(entries).encode())
                return
            files = [{"rfilename": path.name} for path in sorted(self.folder.iterdir())]
            info = {"id": "tiny/bert", "modelId": "tiny/bert", "sha": commits[revision], "siblings": files, "tags": []}
            self._send(200, json.dumps({**info, "private": False, "downloads": 0, "likes": 0}).encode())
        else:
            data = (self.folder / parts[-1]).read_bytes()
            self._send(200, data, ETag=f'"{sha256(data).hexdigest()}"', X_Repo_Commit=parts[-2])

    do_HEAD = do_GET


@pytest.fixture
def hub(made_checkpoint, tmp_path):
    folder = Path(shutil.copytree(made_checkpoint(), tmp_path / "on the hub"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    handler = type("Hub", (FakeHub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_download_takes_what_is_used_and_nothing_else(hub, tmp_path):
    endpoint, asked = hub
    found = locate("tiny/bert", HF_ENDPOINT=endpoint, HF_HOME=tmp_path / "hf", HF_HUB_DISABLE_XET=1)
    assert found.startswith(f"{COMMIT} ")
    assert "model.safetensors" in found
    assert not [path for path in asked if "pytorch_model" in path or "modeling.py" in path]


def test_pinned_revision(hub, tmp_path):
    found = locate("tiny/bert@v1", HF_ENDPOINT=hub[0], HF_HOME=tmp_path / "hf", HF_HUB_DISABLE_XET=1)
    assert found.startswith(f"{OLDER} ")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("tiny/unknown", "the Hub has no model 'tiny/unknown'"), ("tiny/bert@v9", "has no revision 'v9'")],
)
def test_unknown_on_the_hub(hub, tmp_path, source, expected):
    assert expected in locate(source, HF_ENDPOINT=hub[0], HF_HOME=tmp_path / "hf", HF_HUB_DISABLE_XET=1)


def test_no_hub_at_the_endpoint(tmp_path):
    found = locate("tiny/bert", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=tmp_path / "hf")
    assert found.startswith("refused: source: tiny/bert is not in the Hub cache and cannot be fetched")
