"""What the Kubernetes executor asks of a cluster, on loopback: each job it is given runs as a process of this machine.

No scheduler and no images: where a pod would land is read in the job, which is kept as it was sent.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

_JOBS = "/apis/batch/v1/namespaces/"


class Cluster:
    """`jobs`: by the step that the job is for; `kubeconfig`: of a client; `room`: for how many jobs there is any."""

    room = 1000

    def __init__(self, address: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.kubeconfig = folder / "kubeconfig"
        self.environment = environment
        self.log = folder / "pods.log"
        parts = {"cluster": {"server": address}, "user": {}, "context": {"cluster": "here", "user": "here"}}
        named = {f"{kind}s": [{"name": "here", kind: value}] for kind, value in parts.items()}
        self.kubeconfig.write_text(yaml.safe_dump({"apiVersion": "v1", "current-context": "here", **named}))

    def start(self, job: dict[str, Any]) -> None:
        """Run the job's only container here."""
        (container,) = job["spec"]["template"]["spec"]["containers"]
        variables = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        self.jobs[variables["DAGSTER_RUN_STEP_KEY"]] = job
        if len(self.jobs) > self.room:
            raise PermissionError("exceeded quota")
        with self.log.open("ab") as log:
            self.processes[job["metadata"]["name"]] = subprocess.Popen(
                container["args"], env={**self.environment, **variables}, stdout=log, stderr=log
            )

    def status(self, name: str) -> dict[str, int]:
        code = self.processes[name].poll()
        return {"active": 1} if code is None else {"failed" if code else "succeeded": 1}


@contextmanager
def cluster(folder: Path, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """One whose pods get that environment, beside what their jobs say."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path.startswith(_JOBS) and self.path.endswith("/jobs"), self.path
            try:
                found.start(job)
            except PermissionError as error:
                self.answer({"kind": "Status", "status": "Failure", "message": str(error), "code": 403}, code=403)
                return
            self.answer(job)

        def do_GET(self) -> None:
            name = self.path.split("?")[0].split("/")[-2]
            assert self.path.startswith(_JOBS) and "/jobs/" in self.path, self.path
            self.answer({"metadata": {"name": name}, "spec": {"template": {}}, "status": found.status(name)})

        def answer(self, document: dict[str, Any], code: int = 200) -> None:
            body = json.dumps(document).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Cluster(f"http://127.0.0.1:{server.server_port}", folder, environment)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        for process in found.processes.values():
            process.kill()
            process.wait()
