"""Running servers behind one repository, in each control mode: all of them take a release up, or none does."""

import re
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from orchestration.settings import read_workspace
from resources.errors import CatalogError, ServerError
from resources.triton import fleet as module
from resources.triton.asking import ask
from resources.triton.client import TextClient
from resources.triton.exam import fleet_steps
from resources.triton.fleet import Fleet
from resources.triton.layout import current_number
from resources.triton.publish import Steps, publish
from resources.triton.retain import retain
from resources.triton.rollback import roll_back
from resources.triton.server import EmbeddedServer
from tests.releases import answers_of, exam_of, make_plan, query_texts, tree_digest, unasked

TEXTS = ["How long should I boil the eggs?", "", "naïve 🙂"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return [make_plan(folder, seed=seed) for seed in range(3)]


@pytest.fixture
def repository(tmp_path, plans):
    folder = tmp_path / "models" / "cpu"
    publish(plans[0], folder, Steps(prove=unasked))
    return folder


@pytest.fixture(params=["explicit", "poll"])
def settings(request, repository, triton_settings, tmp_path):
    """Two servers of the repository, in one control mode."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                EmbeddedServer(
                    repository,
                    triton_settings,
                    models=["tiny"],
                    log=tmp_path / f"triton-{number}.log",
                    control=request.param,
                    key="of-all-servers",
                )
            )
            for number in range(2)
        ]
        yield replace(
            triton_settings,
            servers=tuple(one.grpc_address for one in servers),
            control=request.param,
            connection=servers[0].connection,
        )


def check_served(settings, number, plan):
    for address in settings.servers:
        with TextClient(address) as client:
            assert client.release_of("tiny") == number
        np.testing.assert_allclose(query_texts(address, "tiny", TEXTS), answers_of(plan, TEXTS), rtol=0, atol=1e-6)


def test_every_server_takes_a_release_up_or_none_does(settings, repository, plans, tmp_path, monkeypatch):
    with Fleet(settings) as fleet:
        steps = fleet_steps(fleet, lambda: exam_of(plans[1]), repository)
        assert publish(plans[1], repository, steps).release.number == 2
        check_served(settings, 2, plans[1])

        def fail_on_the_second(client, repository, release, name=None):
            ask(client, repository, release, name)
            if client.address == settings.servers[1] and name is None and release.number != 2:
                raise ServerError("It does not answer.")

        before = tree_digest(repository)
        monkeypatch.setattr(module, "ask", fail_on_the_second)
        with pytest.raises(ServerError, match=r"release 3 was taken back: It does not answer\. What served before"):
            publish(plans[2], repository, fleet_steps(fleet, lambda: exam_of(plans[2]), repository))
        assert tree_digest(repository) == before
        check_served(settings, 2, plans[1])
        with pytest.raises(ServerError, match=r"release 1 was not taken up: It does not answer\. What served before"):
            roll_back(repository, "tiny", settings, log=tmp_path / "log")
        assert tree_digest(repository) == before
        check_served(settings, 2, plans[1])
        monkeypatch.undo()

    assert roll_back(repository, "tiny", settings, log=tmp_path / "log").release.number == 1
    check_served(settings, 1, plans[0])
    # The second stays, as the newest.
    assert retain(repository, "tiny", keep=1, settings=settings).removed == ()
    assert roll_back(repository, "tiny", settings, to=2, log=tmp_path / "log").before == 1
    assert retain(repository, "tiny", keep=1, settings=settings).removed == (1,)
    check_served(settings, 2, plans[1])


def test_an_engine_that_does_not_load_is_not_published(settings, repository, plans, tmp_path):
    plan = make_plan(tmp_path / "broken", seed=9)
    (plan.engine_folder / "model.onnx").write_bytes(b"no graph")
    plan = replace(plan, engine=plan.engine.with_files(plan.engine_folder))
    before = tree_digest(repository)
    with Fleet(settings) as fleet, pytest.raises(ServerError, match=r"cannot load tiny__r2.*model\.onnx"):
        publish(plan, repository, fleet_steps(fleet, lambda: exam_of(plans[1]), repository))
    assert tree_digest(repository) == before
    check_served(settings, 1, plans[0])
    # Servers keep what they said of a name, so the next one has another.
    with Fleet(settings) as fleet:
        steps = fleet_steps(fleet, lambda: exam_of(plans[1]), repository)
        assert publish(plans[1], repository, steps).release.number == 3
    check_served(settings, 3, plans[1])
    if settings.control == "explicit":  # what was replaced is unloaded, what did not load too
        for address in settings.servers:
            with TextClient(address) as client:
                assert [number for number in (1, 2, 3) if client.is_ready(f"tiny__r{number}__pipeline")] == [3]


def test_servers_that_are_not_what_was_said(
    repository, plans, triton_settings, tmp_path, monkeypatch, caplog, unused_port
):
    before = tree_digest(repository)

    def refused(match, **changes):
        with Fleet(replace(triton_settings, **changes)) as fleet, pytest.raises(ServerError, match=match):
            publish(plans[1], repository, fleet_steps(fleet, lambda: exam_of(plans[1]), repository))
        assert tree_digest(repository) == before

    (tmp_path / "other").mkdir()
    with (
        EmbeddedServer(tmp_path / "other", triton_settings, models=[], log=tmp_path / "triton.log") as server,
        monkeypatch.context() as patch,
    ):
        here = server.grpc_address
        refused(
            "runs in explicit model control, where .* says poll, and nothing was",
            servers=(here,),
            connection=server.connection,
            control="poll",
        )
        refused(
            rf"{here} does not see tiny__r.__proof of {repository}, so .* another folder",
            servers=(here,),
            connection=server.connection,
        )
        patch.setattr(TextClient, "runs_explicit", lambda client: None)
        patch.setattr(module, "UNSEEN_SECONDS", 0.2)
        refused(
            rf"{here} does not see tiny__r.__proof of {repository}",
            servers=(here,),
            connection=server.connection,
            control="poll",
        )
    dead = f"127.0.0.1:{unused_port}"
    with EmbeddedServer(
        repository, triton_settings, models=["tiny"], log=tmp_path / "triton.log", control="none"
    ) as server:
        here = server.grpc_address
        refused(rf"No Triton answers gRPC at {dead} \(REFINERY_TRITON_GRPC\), and nothing was changed", servers=(dead,))
        refused(rf"No Triton answers gRPC at {dead} ", connection=server.connection, servers=(here, dead))
        refused(
            "does not run in explicit model control, where REFINERY_TRITON_CONTROL says explicit",
            servers=(here,),
            connection=server.connection,
        )
        monkeypatch.setattr(module, "LOAD_TIMEOUT_SECONDS", 1.0)
        monkeypatch.setattr(module, "SAY_SECONDS", 0.2)
        refused(
            "did not take tiny__r.__proof up within 1 s.*--model-control-mode=poll",
            servers=(here,),
            connection=server.connection,
            control="poll",
        )
        (said,) = caplog.messages
        assert re.fullmatch(
            rf"waiting up to 1 s for the server at {here} to look at .* take tiny__r.__proof up.*", said
        )
        versions = iter(["triton 2.51.0", "triton 2.40.0"])
        monkeypatch.setattr(TextClient, "version", lambda client: next(versions))
        refused(
            r"not of one version \(.*2\.51\.0, .*2\.40\.0\)",
            connection=server.connection,
            servers=(here, here.replace("127.0.0.1", "localhost")),
            control="poll",
        )
    assert not Fleet(replace(triton_settings, servers=(here,), connection=server.connection, control="none"))


def test_a_native_release_on_a_server_without_its_backend(repository, triton_settings, tmp_path):
    plan, before = make_plan(tmp_path / "native", seed=5, flavour="native"), tree_digest(repository)
    with (
        EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "triton.log") as server,
        Fleet(replace(triton_settings, servers=(server.grpc_address,), connection=server.connection)) as fleet,
        pytest.raises(ServerError, match=r"lacks that backend.*REFINERY_TRITON_FLAVOUR=python"),
    ):
        publish(plan, repository, fleet_steps(fleet, lambda: exam_of(plan), repository))
    assert tree_digest(repository) == before
    assert current_number(repository, "tiny") == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"REFINERY_TRITON_GRPC": "http://triton:8001"}, "REFINERY_TRITON_GRPC: 'http://triton:8001' is not host:port"),
        ({"REFINERY_TRITON_GRPC": "a:1,b"}, "REFINERY_TRITON_GRPC: 'b' is not host:port"),
        ({"REFINERY_TRITON_CONTROL": "pull"}, "'pull' is not one of explicit, poll, none"),
        ({"REFINERY_TRITON_HTTP": "a:1"}, "REFINERY_TRITON_HTTP names more servers"),
    ],
)
def test_variables_that_make_no_sense(variables, message):
    with pytest.raises(CatalogError, match=message):
        read_workspace(variables)


def test_several_servers_are_read_from_the_environment():
    variables = {
        "REFINERY_TRITON_GRPC": "a:1, [::1]:2",
        "REFINERY_TRITON_HTTP": "a:3",
        "REFINERY_TRITON_CONTROL": "poll",
    }
    found = read_workspace(variables).triton
    assert (found.servers, found.servers_http, found.control) == (("a:1", "[::1]:2"), ("a:3",), "poll")
    assert found.driven == found.servers
    assert replace(found, control="none").driven == ()
