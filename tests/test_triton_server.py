"""Releases on the real Triton: what it answers, what it refuses, and how it comes, changes and goes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from orchestration.cli import main
from orchestration.cli import serving as serving_module
from resources.errors import ReleaseError, ServerError
from resources.pipelines.tokenization import TextEncoder
from resources.triton import foreground, watch
from resources.triton.client import TextClient
from resources.triton.exam import fleet_steps
from resources.triton.fleet import Fleet
from resources.triton.layout import CONFIG, current_release
from resources.triton.proof import prove
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from tests.foreground import serving, wait_until
from tests.releases import (
    LABELS,
    WIDTH,
    answers_of,
    ask_together,
    exam_of,
    make_plan,
    query_texts,
    release_digest,
    tree_digest,
    unasked,
)

ROOT = Path(__file__).resolve().parents[1]
UNASKED = Steps(prove=unasked)
OUTPUT = "sentence_embedding"
TEXTS = ("How long should I boil the eggs?", "", " ", "naïve 🙂", "word " * 500, "Eggs.")


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return [make_plan(folder, seed=seed) for seed in range(2)]


def prove_embedded(settings, exam, log):
    """The step that publishing takes where no server is configured."""

    def step(staged, release):
        with EmbeddedServer(staged, settings, models=[release.model], log=log) as server:
            return prove(exam, release.model, grpc=server.grpc_address, http=server.http_address)

    return Steps(prove=step)


@pytest.fixture(scope="module")
def published(tmp_path_factory, plans, triton_settings):
    """A repository with release 1, proven for good, and what publishing returned. Not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    steps = prove_embedded(triton_settings, exam_of(plans[0]), folder / "proof.log")
    return folder / "cpu", publish(plans[0], folder / "cpu", steps)


@pytest.fixture(scope="module")
def served(published, triton_settings, tmp_path_factory):
    """A server of that repository. Not to be changed."""
    log = tmp_path_factory.mktemp("served") / "triton.log"
    with EmbeddedServer(published[0], triton_settings, models=["tiny"], log=log) as server:
        yield server


@pytest.fixture
def repository(published, tmp_path):
    """A copy of the repository, to be changed."""
    return Path(shutil.copytree(published[0], tmp_path / "models" / "cpu"))


def test_a_release_is_published_once_a_server_has_answered(published):
    repository, result = published
    assert result.changed
    release = result.release
    assert release.status == "published"
    assert release.proof.passed
    assert release.proof.items >= 64
    assert release.proof.server == "triton 2.51.0"
    assert set(release.proof.metrics) == {
        f"{protocol}, {how}" for protocol in ("grpc", "http") for how in ("one by one", "in batches", "6 threads")
    } | {"grpc, beside invalid bytes"}
    assert all(metrics["cosine_worst"] > 0.999999 for metrics in release.proof.metrics.values())
    assert current_release(repository, "tiny") == release
    # Serving changed nothing, not even by a cache file.
    assert set(release.files) == {
        path.relative_to(repository).as_posix() for path in repository.glob("tiny__r1__*/**/*") if path.is_file()
    }


def test_a_release_names_no_path_of_the_machine_that_made_it(published, plans):
    repository, _ = published
    places = (repository.parent, plans[0].engine_folder.parent, ROOT, Path(sys.prefix), Path.home() / ".cache")
    for path in repository.rglob("*"):
        # The paths in a compiled library are those of the machine that built its wheel.
        if path.is_file() and path.suffix != ".so":
            content = path.read_bytes()
            assert not any(str(place).encode() in content for place in places), path


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_what_is_served_is_what_the_engine_answers(served, plans, protocol):
    address = served.grpc_address if protocol == "grpc" else served.http_address
    np.testing.assert_allclose(
        query_texts(address, "tiny", TEXTS, protocol), answers_of(plans[0], TEXTS), rtol=0, atol=1e-6
    )
    with TextClient(address, protocol) as client:
        together = ask_together(client, TEXTS)
    np.testing.assert_allclose(together, answers_of(plans[0], TEXTS), rtol=0, atol=1e-6)


def test_plain_json_as_curl_sends_it(served, plans):
    question = {"inputs": [{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": [TEXTS[0]]}]}
    request = urllib.request.Request(
        f"http://{served.http_address}/v2/models/tiny/infer", data=json.dumps(question).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - http, a few lines above
        outputs = {output["name"]: output for output in json.load(response)["outputs"]}
    answer = outputs["sentence_embedding"]
    assert answer["shape"] == [1, WIDTH]
    np.testing.assert_allclose(answer["data"], answers_of(plans[0], TEXTS[:1])[0], rtol=0, atol=1e-6)


def test_a_request_that_is_wrong_fails_alone(served, plans):
    """Invalid text, too many rows, a wrong shape: refused with a reason, while others around them are answered."""
    right = answers_of(plans[0], TEXTS)

    def ask(number):
        with served.client() as client:
            if number % 3 == 0:
                return ask_together(client, list(TEXTS))
            with pytest.raises(ServerError) as caught:
                if number % 3 == 1:
                    ask_together(client, ["fine", b"\xc3\x28 and \xff"])
                else:
                    ask_together(client, ["x"] * 9)
            return str(caught.value)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(120)))
    for number, answer in enumerate(answers):
        if number % 3 == 0:
            np.testing.assert_allclose(answer, right, rtol=0, atol=1e-6)
        else:
            assert ("a text is not valid UTF-8" if number % 3 == 1 else "batch-size must be <= 8") in answer


def test_what_the_engine_cannot_compute_fails_alone(repository, plans, triton_settings, tmp_path):
    """Rows of one length run together; whoever is in the same batch must not notice."""
    texts = ["one two three", "four five six", "a b", "seven eight nine"]
    encoder = TextEncoder.from_folder(str(plans[0].checkpoint_folder))
    (bad,) = encoder.tokens([texts[1]])
    model = repository / "tiny__r1__pipeline" / "1" / "model.py"
    line = "    def _infer(self, arrays):\n"
    assert line in model.read_text()
    refuse = f"        if (arrays['input_ids'] == {bad.ids[1]}).any():\n            raise ValueError('no such id')\n"
    model.write_text(model.read_text().replace(line, line + refuse))
    right = answers_of(plans[0], texts)
    with (
        EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "log") as server,
        server.client() as client,
    ):

        def ask(number):
            try:
                return ask_together(client, [texts[number % 4]])[0]
            except ServerError as error:
                return str(error)

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(80)))
    for number, answer in enumerate(answers):
        if number % 4 == 1:
            assert "no such id" in answer
        else:
            np.testing.assert_allclose(answer, right[number % 4], rtol=0, atol=1e-6)


def test_what_a_person_reads_when_nothing_answers(served, unused_port):
    with pytest.raises(ServerError, match=r"does not serve other: .*refinery serve"):
        query_texts(served.grpc_address, "other", ["x"])
    with pytest.raises(ServerError, match=rf"No Triton answers gRPC at 127\.0\.0\.1:{unused_port} .*refinery serve"):
        query_texts(f"127.0.0.1:{unused_port}", "tiny", ["x"])
    with pytest.raises(ServerError, match="No Triton answers HTTP at"):
        query_texts(f"127.0.0.1:{unused_port}", "tiny", ["x"], "http")


def test_classification_with_weights_beside_the_graph(tmp_path, triton_settings):
    import tritonclient.grpc as triton

    plan = make_plan(tmp_path / "plan", labels=LABELS, external_data=True, max_batch_size=1)
    release = publish(plan, tmp_path / "cpu", UNASKED).release
    assert release.labels == LABELS
    with EmbeddedServer(tmp_path / "cpu", triton_settings, models=["tiny"], log=tmp_path / "triton.log") as server:
        assert prove(exam_of(plan), "tiny", grpc=server.grpc_address, http=server.http_address).passed
        answers = query_texts(server.grpc_address, "tiny", TEXTS)
        client = triton.InferenceServerClient(server.grpc_address)
        tensor = triton.InferInput("TEXT", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[TEXTS[0].encode()]], dtype=np.object_))
        wanted = [triton.InferRequestedOutput("probabilities", class_count=3)]
        named = client.infer("tiny", [tensor], outputs=wanted, client_timeout=30).as_numpy("probabilities").ravel()
        client.close()
    np.testing.assert_allclose(answers, answers_of(plan, TEXTS), rtol=0, atol=1e-6)
    order = np.argsort(-answers[0])
    assert [item.decode().split(":", 2)[2] for item in named] == [LABELS[index] for index in order]


def test_an_engine_that_answers_otherwise_is_not_published(repository, plans, triton_settings, tmp_path):
    before = tree_digest(repository)
    steps = prove_embedded(triton_settings, exam_of(plans[1], reference_of=plans[0]), tmp_path / "proof.log")
    with pytest.raises(ReleaseError) as caught:
        publish(plans[1], repository, steps)
    assert "release 2 (table, revision 0123456789abcdef) was not published" in str(caught.value)
    assert "grpc, one by one: cosine_mean" in str(caught.value)
    assert tree_digest(repository) == before


#: Faults of a server, each by the code that it replaces, and what the proof says of it (a pattern).
SABOTAGE = {
    "requests that share an execution get each other's answers": (
        ("self._answer(asked, requests)]", "self._answer(asked, requests)[::-1]]"),
        r"(6 threads|beside invalid bytes): cosine_|answered \d+ rows with float32",
    ),
    "rows of a batch are mixed up": (("np.stack(answers)", "np.stack(answers[::-1])"), "in batches: cosine_"),
    "an answer that is not finite": (
        (
            "        cut = [",
            "        numbers[np.array([row.tokens < 3 for row in rows])] = np.nan\n"
            "        return list(numbers)\n        cut = [",
        ),
        "'' was answered with NaN or infinity",
    ),
    "an answer of another width": (("np.stack(answers)", "np.stack(answers)[:, :5]"), r"an answer of shape \(5,\)"),
    "an answer of another type": (
        ("np.stack(answers)", "np.stack(answers).astype(np.float64)"),
        r"with float64 \[1, 24\] as 'sentence_embedding'",
    ),
    "text that is no text is answered": (
        ('decode("utf-8")', 'decode("utf-8", "replace")'),
        "bytes that are not UTF-8 were not refused as such",
    ),
    "text that is no text takes others with it": (
        ("asked = [attempt(self._read, request)", "asked = [self._read(request)"),
        "codec can't decode",
    ),
}


def test_a_proof_finds_what_is_wrong_with_a_server(plans, triton_settings, tmp_path):
    repository = tmp_path / "cpu"
    sound, *_ = names = [f"model-{number}" for number in range(len(SABOTAGE) + 1)]
    for name, fault in zip(names, [None, *SABOTAGE.values()], strict=True):
        publish(replace(plans[0], model=name), repository, UNASKED)
        if fault is not None:
            line, changed = fault[0]
            folder = repository / f"{name}__r1__pipeline" / "1"
            (model,) = (file for file in (folder / "answering.py", folder / "reading.py") if line in file.read_text())
            model.write_text(model.read_text().replace(line, changed))
    exam = exam_of(plans[0])
    with EmbeddedServer(repository, triton_settings, models=names, log=tmp_path / "log") as server:
        proofs = [prove(exam, name, grpc=server.grpc_address, http=server.http_address) for name in names]
        small = prove(replace(exam, max_batch_size=4), sound, grpc=server.grpc_address, http=None)
    assert proofs[0].passed, proofs[0].failures
    for (fault, (_, words)), proof in zip(SABOTAGE.items(), proofs[1:], strict=True):
        assert not proof.passed, fault
        assert any(re.search(words, failure) for failure in proof.failures), (fault, proof.failures)
    assert small.failures == ("grpc: a batch of 5 was not refused",)


def test_an_engine_that_cannot_be_loaded_is_not_published(repository, plans, triton_settings, tmp_path):
    broken = shutil.copytree(plans[1].engine_folder, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no graph at all")
    engine = plans[1].engine.with_files(broken)
    before = tree_digest(repository)
    steps = prove_embedded(triton_settings, exam_of(plans[1]), tmp_path / "proof.log")
    with pytest.raises(ServerError, match=r"(?s)The embedded Triton ended while starting:.*tiny__r2__pipeline"):
        publish(replace(plans[1], engine=engine, engine_folder=broken), repository, steps)
    assert tree_digest(repository) == before


def test_a_running_server_proves_and_takes_up_a_release(repository, plans, triton_settings, tmp_path):
    """What happens where REFINERY_TRITON_GRPC names a server of this repository."""
    first = release_digest(repository, "tiny", 1)
    with (
        EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "triton.log") as server,
        Fleet(replace(triton_settings, servers=(server.grpc_address,), connection=server.connection)) as fleet,
    ):
        http = [server.http_address]
        # A release that fails: the server holds and answers what it did before, and no trace is left.
        before = tree_digest(repository)
        wrong = fleet_steps(fleet, lambda: exam_of(plans[1], plans[0]), repository, http=http)
        with pytest.raises(ReleaseError, match="cosine_mean"):
            publish(plans[1], repository, wrong)
        assert tree_digest(repository) == before
        with server.client() as client:
            assert client.is_ready("tiny__r1__pipeline")
            assert not any(client.is_ready(f"tiny__r2__{part}") for part in ("tokenizer", "engine", "proof"))
        np.testing.assert_allclose(
            query_texts(server.grpc_address, "tiny", TEXTS), answers_of(plans[0], TEXTS), rtol=0, atol=1e-6
        )
        # The number that servers have seen is not given out again.
        steps = fleet_steps(fleet, lambda: exam_of(plans[1]), repository, http=http)
        assert publish(plans[1], repository, steps).release.number == 3
        np.testing.assert_allclose(
            query_texts(server.grpc_address, "tiny", TEXTS), answers_of(plans[1], TEXTS), rtol=0, atol=1e-6
        )
        with server.client() as client:
            assert not client.is_ready("tiny__r3__proof")
            assert client.is_ready("tiny__r3__pipeline")
        assert not list(repository.glob("*__proof"))
        assert release_digest(repository, "tiny", 1) == first
        # What a killed publisher had loaded is unloaded by the next.
        shutil.copytree(repository / "tiny__r1__pipeline", repository / "tiny__r7__pipeline")
        config = repository / "tiny__r7__pipeline" / CONFIG
        config.write_text(config.read_text().replace("__r1__", "__r7__"))
        with server.client() as client:
            client.load("tiny__r7__pipeline")
            assert client.is_ready("tiny__r7__pipeline")
            assert publish(plans[1], repository, steps).changed is False
            assert not client.is_ready("tiny__r7__pipeline")
    assert not (repository / "tiny__r7__pipeline").exists()


def test_a_repository_whose_path_a_shell_would_not_take(plans, triton_settings, tmp_path):
    repository = tmp_path / "my models; $(touch here) 'new'" / "cpu"
    publish(plans[0], repository, UNASKED)
    with EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "triton.log") as server:
        np.testing.assert_allclose(
            query_texts(server.grpc_address, "tiny", TEXTS), answers_of(plans[0], TEXTS), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("option", ["http_port", "grpc_port", "metrics_port"])
def test_a_port_in_use_is_named_with_its_option(published, triton_settings, tmp_path, option):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = EmbeddedServer(published[0], triton_settings, models=["tiny"], log=tmp_path / "log", **{option: port})
        with pytest.raises(ServerError) as caught, server:
            pass
    assert f"Port {port} of 127.0.0.1 cannot be used: Address already in use" in str(caught.value)
    assert "--" + option.replace("_", "-") in str(caught.value)


def test_a_port_that_is_given_twice(published, triton_settings, tmp_path, unused_port):
    ports = {"http_port": unused_port, "metrics_port": unused_port}
    server = EmbeddedServer(published[0], triton_settings, models=["tiny"], log=tmp_path / "log", **ports)
    with pytest.raises(ServerError, match=f"--http-port and --metrics-port are both {unused_port}"), server:
        pass


def test_no_environment(published, triton_settings, tmp_path):
    nowhere = replace(triton_settings, environment=tmp_path / "nothing")
    with (
        pytest.raises(ServerError, match=r"embedded Triton is not installed .* Run: refinery setup"),
        EmbeddedServer(published[0], nowhere, models=["tiny"], log=tmp_path / "log"),
    ):
        pass


def members(session):
    """Processes of a server, by the session they run in."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def test_the_server_listens_on_loopback_alone(served):
    listening = {
        connection.laddr.ip
        for process in members(served.pid)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


@pytest.mark.parametrize("hanging", [False, True], ids=["idle", "in the middle of a request that hangs"])
def test_the_server_goes_with_its_caller_however_that_ends(repository, triton_settings, tmp_path, hanging):
    if hanging:
        model = repository / "tiny__r1__pipeline" / "1" / "answering.py"
        begin = "            asked = [attempt(self._read, request) for request in requests]\n"
        assert begin in model.read_text()
        # Not at once: the warm-up must get through.
        hang = f"            import os, time; os.path.exists({str(tmp_path / 'hang')!r}) and time.sleep(600)\n"
        model.write_text(model.read_text().replace(begin, hang + begin))
    code = f"""
import sys, time
from pathlib import Path
from resources.triton import launch
from resources.triton.server import EmbeddedServer
from resources.settings.triton import TritonSettings
launch.EXIT_SECONDS = 1
settings = TritonSettings(environment=Path({str(triton_settings.environment)!r}))
with EmbeddedServer(Path({str(repository)!r}), settings, models=["tiny"], log=Path({str(tmp_path / "log")!r})) as s:
    print(s.pid, s.grpc_address, flush=True)
    time.sleep(120)
"""
    caller = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    asking = threading.Thread(target=lambda: None)
    try:
        assert caller.stdout is not None
        session, address = caller.stdout.readline().split()
        # The supervisor, the server, and a process for each Python model.
        assert len(members(int(session))) == 3
        assert list(tmp_path.glob("refinery-triton-*"))
        if hanging:
            (tmp_path / "hang").touch()
            asking = threading.Thread(target=ask_in_vain, args=(address,))
            asking.start()
            time.sleep(1)
            assert asking.is_alive()
        caller.send_signal(signal.SIGKILL)
        wait_until(lambda: not members(int(session)))
        assert not list(tmp_path.glob("refinery-triton-*"))
    finally:
        caller.kill()
        caller.wait()
        if asking.ident is not None:
            asking.join(60)


def ask_in_vain(address):
    with TextClient(address) as client, pytest.raises(ServerError):
        ask_together(client, ["x"])


def test_a_killed_server_takes_its_models_along(published, triton_settings, tmp_path):
    with EmbeddedServer(published[0], triton_settings, models=["tiny"], log=tmp_path / "log") as server:
        assert not server.ended()
        next(process for process in members(server.pid) if process.name() == "tritonserver").kill()
        wait_until(lambda: not members(server.pid))
        wait_until(server.ended)  # its supervisor tidies up first


def test_serving_takes_up_new_releases_and_rollbacks_without_a_failed_request(
    repository, plans, triton_settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(foreground, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 1.5)
    pointer = repository / "tiny" / CONFIG
    right = [answers_of(plan, TEXTS) for plan in plans]
    seen, trouble = [], []
    end = threading.Event()

    def ask_on(address):
        """Constantly, noting which release answered; an answer is whole or it is trouble."""
        with TextClient(address) as client:
            while not end.is_set():
                try:
                    answer = ask_together(client, list(TEXTS))
                except ServerError as error:
                    trouble.append(str(error))
                    continue
                same = [number for number in (1, 2) if np.allclose(answer, right[number - 1], atol=1e-5)]
                seen.extend(same)
                if not same:
                    trouble.append("an answer of no release")

    with serving(repository, triton_settings, tmp_path / "triton.log") as served:
        address, said = served.address, served.said
        clients = [threading.Thread(target=ask_on, args=(address,)) for _ in range(3)]
        for thread in clients:
            thread.start()
        try:
            wait_until(lambda: 1 in seen)
            publish(plans[1], repository, UNASKED)
            wait_until(lambda: "tiny: release 2 serves" in said)
            wait_until(lambda: seen[-1] == 2)
            # Back before release 1 was unloaded, and forward again when release 2 has gone.
            draft = repository.parent / "draft"
            shutil.copyfile(repository / "tiny" / "1" / CONFIG, draft)
            draft.replace(pointer)
            wait_until(lambda: said.count("tiny: release 1 serves") == 2)
            wait_until(lambda: seen[-1] == 1)
            with TextClient(address) as client:
                wait_until(lambda: not client.is_ready("tiny__r2__pipeline"))
                assert client.is_ready("tiny__r1__pipeline")
                shutil.copyfile(repository / "tiny" / "2" / CONFIG, draft)
                draft.replace(pointer)
                wait_until(lambda: not client.is_ready("tiny__r1__pipeline"))
                assert seen[-1] == 2
            # What cannot be loaded is said once, and release 2 goes on.
            draft.write_text("no configuration")
            draft.replace(pointer)
            wait_until(lambda: any("cannot load tiny" in line for line in said))
            time.sleep(1)
            assert seen[-1] == 2
        finally:
            end.set()
            for thread in clients:
                thread.join(60)
    assert trouble == [], said
    assert len(seen) > 50
    assert sum("cannot load tiny" in line for line in said) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_serving_ends_at_ctrl_c_and_kill(published, triton_settings, tmp_path, number):
    code = f"""
from pathlib import Path
from resources.triton.launch import Ports
from resources.triton.foreground import serve_foreground
from resources.settings.triton import TritonSettings
ports = Ports.choose(None, None, None)
serve_foreground(
    Path({str(published[0])!r}),
    TritonSettings(environment=Path({str(triton_settings.environment)!r})),
    http_port=ports.http,
    grpc_port=ports.grpc,
    metrics_port=ports.metrics,
    log=Path({str(tmp_path / "log")!r}),
    say=lambda line: print(line, flush=True),
)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "tiny: release 1 serves\n"
        assert process.stdout.readline().startswith("serving tiny: http 127.0.0.1:")
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 3
        process.send_signal(number)
        assert process.stdout.read() == "stopped\n"
        assert process.wait(30) == 0
        assert not any(child.is_running() for child in children)
    finally:
        process.kill()
        process.wait()


def test_nothing_that_could_be_served(repository, triton_settings, tmp_path):
    shutil.rmtree(repository / "tiny__r1__pipeline")
    with (
        pytest.raises(ServerError, match=r"No model of .* could be loaded; the log is .*triton\.log"),
        serving(repository, triton_settings, tmp_path / "triton.log") as served,
    ):
        pass
    assert "cannot load tiny" in served.said[0]


def test_an_empty_repository_is_served_until_its_first_release_comes(plans, triton_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(foreground, "WATCH_SECONDS", 0.1)
    repository = tmp_path / "models" / "cpu"
    repository.mkdir(parents=True)
    with serving(repository, triton_settings, tmp_path / "triton.log") as served:
        address, said = served.address, served.said
        assert said[0].startswith("serving no model yet: ")
        publish(plans[0], repository, UNASKED)
        wait_until(lambda: "tiny: release 1 serves" in said)
        np.testing.assert_allclose(query_texts(address, "tiny", TEXTS), answers_of(plans[0], TEXTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("control", ["explicit", "poll"])
def test_the_command_says_what_it_waits_for(tmp_path, monkeypatch, capsys, control):
    monkeypatch.setenv("REFINERY_HOME", str(tmp_path))
    folders = []
    monkeypatch.setattr(
        serving_module, "serve_foreground", lambda folder, *arguments, **options: folders.append(folder)
    )
    assert main(["serve", "--control", control, "--resource", "cores=4"]) == 0
    repository = tmp_path / "triton_models" / "cpu"
    assert folders == [repository]
    assert repository.is_dir()
    assert capsys.readouterr().out.splitlines() == [
        f"{repository} holds no release yet. The server waits for the first one: refinery optimize MODEL",
        f"no model of {repository} uses the resource 'cores' of --resource yet",
    ]
