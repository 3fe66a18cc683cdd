"""Addresses hide their secrets however they are printed, and still lead where they should."""

import copy
import dataclasses
import json
import logging
import pickle
import traceback
import urllib.request
from base64 import b64encode

import pytest
from pydantic import BaseModel

from orchestration.settings import read_access, read_workspace, tracker_of, webhook_of
from resources.boundary.addresses import Address, LibraryError, web_address
from resources.boundary.http import get_json, post_json
from resources.catalog.loading import load_catalog
from resources.checkpoints.watch.hub import hub_commit
from resources.checkpoints.watch.registry import ask_version
from resources.errors import CatalogError, CheckpointError, TrackingError
from resources.settings.sources import Access, SourceSettings
from tests.conftest import entry_for
from tests.sources import COMMIT, serving

#: A name, a password, and a value of the query that nothing may show.
NAME, PASSWORD, QUERY = "canary-name", "canary-pass", "canary-query"
SECRETS = (NAME, PASSWORD, QUERY)
WEB = f"http://{NAME}:{PASSWORD}@127.0.0.1:9/base?token={QUERY}"
DATABASE = f"postgresql://{NAME}:{PASSWORD}@127.0.0.1:9/base?sslpassword={QUERY}"
LOGIN = f"Basic {b64encode(f'{NAME}:{PASSWORD}'.encode()).decode()}"


@dataclasses.dataclass
class Held:
    address: Address


class Model(BaseModel):
    address: Address


def logged(address):
    record = logging.LogRecord("x", logging.INFO, "x", 1, "%s %r", (address, address), None)
    return logging.Formatter().format(record)


def traced(address):
    try:
        raise ValueError(address)
    except ValueError:
        return traceback.format_exc()


@pytest.mark.parametrize(
    "printed",
    [
        str,
        repr,
        format,
        "{}".format,
        lambda address: f"{address} {address!r} {address:>200}",
        lambda address: "%s %r" % (address, address),  # noqa: UP031 - one of the ways
        lambda address: "".join([address, "/path"]) + address + address.upper(),
        logged,
        json.dumps,
        lambda address: repr(Held(address)),
        lambda address: json.dumps(dataclasses.asdict(Held(address))),
        lambda address: Model(address=address).model_dump_json() + repr(Model(address=address)),
        traced,
    ],
)
@pytest.mark.parametrize("whole", [WEB, DATABASE])
def test_it_hides_its_secrets_however_it_is_printed(printed, whole):
    said = printed(Address(whole))
    assert not [secret for secret in SECRETS if secret in said]
    assert "127.0.0.1:9" in said


@pytest.mark.parametrize("whole", [WEB, DATABASE, "sqlite:////srv/a?b%20c@d/mlflow.db", "elsewhere"])
def test_the_whole_is_there_for_who_asks(whole):
    address = Address(whole)
    for same in (pickle.loads(pickle.dumps(address)), copy.deepcopy(address), Address(address)):  # noqa: S301 - our own
        assert same.reveal() == whole
        assert same == address
    assert Model.model_validate_json(json.dumps({"address": whole})).address.reveal() == whole
    assert Address("http://a:b@c") != Address("http://a:x@c")


@pytest.mark.parametrize(
    ("whole", "shown"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("http://u:p@mlflow:5000/a", "http://mlflow:5000/a"),
        ("http://u:p%40@[::1]:5000", "http://[::1]:5000"),
        ("http://mlflow/@me", "http://mlflow/@me"),
        ("postgresql+psycopg2://u:p/a@ss@host/db?x=y", "postgresql+psycopg2://host/db"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("sqlite:////srv/a?b@c#d", "sqlite:////srv/a?b@c#d"),
        ("/srv/a@b", "/srv/a@b"),
    ],
)
def test_what_is_seen_of_an_address(whole, shown):
    assert Address(whole) == shown


def test_of_a_webhook_only_its_host_is_seen():
    address = web_address("https://u:p@chat.example.org:8443/services/T/B/secret?x=y", path=False)
    assert address == "https://chat.example.org:8443"
    assert pickle.loads(pickle.dumps(address)) == address  # noqa: S301 - our own
    assert address.conceal("no /services/T/B/secret there") == "no /*** there"


def test_switches_of_a_query_leave_errors_readable():
    address = Address("postgresql://user:canary@host/db?ssl=1&key=canary-key")
    assert address.conceal("line 11: no canary, canary-key or ssl=1&key=canary-key") == "line 11: no ***, *** or ***"
    error = OSError(111, "refused")
    assert address.without_secrets(error) is error


def library_errors():
    """What libraries say of an address that holds a password, and that nobody answers."""
    import requests
    from sqlalchemy import create_engine

    yield lambda: urllib.request.urlopen(WEB, timeout=1)
    yield lambda: requests.get(WEB, timeout=1)
    yield lambda: requests.get(WEB.replace("127.0.0.1:9", "127.0.0.1:x"), timeout=1)
    yield lambda: create_engine(DATABASE).connect()
    yield lambda: create_engine(DATABASE.replace("//", "")).connect()


def heavy_library_errors():
    """The same of those that take seconds to import."""
    from fsspec import filesystem
    from mlflow import MlflowClient

    yield lambda: filesystem("http").cat(WEB)
    yield lambda: MlflowClient(WEB).search_experiments()
    yield lambda: MlflowClient(f"nowhere://{NAME}:{PASSWORD}@host").search_registered_models()


@pytest.mark.parametrize("errors", [library_errors, pytest.param(heavy_library_errors, marks=pytest.mark.whole)])
def test_errors_of_libraries_are_shown_without_what_is_secret(monkeypatch, errors):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address, leaky = Address(WEB), 0
    for attempt in errors():
        with pytest.raises(Exception) as caught:
            attempt()
        shown = address.without_secrets(caught.value)
        leaky += isinstance(shown, LibraryError)
        said = "".join(traceback.format_exception(shown))
        assert not [secret for secret in SECRETS if secret in said]
    assert leaky, "libraries do say secrets, or this test sees nothing"


@pytest.mark.whole
def test_a_tracking_store_that_is_away_is_named_without_its_password(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    workspace = read_workspace({"REFINERY_HOME": str(tmp_path), "REFINERY_MLFLOW_URI": WEB})
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9") as caught:
        tracker_of(workspace).prepare()
    said = "".join(traceback.format_exception(caught.value)) + repr(workspace) + repr(workspace.sources)
    assert not [secret for secret in SECRETS if secret in said]


def refusing(said):
    """Answers who says the name and password, and nobody else."""

    def answer(path):
        login = {name.lower(): value for name, value in asked[-1][1].items()}.get("authorization")
        return (200, said, {}) if login == LOGIN else (401, {"error_code": "UNAUTHENTICATED"}, {})

    return answer


def with_login(address):
    return address.replace("//", f"//{NAME}:{PASSWORD}@")


asked: list = []


@pytest.mark.parametrize("who", ["hub", "registry", "webhook", pytest.param("client", marks=pytest.mark.whole)])
def test_the_password_of_an_address_is_one(who, tmp_path, monkeypatch):
    """urllib takes it for part of the host's name."""
    version = {"version": "3", "source": "s3://x", "creation_timestamp": 1, "status": "READY"}
    said = {"sha": COMMIT, "model_version": version, "experiments": []}
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
    with serving(refusing(said)) as (address, questions):
        monkeypatch.setitem(globals(), "asked", questions)
        given = with_login(address)
        if who == "hub":
            assert hub_commit("tiny/bert", read_access({"HF_ENDPOINT": given, "HF_HOME": str(tmp_path)})) == COMMIT
        elif who == "registry":
            settings = SourceSettings(tmp_path, Address(given), Access())
            assert ask_version("models:/bert@live", settings).number == "3"
        elif who == "webhook":
            webhook = webhook_of({"REFINERY_WEBHOOK": f"{given}/hook"})
            post_json(webhook.location, webhook.authorization, {})
            assert questions[-1][0] == "/hook"
        else:
            workspace = read_workspace({"REFINERY_HOME": str(tmp_path), "REFINERY_MLFLOW_URI": given})
            tracker_of(workspace).prepare()
        assert questions


def test_a_registry_that_is_away_is_named_without_its_password(tmp_path):
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1:9") as caught:
        ask_version("models:/bert@live", SourceSettings(tmp_path, Address(WEB)))
    said = "".join(traceback.format_exception(caught.value))
    assert not [secret for secret in SECRETS if secret in said]


@pytest.mark.parametrize("name", ["REFINERY_WEBHOOK", "REFINERY_MLFLOW_URI", "REFINERY_MLFLOW_UI", "HF_ENDPOINT"])
@pytest.mark.parametrize(
    "address",
    [
        "https://chat.example.org/canary x",
        "https://chat.example.org/canary\n",
        "https://u:canary/x@host",
        "https://u:12/canary@host/x",
        "https://:canary@",
        "https://host:canary",
        "https://canäry",
    ],
)
def test_what_is_no_web_address_is_refused_without_being_repeated(name, address):
    read = webhook_of if name == "REFINERY_WEBHOOK" else read_workspace
    if name == "REFINERY_WEBHOOK" and address.endswith("12/canary@host/x"):
        assert read({name: address}) == "https://u:12"  # a path that nobody sees may hold an @
        return
    with pytest.raises(CatalogError, match=name) as caught:
        read({name: address})
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_servers_of_triton_take_no_password():
    with pytest.raises(CatalogError, match="REFINERY_TRITON_GRPC holds a name or password") as caught:
        read_workspace({"REFINERY_TRITON_GRPC": f"u:{PASSWORD}@triton:8001"})
    assert PASSWORD not in str(caught.value)


def test_get_json_asks_web_servers_alone():
    with pytest.raises(ValueError, match="file: is not the address"):
        get_json("file:///etc/passwd", {})


@pytest.mark.parametrize(
    ("place", "holds"),
    [
        ("s3://bucket/models@v1", False),
        ("s3://http://host:9000/bucket/a@b", False),
        ("s3://key:canary@bucket/prefix", True),
        ("s3://http://key:canary@host:9000/bucket", True),
        ("s3://http://key:can/ary@host:9000/bucket", True),
        ("as://account:canary@host/container", True),
        ("models:/bert@live", False),
        ("org/name@revision", False),
    ],
)
def test_places_in_object_storage_hold_no_password(place, holds, tmp_path):
    """They stand in records, reports and catalogs."""
    if not holds:
        assert entry_for(place).source == place
        return
    with pytest.raises(CatalogError, match="name or password") as caught:
        read_workspace({"REFINERY_ARTIFACTS": place, "REFINERY_HOME": str(tmp_path)})
    catalog = tmp_path / "models.yaml"
    catalog.write_text(f"models:\n- name: tiny\n  source: {place}\n  task: embedding\n")
    with pytest.raises(CatalogError, match="name or password") as other:
        load_catalog(catalog)
    assert "canary" not in f"{caught.value} {other.value}"
    assert "ary@" not in f"{caught.value} {other.value}"
