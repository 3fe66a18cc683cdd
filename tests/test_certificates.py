"""A private authority's certificates, as REQUESTS_CA_BUNDLE and MLflow's settings name them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.certificates import share_certificates
from orchestration.settings import read_workspace
from resources.checkpoints.watch.hub import hub_commit
from resources.checkpoints.watch.registry import ask_version
from resources.errors import CheckpointError
from tests.sources import COMMIT, serving

VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "MLFLOW_TRACKING_INSECURE_TLS")
MODEL = "models:/bert/3"


def answer(path):
    version = {"name": "bert", "version": "3", "source": "s3://bucket/bert", "creation_timestamp": 1}
    return 200, {"sha": COMMIT, "id": "org/name", "siblings": [], "tags": [], "model_version": version}, {}


@pytest.fixture
def server(certificates):
    """A server that nobody trusts who was not told of its authority."""
    with serving(answer, certificates) as (address, _):
        yield address


@pytest.fixture
def variables(monkeypatch, tmp_path):
    """Sets variables of this process, which then has no others of their kind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        del os.environ[name]  # what is set meanwhile is undone all the same

    def settings(**given):
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))
        share_certificates(os.environ)
        return read_workspace(os.environ)

    return settings


def in_a_folder(certificates, tmp_path):
    folder = tmp_path / "authorities"
    folder.mkdir()
    (folder / "ours.crt").write_bytes((certificates / "ca.pem").read_bytes())
    return folder


def the_file(certificates, tmp_path):
    return certificates / "ca.pem"


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        ("REQUESTS_CA_BUNDLE", the_file),
        ("REQUESTS_CA_BUNDLE", in_a_folder),
        ("CURL_CA_BUNDLE", the_file),
        ("SSL_CERT_FILE", the_file),
    ],
)
def test_the_hub_is_asked_with_the_authoritys_certificates(server, certificates, variables, tmp_path, variable, place):
    workspace = variables(HF_ENDPOINT=server, **{variable: place(certificates, tmp_path)})
    assert hub_commit("org/name", workspace.access) == COMMIT


def test_without_them_the_reason_is_said(server, variables):
    workspace = variables(HF_ENDPOINT=server)
    with pytest.raises(CheckpointError, match="certificate"):
        hub_commit("org/name", workspace.access)


def test_huggingface_hub_trusts_them_too(server, certificates, variables):
    variables(HF_ENDPOINT=server, REQUESTS_CA_BUNDLE=certificates / "ca.pem")
    code = "from huggingface_hub import HfApi; print(HfApi().model_info('org/name').sha)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.strip() == COMMIT, found.stderr


def test_others_stay_trusted(certificates, variables):
    """A bundle for one server must not end what worked without it, and one process in another adds nothing."""
    variables(REQUESTS_CA_BUNDLE=certificates / "ca.pem")
    import certifi

    made = os.environ["SSL_CERT_FILE"]
    content = Path(made).read_text()
    assert Path(certifi.where()).read_text().strip() in content
    assert (certificates / "ca.pem").read_text().strip() in content
    share_certificates(os.environ)
    assert os.environ["SSL_CERT_FILE"] == made


def test_a_bundle_that_is_not_there_changes_nothing(variables, tmp_path):
    variables(REQUESTS_CA_BUNDLE=tmp_path / "none.pem")
    assert "SSL_CERT_FILE" not in os.environ


@pytest.mark.parametrize(
    "given",
    [
        {"MLFLOW_TRACKING_SERVER_CERT_PATH": "ca.pem"},
        {"MLFLOW_TRACKING_INSECURE_TLS": "true"},
        {"REQUESTS_CA_BUNDLE": "ca.pem"},
    ],
)
def test_mlflow_is_asked_as_its_client_would(server, certificates, variables, given):
    paths = {name: certificates / value if value.endswith(".pem") else value for name, value in given.items()}
    workspace = variables(REFINERY_MLFLOW_URI=server, **paths)
    assert ask_version(MODEL, workspace.sources).number == "3"


@pytest.mark.parametrize("given", [{}, {"MLFLOW_TRACKING_SERVER_CERT_PATH": "/nowhere/ca.pem"}])
def test_mlflow_is_not_believed_otherwise(server, variables, given):
    workspace = variables(REFINERY_MLFLOW_URI=server, **given)
    with pytest.raises(CheckpointError, match="certificate|/nowhere/ca.pem"):
        ask_version(MODEL, workspace.sources)
