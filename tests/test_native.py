"""Releases on Triton's own backends: proven, verified, searched and measured on the configured server, and only there.

The server is an embedded Triton with a stand-in for its ONNX Runtime backend (tests/native.py). The real backend was
tried by hand: docs/measurements.md, "What was not verified".
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from orchestration.cli import main as cli
from resources.artifacts.records import ServingSetting, ThreadSetting
from resources.catalog.entries import ServingSettings
from resources.errors import ReleaseError, ServerError
from resources.settings.triton import TritonSettings
from resources.triton.config import engine_config
from resources.triton.exam import fleet_steps
from resources.triton.fleet import Fleet
from resources.triton.layout import current_number
from resources.triton.publish import Steps, publish
from resources.triton.rollback import roll_back
from resources.triton.search import settings_to_try
from resources.triton.server import EmbeddedServer
from resources.triton.trials import configured_trials
from resources.triton.verify import verify_release
from tests.native import play_native_backend
from tests.releases import answers_of, exam_of, make_plan, query_texts, tree_digest, unasked

TEXTS = ["How long should I boil the eggs?", "", "naïve 🙂"]
#: Of one length: Triton waits for company no longer once a request of another length comes.
ITEMS = [{"TEXT": "How long should I boil the eggs?"}]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return [make_plan(folder, seed=seed, flavour="native") for seed in range(3)]


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "models" / "cpu"
    folder.mkdir(parents=True)
    return folder


def published(plan, repository, settings):
    with Fleet(settings) as fleet:
        done = publish(plan, repository, fleet_steps(fleet, lambda: exam_of(plan, count=24), repository))
    assert done.changed
    return done.release


def loaded(client):
    return {name for name, reason in client.models().items() if client.is_ready(name) and not reason}


@pytest.mark.parametrize("control", ["explicit", pytest.param("poll", marks=pytest.mark.whole)])
def test_any_native_release_is_verified_and_the_next_one_searched_for_beside_what_serves(
    control, plans, repository, triton_settings, tmp_path, monkeypatch
):
    play_native_backend(monkeypatch)
    log = tmp_path / "log"
    with EmbeddedServer(repository, triton_settings, models=[], log=log, control=control) as server:
        settings = replace(
            triton_settings,
            flavour="native",
            servers=(server.grpc_address,),
            control=control,
            connection=server.connection,
        )
        for plan in plans[:2]:
            published(plan, repository, settings)
        with server.client() as client:
            there, before = loaded(client), tree_digest(repository)
            for number in (None, 1, 2):
                release, said = verify_release(repository, "tiny", settings, number, log=log)
                assert (release.number, said) == (number or 2, f"Triton at {server.grpc_address}")
            assert tree_digest(repository) == before
            assert client.release_of("tiny") == current_number(repository, "tiny") == 2
            if control == "explicit":
                assert loaded(client) == there
                measured_beside(plans[2], settings, repository)
                assert tree_digest(repository) == before
                assert loaded(client) == there
        np.testing.assert_allclose(
            query_texts(server.grpc_address, "tiny", TEXTS), answers_of(plans[1], TEXTS), rtol=0, atol=1e-6
        )
        without = replace(settings, control="none")
        assert verify_release(repository, "tiny", without, 2, log=log)[0].number == 2
        with pytest.raises(ReleaseError, match="release 1 does not serve, and servers without model control"):
            verify_release(repository, "tiny", without, 1, log=log)
        assert roll_back(repository, "tiny", settings, log=log).release.number == 1
    with pytest.raises(ServerError, match="REFINERY_TRITON_GRPC"):
        verify_release(repository, "tiny", settings, 2, log=log)


def measured_beside(plan, settings, repository):
    with configured_trials(plan, settings, repository, ITEMS, 4) as measure:
        one, two = measure(ServingSetting(), 1.0, 1), measure(ServingSetting(instances=2), 1.0, 1)
        patient = measure(ServingSetting(queue_delay_us=30_000), 1.5, 2)
    assert not one.reason and not two.reason and not patient.reason
    # It is that setting which ran: who waits 30 ms for company answers late.
    assert patient.p50_ms > 30 > one.p50_ms


def test_on_tritons_own_backends_the_default_is_an_instance_a_core(plans):
    def tried(cores, engine_bytes=1, threads=8, **fields):
        found = settings_to_try(
            ThreadSetting(threads=threads),
            ServingSettings(queue_delay_us=0, **fields),
            device="cpu",
            cores=cores,
            engine_bytes=engine_bytes,
            flavour="native",
        )
        return [(one.instances, one.threads_beside or one.threads) for one in found]

    assert tried(1) == [(1, 8)]
    assert tried(2) == [(2, 1), (1, 8)]
    assert tried(8, threads=2) == [(8, 1), (1, 2), (2, 2), (4, 2)]
    # What all instances hold of weights is bounded, so they are fewer and have more threads each.
    assert tried(8, engine_bytes=2**28) == [(4, 2), (1, 8), (2, 4)]
    assert tried(8, instances=3) == [(3, 2)]
    config = engine_config(replace(plans[0], serving=ServingSetting(instances=2, threads=1)), 1)
    assert [group.count for group in config.instance_group] == [2]
    assert config.parameters["intra_op_thread_count"].string_value == "1"


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (["query", "tiny", "any text"], "Give the address of a server that has these backends with --url"),
        (["load", "tiny"], "address of a server that has these backends with --url"),
        (["serve"], "Start a Triton server that has these backends"),
        (["serve", "--control", "poll"], "Start a Triton server that has these backends"),
    ],
)
def test_without_a_server_that_has_their_backend_the_remedy_is_said(
    command, remedy, plans, repository, triton_settings, tmp_path, monkeypatch, capfd
):
    publish(plans[0], repository, Steps(prove=unasked))
    catalog = tmp_path / "models.yaml"
    catalog.write_text(json.dumps({"models": [{"name": "tiny", "source": "/any", "task": "embedding"}]}))
    monkeypatch.setenv("REFINERY_CATALOG", str(catalog))
    monkeypatch.setenv("REFINERY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REFINERY_TRITON_REPOSITORIES", str(repository.parent))
    monkeypatch.setenv("REFINERY_TRITON_ENVIRONMENT", str(triton_settings.environment))
    assert cli(command) == 1
    printed = capfd.readouterr().err
    assert "release 1 runs on Triton's own backends, which the embedded server does not have." in printed
    assert remedy in printed
    assert len(printed.splitlines()) == 1


def test_what_no_server_can_be_asked_names_either_control_mode(plans, repository, tmp_path):
    publish(plans[0], repository, Steps(prove=unasked))
    with pytest.raises(ReleaseError, match=r"REFINERY_TRITON_CONTROL to its model control, explicit or poll"):
        verify_release(repository, "tiny", TritonSettings(), log=tmp_path / "log")
