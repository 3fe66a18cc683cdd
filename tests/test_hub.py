"""The Hub, through huggingface_hub's own code: from its cache, and from an endpoint on loopback.

`FakeHub` answers the few calls that a download makes, with the real checkpoint files of a folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from base64 import b64encode
from contextlib import suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

#: Where nothing listens: the discard service, port 9.
NOBODY = "http://127.0.0.1:9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"
LOCATE = """
import os, sys
from orchestration.settings import read_access
from resources.boundary import deadlines
from resources.checkpoints.sources.locating import locate
from resources.settings.sources import SourceSettings
from resources.errors import CheckpointError
try:
    deadlines.WINDOW_SECONDS = float(os.environ.get("WINDOW_SECONDS", 60))
    settings = SourceSettings(access=read_access(os.environ))
    found = locate(sys.argv[1], **{name: True for name in sys.argv[2:]}, settings=settings)
    files = (path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file())
    print(found.revision, sorted(files))
except CheckpointError as error:
    print("refused:", error)
"""


def locate(source, *allowed, **environment):
    """`locate` in a fresh process: huggingface_hub reads its variables when it is imported.

    Its answer in one line: the revision and the snapshot's files, or the refusal.
    """
    # Whatever this machine's own variables say must not leak in.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    result = subprocess.run(
        [sys.executable, "-c", LOCATE, source, *allowed],
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


def test_cached_snapshot_is_used_where_the_hub_is_down(cache):
    found = locate("tiny/bert", HF_HOME=cache, HF_ENDPOINT=NOBODY)
    assert found.startswith(f"{COMMIT} ")
    assert "model.safetensors" in found


def test_cached_pickle_is_used_offline(cache):
    """What is missing then is said by the validation, which looks at the folder."""
    (snapshot,) = cache.glob("hub/*/snapshots/*")
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    for allowed in ([], ["allow_pickle"]):
        assert "pytorch_model.bin" in locate("tiny/bert", *allowed, HF_HOME=cache, HF_HUB_OFFLINE=1)


def test_offline_and_not_in_the_cache(cache):
    found = locate("tiny/other", HF_HOME=cache, HF_HUB_OFFLINE=1)
    assert found.startswith("refused: source: tiny/other is not in the Hub cache")
    assert "HF_HUB_OFFLINE" in found


class FakeHub(BaseHTTPRequestHandler):
    """Serves `folder` as tiny/bert, whose tag v1 is an older commit, and refuses tiny/gated as the Hub does.

    Knows `/api/models/<id>/revision/<revision>`, `.../tree/<revision>` and `/<id>/resolve/<commit>/<file>`.
    """

    folder: Path
    asked: list[str]

    def _files(self):
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

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
        if "tiny/gated" in self.path:
            self._send(403, b'{"error": "Access to model tiny/gated is restricted"}', X_Error_Code="GatedRepo")
        elif "tiny/bert" not in self.path:
            self._send(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        elif parts[0] == "api":
            self._describe(parts[-1] if {"revision", "tree"} & set(parts) else "main", tree="tree" in parts)
        else:
            commit, name = parts[3], "/".join(parts[4:])
            data = (self.folder / name).read_bytes()
            self._send(200, data, ETag=f'"{sha256(data).hexdigest()}"', X_Repo_Commit=commit)

    def _describe(self, revision, tree):
        commits = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}
        if revision not in commits:
            self._send(404, b'{"error": "no such revision"}', X_Error_Code="RevisionNotFound")
            return
        sizes = {name: (self.folder / name).stat().st_size for name in self._files()}
        if tree:
            answer = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
        else:
            answer = {
                "id": "tiny/bert",
                "modelId": "tiny/bert",
                "sha": commits[revision],
                "siblings": [{"rfilename": name} for name in sizes],
                "tags": [],
                "private": False,
                "downloads": 0,
                "likes": 0,
            }
        self._send(200, json.dumps(answer).encode())

    do_HEAD = do_GET


@pytest.fixture
def hub(made_checkpoint, tmp_path):
    folder = Path(shutil.copytree(made_checkpoint(), tmp_path / "on the hub"))
    for name in (
        "1_Pooling/config.json",
        "onnx/config.json",
        "openvino/openvino_model.bin",
        "checkpoint-5/config.json",
    ):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "model.fp16.safetensors").write_bytes(b"a variant")
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    handler = type("Hub", (FakeHub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield (
        handler,
        {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": tmp_path / "hf",
            "HF_HUB_DISABLE_XET": 1,
        },
    )
    server.shutdown()
    server.server_close()
    thread.join(5)


USED = ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_download_takes_what_is_used_and_nothing_else(hub):
    handler, variables = hub
    assert locate("tiny/bert", **variables) == f"{COMMIT} {USED}"
    assert not [path for path in handler.asked if "resolve" in path and ".bin" in path]


def test_second_look_downloads_nothing(hub):
    handler, variables = hub
    locate("tiny/bert", **variables)
    handler.asked.clear()
    assert locate("tiny/bert", **variables) == f"{COMMIT} {USED}"
    assert not [path for path in handler.asked if "resolve" in path]


def test_pinned_revision(hub):
    _, variables = hub
    assert locate("tiny/bert@v1", **variables).startswith(f"{OLDER} ")
    assert locate(f"tiny/bert@{COMMIT}", **variables).startswith(f"{COMMIT} ")


def test_code_comes_only_where_it_is_trusted(hub):
    _, variables = hub
    assert "modeling.py" in locate("tiny/bert", "trust_remote_code", **variables)


def test_pickles_come_only_where_they_are_allowed_and_needed(hub):
    handler, variables = hub
    assert "pytorch_model.bin" not in locate("tiny/bert", "allow_pickle", **variables)
    (handler.folder / "model.safetensors").unlink()
    refusal = locate("tiny/bert@v1", **variables)
    assert refusal.startswith("refused: source: tiny/bert@v1: its weights are a pickle.")
    assert "allow_pickle: true" in refusal
    assert "pytorch_model.bin" in locate("tiny/bert@v1", "allow_pickle", **variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("tiny/unknown", "the Hub has no model 'tiny/unknown'"),
        ("tiny/bert@v9", "has no revision 'v9'"),
        ("tiny/gated", "tiny/gated is gated. Ask for access on its page, then set HF_TOKEN"),
    ],
)
def test_refused_by_the_hub(hub, source, expected):
    answer = locate(source, **hub[1])
    assert answer.startswith("refused: source: ")
    assert expected in answer


def test_no_hub_at_the_endpoint(tmp_path):
    found = locate("tiny/bert", "allow_pickle", HF_ENDPOINT=NOBODY, HF_HOME=tmp_path / "hf")
    assert found.startswith("refused: source: tiny/bert is not in the Hub cache and cannot be fetched")
    assert "Check the network" in found


def dripping(self, code, body=b"", **headers):
    """As FakeHub's `_send`, but of the weights a few bytes a second."""
    if self.command == "HEAD" or not self.path.endswith(".safetensors"):
        FakeHub._send(self, code, body, **headers)
        return
    self.send_response(code)
    for name, value in headers.items():
        self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    with suppress(OSError):  # whoever asked gives up
        for byte in body:
            self.wfile.write(bytes([byte]))
            time.sleep(0.2)


def test_a_download_that_drips_is_given_up(hub):
    handler, variables = hub
    handler._send = dripping
    began = time.monotonic()
    answer = locate("tiny/bert", **variables, WINDOW_SECONDS=5)
    assert time.monotonic() - began < 60
    assert re.search(
        r"tiny/bert is not in the Hub cache and cannot be fetched: only [\d,]+ bytes arrived in \d+ s, less than "
        r"10,000 bytes a second\. Check the network",
        answer,
    )
    handler._send = FakeHub._send
    assert locate("tiny/bert", **variables) == f"{COMMIT} {USED}", "what was begun is no hindrance"


def test_a_mirror_is_asked_with_the_password_of_its_address(hub):
    handler, variables = hub
    found = []
    handler.parse_request = lambda self: (
        FakeHub.parse_request(self) and not found.append((self.headers["Authorization"], self.path))
    )
    address = variables["HF_ENDPOINT"].replace("//", "//canary-name:canary-pass@")
    assert locate("tiny/bert", **{**variables, "HF_ENDPOINT": address}) == f"{COMMIT} {USED}"
    # huggingface_hub asks for more than the model, and that as nobody.
    assert {one for one, path in found if "tiny/bert" in path} == {
        f"Basic {b64encode(b'canary-name:canary-pass').decode()}"
    }
    refusal = locate("tiny/other", **{**variables, "HF_ENDPOINT": address})
    assert "canary" not in refusal


@pytest.mark.parametrize("name", ["../x.json", "../../../../x.json", "a/../../x.json", "/x.json"])
def test_names_of_the_hub_that_lead_out_of_its_snapshot(hub, tmp_path, monkeypatch, name):
    """huggingface_hub itself refuses them, or keeps them inside of its cache's snapshot."""
    handler, variables = hub
    monkeypatch.setattr(handler, "_files", lambda self: ["config.json", name])
    monkeypatch.setattr(handler, "folder", tmp_path / "served" / "a" / "b" / "c" / "d")
    for folder in (handler.folder, handler.folder.parent, tmp_path / "served"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x.json").write_text("{}")
    (handler.folder / "config.json").write_text("{}")
    answer = locate("tiny/bert", **variables)
    snapshot = tmp_path / "hf" / "hub" / "models--tiny--bert" / "snapshots" / COMMIT
    written = [path for path in (tmp_path / "hf").rglob("x.json") if snapshot not in path.parents]
    assert not written, answer
