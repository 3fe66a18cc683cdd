"""The settings that are read from environment variables. docs/settings.md lists them for users."""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast, get_args

import orchestration
from orchestration.automation.policies import FRESH_DAYS, Policies, check_owners
from orchestration.certificates import share_certificates
from orchestration.runs.executors import IN_PROCESS, Execution, ExecutorKind, read_config
from orchestration.runs.instance import require_plain
from resources.boundary.addresses import WEB, Address, web_address
from resources.boundary.http import Tls
from resources.checkpoints.sources.registry import source_names
from resources.errors import CatalogError
from resources.machine.targets import check_target
from resources.processes.isolation import Limits
from resources.settings.connection import Connection
from resources.settings.sources import HUB, Access
from resources.settings.triton import Control, Flavour, TritonSettings
from resources.settings.workspace import EXTERNAL_DATA_THRESHOLD_BYTES, WATCH_SECONDS, Workspace
from resources.storage.locations import Location, parse_location
from resources.tracking import Tracker

DEFAULT_CATALOG = Path(orchestration.__file__).with_name("models.yaml")
#: RFC 9110, section 5: a header's name is a token, and its value holds no control characters.
_HEADER_NAME, _HEADER_VALUE = (
    re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"),
    re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?"),
)
DEFAULT_MLFLOW_UI = "http://127.0.0.1:5000"


def read_workspace(environment: Mapping[str, str]) -> Workspace:
    """Return the workspace that the variables describe.

    Raises:
        CatalogError: A variable is wrong. The error names it.
    """
    home = _home(environment)
    targets = tuple(environment.get("REFINERY_TARGETS", "cpu").replace(",", " ").split())
    if not targets:
        raise CatalogError("REFINERY_TARGETS is empty. Name a target, or leave the variable unset for cpu.")
    for target in targets:
        try:
            check_target(target)
        except ValueError as error:
            raise CatalogError(f"REFINERY_TARGETS: {error}.") from None
    flavour = environment.get("REFINERY_TRITON_FLAVOUR", "python")
    if flavour not in get_args(Flavour):
        raise CatalogError(f"REFINERY_TRITON_FLAVOUR: {flavour!r} is not one of {', '.join(get_args(Flavour))}.")
    given = environment.get("REFINERY_TRITON_CONTROL") or TritonSettings().control
    if given not in get_args(Control):
        raise CatalogError(f"REFINERY_TRITON_CONTROL: {given!r} is not one of {', '.join(get_args(Control))}.")
    grpc, http = _addresses(environment, "REFINERY_TRITON_GRPC"), _addresses(environment, "REFINERY_TRITON_HTTP")
    if len(http) > len(grpc):
        raise CatalogError(
            "REFINERY_TRITON_HTTP names more servers than REFINERY_TRITON_GRPC. List the servers of both in the same "
            "order."
        )
    triton = TritonSettings(
        flavour="native" if flavour == "native" else "python",
        servers=grpc,
        servers_http=http,
        control=cast(Control, given),
        repositories=_location(environment, "REFINERY_TRITON_REPOSITORIES", home),
        environment=_path(environment, "REFINERY_TRITON_ENVIRONMENT") or TritonSettings().environment,
        connection=read_connection(environment),
        keys=home / "keys",
    )
    limits = Limits(
        timeout_s=_number(environment, "REFINERY_STEP_SECONDS", Limits().timeout_s),
        memory_bytes=int(_number(environment, "REFINERY_STEP_MEMORY_GB", Limits().memory_bytes / 1e9) * 1e9),
    )
    threshold = _number(environment, "REFINERY_EXTERNAL_DATA_BYTES", EXTERNAL_DATA_THRESHOLD_BYTES)
    return Workspace(
        home=home,
        catalog_path=_path(environment, "REFINERY_CATALOG") or DEFAULT_CATALOG,
        targets=targets,
        limits=limits,
        external_data_threshold_bytes=int(threshold),
        artifacts=_location(environment, "REFINERY_ARTIFACTS", home),
        tracking_uri=_tracking_uri(environment),
        tracking_ui=_web(environment, "REFINERY_MLFLOW_UI"),
        dagster_ui=_web(environment, "REFINERY_DAGSTER_UI"),
        triton=triton,
        access=read_access(environment),
        watch_seconds=max(1, round(_number(environment, "REFINERY_WATCH_SECONDS", WATCH_SECONDS))),
    )


def read_connection(environment: Mapping[str, str]) -> Connection:
    """Return the settings of connections to the configured Triton servers.

    Raises:
        CatalogError: A variable is wrong. The error names it.
    """
    files = {name: _path(environment, f"REFINERY_TRITON_{name}") for name in ("CA", "CERTIFICATE", "PRIVATE_KEY")}
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise CatalogError(f"REFINERY_TRITON_{name}: {path} is not a file. Name a file in PEM format.")
    if (files["CERTIFICATE"] is None) != (files["PRIVATE_KEY"] is None):
        raise CatalogError("REFINERY_TRITON_CERTIFICATE and REFINERY_TRITON_PRIVATE_KEY belong together; give both.")
    given = environment.get("REFINERY_TRITON_TLS", "")
    if given not in ("", "0", "1"):
        raise CatalogError(
            f"REFINERY_TRITON_TLS: {given!r} is neither 0 nor 1. Set 1 for servers that are reached over TLS."
        )
    named = any(path is not None for path in files.values())
    if given == "0" and named:
        raise CatalogError(
            "REFINERY_TRITON_TLS is 0, but REFINERY_TRITON_CA, _CERTIFICATE or _PRIVATE_KEY is set. Unset one or the "
            "other."
        )
    key = environment.get("REFINERY_TRITON_KEY") or None
    if key is not None and not _HEADER_VALUE.fullmatch(key):
        raise CatalogError(
            "REFINERY_TRITON_KEY holds characters that a header cannot hold. Use letters and digits, as `openssl rand "
            "-hex 32` prints them."
        )
    return Connection(
        key=key,
        headers=_headers(environment.get("REFINERY_TRITON_HEADERS")),
        tls=given == "1" or named,
        ca=files["CA"],
        certificate=files["CERTIFICATE"],
        private_key=files["PRIVATE_KEY"],
    )


def _headers(text: str | None) -> tuple[tuple[str, str], ...]:
    """Return the headers of a JSON object. Their names are in lower case, as HTTP/2 requires."""
    wanted = CatalogError(
        'REFINERY_TRITON_HEADERS is not a JSON object of headers, such as {"authorization": "Bearer ..."}.'
    )
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        raise wanted from None
    if not isinstance(found, dict):
        raise wanted
    for name, value in found.items():
        if not _HEADER_NAME.fullmatch(name) or not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise wanted
    return tuple((name.lower(), value) for name, value in found.items())


def complete_environment(environment: MutableMapping[str, str]) -> None:
    """Set the variables that libraries need and that the environment lacks.

    If the system has no home or no name for the user, as in a container, HOME or USER is set. Libraries need them to
    find their caches, and otherwise fail or make a folder called `~`. Clients that do not use requests also get the
    certificates of REQUESTS_CA_BUNDLE; see orchestration/certificates.py.
    """
    try:
        Path.home()
    except RuntimeError:
        environment["HOME"] = str(_home(environment) / "user")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environment["USER"] = f"uid-{os.getuid()}"
    share_certificates(environment)


def _home(environment: Mapping[str, str]) -> Path:
    home = Path(environment.get("REFINERY_HOME") or ".refinery").resolve()
    require_plain(home, "REFINERY_HOME")
    if home.exists() and not home.is_dir():
        raise CatalogError(f"REFINERY_HOME: {home} is not a folder. Name a folder; it is created if it is missing.")
    return home


def read_access(environment: Mapping[str, str]) -> Access:
    """Return the addresses and credentials for sources, from the variables of huggingface_hub, MLflow and Azure."""
    cache = Path(environment.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(environment.get("HF_HOME") or cache / "huggingface").expanduser()
    hub_cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    offline = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
    token = environment.get("HF_TOKEN")
    if not token:
        with suppress(OSError, UnicodeDecodeError):
            token = Path(environment.get("HF_TOKEN_PATH") or home / "token").read_text().strip()
    return Access(
        hub_endpoint=_web(environment, "HF_ENDPOINT") or HUB,
        hub_token=token or None,
        hub_cache=Path(hub_cache or home / "hub").expanduser(),
        hub_offline=offline.upper() in ("1", "ON", "YES", "TRUE"),
        mlflow_username=environment.get("MLFLOW_TRACKING_USERNAME"),
        mlflow_password=environment.get("MLFLOW_TRACKING_PASSWORD"),
        mlflow_token=environment.get("MLFLOW_TRACKING_TOKEN"),
        mlflow_trust=Tls(
            authorities=_path(environment, "MLFLOW_TRACKING_SERVER_CERT_PATH"),
            certificate=_path(environment, "MLFLOW_TRACKING_CLIENT_CERT_PATH"),
            insecure=environment.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"),
        ),
        azure_key=environment.get("AZURE_STORAGE_KEY"),
    )


def read_execution(environment: Mapping[str, str]) -> Execution:
    """Return the executor of the runs that Dagster launches.

    Raises:
        CatalogError: A variable is wrong. The error names it.
    """
    kind = environment.get("REFINERY_EXECUTOR") or IN_PROCESS
    if kind not in get_args(ExecutorKind):
        raise CatalogError(f"REFINERY_EXECUTOR: {kind!r} is not one of {', '.join(get_args(ExecutorKind))}.")
    path = _path(environment, "REFINERY_EXECUTOR_CONFIG")
    return Execution(cast(ExecutorKind, kind), read_config(path) if path is not None else {})


def read_policies(environment: Mapping[str, str]) -> Policies:
    """Return the owners of the assets, and how old the assets may be.

    Raises:
        CatalogError: A variable is wrong. The error names it.
    """
    owners = check_owners(environment.get("REFINERY_OWNERS", "").replace(",", " ").split(), "REFINERY_OWNERS")
    return Policies(owners, _number(environment, "REFINERY_FRESH_DAYS", FRESH_DAYS))


def webhook_of(environment: Mapping[str, str]) -> Address | None:
    """Return the address that is told of failed runs, or None if there is none.

    Raises:
        CatalogError: The variable's value is no web address.
    """
    return _web(environment, "REFINERY_WEBHOOK", path=False)


def tracker_of(workspace: Workspace) -> Tracker:
    """Return the tracker for the workspace's MLflow. The pages of a tracking server are at its own address."""
    # By default MLflow retries seven times if a server does not answer, which takes four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it shows a bar for each small file
    uri = workspace.mlflow_uri()
    login = workspace.sources.mlflow_login if uri.is_web else None
    if login is not None:  # it is not part of the address, because MLflow's own errors repeat that
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = login
    ui = workspace.tracking_ui or (uri if uri.is_web else DEFAULT_MLFLOW_UI)
    return Tracker(
        uri,
        ui=ui,
        folder=workspace.home / "tracking",
        dagster_ui=workspace.dagster_ui,
        sources=partial(_source_names, workspace),
    )


def _source_names(workspace: Workspace) -> frozenset[str]:
    """Return the registered models from which entries of the catalog take checkpoints.

    A catalog that cannot be read, because somebody is editing it, does not fail the run. The tracker then still refuses
    a registered model that holds versions of somebody else.
    """
    try:
        return source_names(entry.source for entry in workspace.catalog().models)
    except CatalogError:
        return frozenset()


def _addresses(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Return the addresses of a variable, each `host:port`, with commas or spaces between them."""
    found = tuple(environment.get(name, "").replace(",", " ").split())
    for address in found:
        host, _, port = address.rpartition(":")
        if "@" in address:
            raise CatalogError(f"{name} holds a name or password, but Triton accepts none. Give host:port alone.")
        if not host or not port.isdigit() or "/" in address:
            raise CatalogError(
                f"{name}: {address!r} is not host:port, such as triton:8001. Separate several with commas."
            )
    return found


def _web(environment: Mapping[str, str], name: str, *, path: bool = True) -> Address | None:
    """Return a variable's address of a web server, or None if it is not set. For `path` see Address."""
    given = environment.get(name)
    try:
        return web_address(given if not path else given.rstrip("/"), path=path) if given else None
    except ValueError as error:  # the error does not repeat the value, which may hold a password
        raise CatalogError(f"{name} {error}.") from None


def _tracking_uri(environment: Mapping[str, str]) -> Address | None:
    given = environment.get("REFINERY_MLFLOW_URI")
    if given and given.startswith(WEB):
        return _web(environment, "REFINERY_MLFLOW_URI")
    if given and ":" not in given and given != "databricks":
        raise CatalogError(
            f"REFINERY_MLFLOW_URI: {given!r} is not an address such as http://mlflow:5000 or sqlite:////srv/mlflow.db."
        )
    return Address(given) if given else None


def _path(environment: Mapping[str, str], name: str) -> Path | None:
    value = environment.get(name)
    return Path(value).expanduser().resolve() if value else None


def _location(environment: Mapping[str, str], name: str, home: Path) -> Location | None:
    value = environment.get(name)
    try:
        scratch = Workspace(home, DEFAULT_CATALOG).scratch
        return parse_location(value, scratch, environment, variable=name) if value else None
    except ValueError as error:
        raise CatalogError(f"{name}: {error}.") from None


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    value = environment.get(name)
    if not value:
        return default
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not number > 0:
        raise CatalogError(f"{name}: {value!r} is not a number above 0.")
    return number
