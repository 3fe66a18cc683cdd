"""Sources of checkpoints: the smallest that pass for one, and servers on loopback that play the Hub and MLflow."""

from __future__ import annotations

import json
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

from resources.artifacts.records import Checkpoint
from resources.settings.workspace import Workspace

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """All that is looked at before a run: configuration, tokenizer, and one number that stands for the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 2, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    write_weights(folder, seed)
    return folder


def write_weights(folder: Path, seed: int, name: str = "model.safetensors") -> None:
    """The same number of bytes for every seed."""
    header = json.dumps({"w": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<q", seed))


class Answers(BaseHTTPRequestHandler):
    """Answers as `answer` says: a status, a document, and headers. `asked`: paths and headers, in order."""

    answer: Callable[[str], tuple[int, object, dict[str, str]]]
    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        code, document, headers = type(self).answer(self.path)
        body = json.dumps(document).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(
    answer: Callable[[str], tuple[int, object, dict[str, str]]],
    certificates: Path | None = None,
) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """A server's address, and what it was asked. certificates: of conftest.py, for a server over TLS."""
    asked: list[tuple[str, dict[str, str]]] = []
    handler = type("Handler", (Answers,), {"answer": staticmethod(answer), "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "certificate.pem", certificates / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http{'s' if certificates else ''}://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


def collect(workspace: Workspace, model: str, source: Path | str, revision: str) -> None:
    """What the step `checkpoint` leaves behind."""
    record = Checkpoint(
        digest=uuid4().hex,
        model=model,
        source=str(source),
        revision=revision,
        task="embedding",
        architecture="BertModel",
        weights_digest="w",
        weights_bytes=8,
        tokenizer_digest="t",
        labels_digest="l",
        pipeline_digest="p",
        output="sentence_embedding",
        settings={},
        max_tokens=64,
    )
    store = workspace.store
    store.point(f"checkpoint/{model}", store.get_or_make(Checkpoint, record.digest, lambda folder: record).record)
