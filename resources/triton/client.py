"""Asking a Triton server, over gRPC or HTTP, with errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from resources.errors import ServerError
from resources.settings.connection import PLAIN, Connection, Protocol

_NAMES: dict[Protocol, str] = {"grpc": "gRPC", "http": "HTTP"}
#: For questions. Loading a model has a limit of its own.
TIMEOUT_SECONDS = 60.0
LOAD_TIMEOUT_SECONDS = 300.0
#: For "is there a server at all".
_LIVE_SECONDS = 2.0
#: What Triton says to who loads or unloads a model in any other mode than explicit.
_NOT_EXPLICIT = "not allowed if polling is enabled"
#: What Triton says to who calls a restricted API without the right header.
_RESTRICTED = "restricted, expecting header"
#: Inputs of public models that need not be given.
_OPTIONAL = ("TEXT_PAIR",)
#: No model's name: releases are numbered from 1.
_NOBODY = "nobody__r0__proof"


@dataclass(frozen=True)
class Contract:
    """What a public model takes and gives. `structured`: answers are JSON documents, and not fp32 numbers."""

    inputs: tuple[str, ...]
    output: str
    structured: bool


class _Bounded:
    """An HTTP client each of whose calls ends: its own limit begins anew with each byte of an answer."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        import gevent

        method = getattr(self._client, name)

        def call(*args: Any, **options: Any) -> Any:
            late = TimeoutError(f"there was no whole answer within {TIMEOUT_SECONDS:g} s")
            with gevent.Timeout(TIMEOUT_SECONDS, late):  # its sockets are gevent's
                return method(*args, **options)

        return call


class TextClient:
    """One connection to a server. A context manager; one thread at a time over HTTP, any number over gRPC.

    address: `host:port`, without a scheme. connection: what else it takes to speak to the server.
    """

    def __init__(self, address: str, protocol: Protocol = "grpc", connection: Connection = PLAIN) -> None:
        self.address, self.protocol, self.connection = address, protocol, connection
        self._api: Any
        limits: dict[str, float] = {}
        if protocol == "grpc":
            import tritonclient.grpc as api
        else:
            import tritonclient.http as api

            limits = {"network_timeout": TIMEOUT_SECONDS, "connection_timeout": _LIVE_SECONDS}
        self._api = api
        try:
            client = connection.open(api, address, protocol, **limits)
            self._client: Any = client if protocol == "grpc" else _Bounded(client)
        except OSError as error:
            raise ServerError(
                f"A file for TLS could not be read for the server at {address}: {error}. Correct REFINERY_TRITON_CA, "
                "REFINERY_TRITON_CERTIFICATE or REFINERY_TRITON_PRIVATE_KEY."
            ) from error

    def __enter__(self) -> TextClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Triton waits for open connections when it is stopped."""
        self._client.close()

    def is_live(self) -> bool:
        """Whether a server answers at the address at all."""
        try:
            return bool(self._client.is_server_live(**self._limit(_LIVE_SECONDS)))
        except Exception:  # the two clients raise errors of five libraries for a port where nobody listens
            return False

    def is_ready(self, model: str) -> bool:
        """Whether the server holds the model. Not whether it answers: only an answer says that."""
        try:
            return bool(self._client.is_model_ready(model, **self._limit(TIMEOUT_SECONDS)))
        except Exception:
            return False

    def ask(
        self,
        model: str,
        contract: Contract,
        items: Sequence[Mapping[str, str | bytes]],
        *,
        as_json: bool = False,
        seconds: float = TIMEOUT_SECONDS,
    ) -> list[Any]:
        """Return the answers to several rows: fp32 `[width]` each, or JSON documents.

        Rows that have the same inputs go in one request. as_json: send and get plain JSON, as curl would; HTTP alone.
        seconds: to wait at most; gRPC alone. Raises ServerError with the server's own words.
        """
        import numpy as np

        # What may be left out is there in all rows of a request, or in none.
        if len(inputs := {frozenset(item) for item in items}) > 1:
            answers: dict[int, Any] = {}
            for names in inputs:
                places = [place for place, item in enumerate(items) if item.keys() == names]
                some = [items[place] for place in places]
                answers |= zip(places, self.ask(model, contract, some, as_json=as_json, seconds=seconds), strict=True)
            return [answers[place] for place in range(len(items))]
        binary = {} if self.protocol == "grpc" else {"binary_data": not as_json}
        tensors = text_tensors(self._api, contract, items, **binary)
        wanted = [self._api.InferRequestedOutput(contract.output, **binary)]
        try:
            answer = self._client.infer(model, tensors, outputs=wanted, **self._limit(seconds)).as_numpy(
                contract.output
            )
        except Exception as error:
            raise self._trouble(f"refused a request to {model}", error) from error
        # Triton does not compare what a Python model answers with its configuration.
        kind = np.dtype(np.object_ if contract.structured else np.float32)
        if answer is None or answer.ndim != 2 or answer.dtype != kind or len(answer) != len(items):
            found = "nothing" if answer is None else f"{answer.dtype} {list(answer.shape)}"
            raise ServerError(
                f"{model} at {self.address} answered {len(items)} rows with {found} as {contract.output!r}, not with "
                f"{kind} [{len(items)}, width]. It is broken: publish another release, or go back to the one before."
            )
        if not contract.structured:
            return list(answer)
        try:
            return [json.loads(row[0]) for row in answer]
        except ValueError as error:
            raise ServerError(
                f"{model} at {self.address} answered with {contract.output!r} that is not JSON: {error}. It is broken: "
                "publish another release, or go back to the one before."
            ) from error

    def rank(self, model: str, contract: Contract, item: Mapping[str, str], count: int) -> list[tuple[str, float]]:
        """Labels and their values, best first, named by the server (Triton's classification extension); gRPC alone.

        Empty for a model without labels. Raises ServerError.
        """
        wanted = [self._api.InferRequestedOutput(contract.output, class_count=count)]
        tensors = text_tensors(self._api, contract, [item])
        try:
            answer = self._client.infer(model, tensors, outputs=wanted, client_timeout=TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble(f"refused a request to {model}", error) from error
        # "value:index", and ":label" where there is one, which may hold colons of its own.
        parts = [entry.decode().split(":", 2) for entry in answer.as_numpy(contract.output).ravel()]
        return [(part[2], float(part[0])) for part in parts if len(part) == 3 and part[2]]

    def contract(self, model: str) -> Contract:
        """What the model takes and gives. Raises ServerError where the server does not have the model."""
        try:
            found = self._client.get_model_metadata(
                model, **self._limit(TIMEOUT_SECONDS), **({"as_json": True} if self.protocol == "grpc" else {})
            )
        except Exception as error:
            raise self._trouble(f"does not serve {model}", error) from error
        output = found["outputs"][0]
        # Text, and not token ids in its place; and what may be left out is left out.
        inputs = tuple(
            str(item["name"])
            for item in found["inputs"]
            if item["datatype"] == "BYTES" and item["name"] not in _OPTIONAL
        )
        return Contract(inputs, str(output["name"]), structured=output["datatype"] == "BYTES")

    def release_of(self, model: str) -> int | None:
        """The number of the release that the server serves under the name; gRPC alone. None: it is not one of ours.

        Raises ServerError where the server does not have the model.
        """
        try:
            config = self._client.get_model_config(model, client_timeout=TIMEOUT_SECONDS).config
        except Exception as error:
            raise self._trouble(f"does not serve {model}", error) from error
        number = config.parameters["refinery_release"].string_value if "refinery_release" in config.parameters else ""
        return int(number) if number.isdigit() else None

    def steps(self, model: str) -> list[str]:
        """The models that an ensemble is made of, in order; none for any other; gRPC alone. Raises ServerError."""
        try:
            config = self._client.get_model_config(model, client_timeout=TIMEOUT_SECONDS).config
        except Exception as error:
            raise self._trouble(f"does not serve {model}", error) from error
        return [step.model_name for step in config.ensemble_scheduling.step]

    def version(self) -> str:
        """The server's name and version. Raises ServerError."""
        try:
            metadata = self._client.get_server_metadata(**self._limit(TIMEOUT_SECONDS))
        except Exception as error:
            raise self._trouble("does not say its version", error) from error
        if self.protocol == "grpc":
            return f"{metadata.name} {metadata.version}"
        return f"{metadata['name']} {metadata['version']}"

    def load(self, model: str, before: Sequence[str] = ()) -> None:
        """Load or reload a model, gRPC alone; `before`: the models that it calls, which Triton does not know of.

        Raises ServerError; the version that served before goes on serving.
        """
        for name in (*before, model):
            try:
                self._client.load_model(name, client_timeout=LOAD_TIMEOUT_SECONDS)
            except Exception as error:
                raise self._trouble(f"cannot load {name}", error) from error

    def unload(self, model: str) -> None:
        """Unload a model, gRPC alone. Raises ServerError."""
        try:
            self._client.unload_model(model, client_timeout=LOAD_TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble(f"cannot unload {model}", error) from error

    def unload_all(self, models: Iterable[str]) -> None:
        """Unload those of the models that are loaded, gRPC alone; what fails is not said: most were never loaded."""
        for model in models:
            with suppress(ServerError):
                self.unload(model)

    def runs_explicit(self) -> bool | None:
        """Whether the server is in explicit model control; None: it does not say. gRPC alone.

        Nothing changes: what it is told to unload is a model that nobody has. Raises ServerError where the server wants
        another key.
        """
        try:
            self._client.unload_model(_NOBODY, client_timeout=TIMEOUT_SECONDS)
        except Exception as error:
            if _RESTRICTED in str(error):
                raise self._trouble("refuses its model-repository API", error) from error
            return False if _NOT_EXPLICIT in str(error) else None
        return True

    def models(self) -> dict[str, str]:
        """The models that the server sees in its repository, loaded or not, each with why it could not be loaded or was
        unloaded, gRPC alone; empty: neither. Raises ServerError.
        """
        try:
            index = self._client.get_model_repository_index(client_timeout=TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble("does not list its models", error) from error
        return {item.name: item.reason if item.state == "UNAVAILABLE" else "" for item in index.models}

    def ready_models(self, *, seconds: float = TIMEOUT_SECONDS) -> set[str]:
        """The models that the server holds ready, gRPC alone. Raises ServerError."""
        try:
            index = self._client.get_model_repository_index(client_timeout=seconds)
        except Exception as error:
            raise self._trouble("does not list its models", error) from error
        return {item.name for item in index.models if item.state == "READY"}

    def failed_requests(self, *, seconds: float = TIMEOUT_SECONDS) -> dict[str, int]:
        """How many requests to each model have failed since it was loaded, gRPC alone. Raises ServerError."""
        try:
            found = self._client.get_inference_statistics(client_timeout=seconds)
        except Exception as error:
            raise self._trouble("does not say what its models did", error) from error
        return {item.name: int(item.inference_stats.fail.count) for item in found.model_stats}

    def _limit(self, seconds: float) -> dict[str, float]:
        return {"client_timeout": seconds} if self.protocol == "grpc" else {}

    def _trouble(self, what: str, error: Exception) -> ServerError:
        """The server's own words, or, where there is no server, how to come by one."""
        message = str(getattr(error, "message", lambda: error)()).strip()
        first = (message.splitlines() or [type(error).__name__])[0][:500].removeprefix("[request id: <id_unknown>] ")
        if "unknown model" in first:
            first += (
                ". Start the server on the repository that holds a release of it (refinery serve), or load it there"
            )
        elif _NOT_EXPLICIT in first:
            first = (
                "it does not run in explicit model control. Start it with --model-control-mode=explicit, or set "
                "REFINERY_TRITON_CONTROL to the mode that it runs in"
            )
        elif with_remedy(first) != first:
            first = with_remedy(first)
        elif not self.is_live():
            return ServerError(
                f"No Triton answers {_NAMES[self.protocol]} at {self.address} ({first}). Start one (refinery serve), "
                "or give the right address."
            )
        return ServerError(f"The server at {self.address} ({_NAMES[self.protocol]}) {what}: {first}.")


def text_tensors(api: Any, contract: Contract, items: Sequence[Mapping[str, str | bytes]], **binary: bool) -> list[Any]:
    """The inputs of one request, strings `[items, 1]` each. api: `tritonclient.grpc` or `tritonclient.http`."""
    import numpy as np

    tensors = []
    given = (*contract.inputs, *(name for name in _OPTIONAL if items and name in items[0]))
    for name in given:
        texts = [item[name] for item in items]
        rows = [[text.encode() if isinstance(text, str) else text] for text in texts]
        tensor = api.InferInput(name, [len(items), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(rows, dtype=np.object_), **binary)
        tensors.append(tensor)
    return tensors


def with_remedy(reason: str) -> str:
    """Why a server cannot load a model, in its own words, with what to do about it where that is known."""
    if "find backend library" in reason or "runtime library" in reason:
        return (
            f"{reason}. It lacks that backend: serve with a Triton that has it, or publish with "
            "REFINERY_TRITON_FLAVOUR=python"
        )
    if _RESTRICTED in reason:
        return (
            f"{reason}. Set REFINERY_TRITON_KEY to the key that it was started with, or REFINERY_TRITON_HEADERS to the "
            "header that it expects. Where it is a `refinery serve`, use the REFINERY_HOME that it uses"
        )
    if "Resource count for" in reason:
        return (
            f"{reason}. Start the server with more of that resource: refinery serve --resource NAME=N, or "
            "--rate-limit-resource=NAME:N. Once it is told of one resource, Triton has none of those that it is not "
            "told of"
        )
    return reason


def serves(address: str, model: str, connection: Connection = PLAIN) -> bool:
    """Whether a Triton server that holds the model answers gRPC there."""
    with TextClient(address, connection=connection) as client:
        return client.is_live() and client.is_ready(model)
