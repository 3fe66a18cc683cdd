"""A client of a Triton server, over gRPC or HTTP, whose errors say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from resources.errors import ServerError
from resources.settings.connection import PLAIN, Connection, Protocol

_NAMES: dict[Protocol, str] = {"grpc": "gRPC", "http": "HTTP"}
#: The limit for requests. Loading a model takes longer, so it has a limit of its own.
TIMEOUT_SECONDS = 60.0
LOAD_TIMEOUT_SECONDS = 300.0
#: The limit for finding out whether there is a server at all.
_LIVE_SECONDS = 2.0
#: Part of Triton's error when a client loads or unloads a model in a mode other than explicit.
_NOT_EXPLICIT = "not allowed if polling is enabled"
#: Part of Triton's error when a client calls a restricted API without the right header.
_RESTRICTED = "restricted, expecting header"
#: Inputs of public models that a request may leave out.
_OPTIONAL = ("TEXT_PAIR",)
#: A name that no model has, because releases are numbered from 1.
_NOBODY = "nobody__r0__proof"


@dataclass(frozen=True)
class Contract:
    """The inputs and the output of a public model.

    Args:
        structured: Whether answers are JSON documents. Otherwise they are fp32 numbers.
    """

    inputs: tuple[str, ...]
    output: str
    structured: bool


class _Bounded:
    """A wrapper around the HTTP client that bounds the whole time of each call.

    The client's own limit starts again with each byte of an answer, so a slow answer could last for ever.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        import gevent

        method = getattr(self._client, name)

        def call(*args: Any, **options: Any) -> Any:
            late = TimeoutError(f"there was no whole answer within {TIMEOUT_SECONDS:g} s")
            with gevent.Timeout(TIMEOUT_SECONDS, late):  # works because the client's sockets are gevent's
                return method(*args, **options)

        return call


class TextClient:
    """One connection to a server, as a context manager.

    Over gRPC any number of threads may use it, over HTTP one thread at a time.

    Args:
        address: The server's `host:port`, without a scheme.
        protocol: The protocol of all requests.
        connection: The key, the headers and the TLS settings that the server needs.
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
        """Close the connection. A Triton that is stopped waits for open connections."""
        self._client.close()

    def is_live(self) -> bool:
        """Return whether a server answers at the address at all."""
        try:
            return bool(self._client.is_server_live(**self._limit(_LIVE_SECONDS)))
        except Exception:  # for a port where nothing listens, the two clients raise errors of five libraries
            return False

    def is_ready(self, model: str) -> bool:
        """Return whether the server holds the model. Only a request shows whether the model also answers."""
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

        Rows that have the same inputs are sent in one request.

        Args:
            model: The public model that answers.
            contract: The model's inputs and output.
            items: The rows, each with its texts by input.
            as_json: Whether requests and answers are plain JSON, as curl sends it. HTTP only.
            seconds: The longest time to wait for one request. gRPC only.

        Raises:
            ServerError: The server refuses a request, which the error quotes, or an answer does not fit the contract.
        """
        import numpy as np

        # A request has one tensor for each input, so an optional input must be in all of its rows or in none.
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
        # Triton does not check that the answer of a Python model fits the model's configuration.
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
        """Return up to `count` labels with their values, best first. gRPC only.

        The server names the labels (Triton's classification extension). The list is empty for a model without labels.

        Raises:
            ServerError: The server refuses the request.
        """
        wanted = [self._api.InferRequestedOutput(contract.output, class_count=count)]
        tensors = text_tensors(self._api, contract, [item])
        try:
            answer = self._client.infer(model, tensors, outputs=wanted, client_timeout=TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble(f"refused a request to {model}", error) from error
        # An entry is "value:index", or "value:index:label". The label may contain colons.
        parts = [entry.decode().split(":", 2) for entry in answer.as_numpy(contract.output).ravel()]
        return [(part[2], float(part[0])) for part in parts if len(part) == 3 and part[2]]

    def contract(self, model: str) -> Contract:
        """Return the inputs and the output of a model.

        Raises:
            ServerError: The server does not have the model, or does not answer.
        """
        try:
            found = self._client.get_model_metadata(
                model, **self._limit(TIMEOUT_SECONDS), **({"as_json": True} if self.protocol == "grpc" else {})
            )
        except Exception as error:
            raise self._trouble(f"does not serve {model}", error) from error
        output = found["outputs"][0]
        # The contract has the texts only. Token ids may be sent in their place, and optional texts may be left out.
        inputs = tuple(
            str(item["name"])
            for item in found["inputs"]
            if item["datatype"] == "BYTES" and item["name"] not in _OPTIONAL
        )
        return Contract(inputs, str(output["name"]), structured=output["datatype"] == "BYTES")

    def release_of(self, model: str) -> int | None:
        """Return the number of the release that the server serves under the name. gRPC only.

        Returns:
            The release number, or None if the model is not a release of this project.

        Raises:
            ServerError: The server does not have the model, or does not answer.
        """
        try:
            config = self._client.get_model_config(model, client_timeout=TIMEOUT_SECONDS).config
        except Exception as error:
            raise self._trouble(f"does not serve {model}", error) from error
        number = config.parameters["refinery_release"].string_value if "refinery_release" in config.parameters else ""
        return int(number) if number.isdigit() else None

    def steps(self, model: str) -> list[str]:
        """Return the models of an ensemble's steps, in order. gRPC only.

        The list is empty for a model that is not an ensemble.

        Raises:
            ServerError: The server does not have the model, or does not answer.
        """
        try:
            config = self._client.get_model_config(model, client_timeout=TIMEOUT_SECONDS).config
        except Exception as error:
            raise self._trouble(f"does not serve {model}", error) from error
        return [step.model_name for step in config.ensemble_scheduling.step]

    def version(self) -> str:
        """Return the server's name and version.

        Raises:
            ServerError: The server does not answer.
        """
        try:
            metadata = self._client.get_server_metadata(**self._limit(TIMEOUT_SECONDS))
        except Exception as error:
            raise self._trouble("does not say its version", error) from error
        if self.protocol == "grpc":
            return f"{metadata.name} {metadata.version}"
        return f"{metadata['name']} {metadata['version']}"

    def load(self, model: str, before: Sequence[str] = ()) -> None:
        """Load or reload a model. gRPC only.

        Args:
            model: The model to load.
            before: The models to load first. Triton does not know that a Python model calls them.

        Raises:
            ServerError: The server cannot load a model. The version that served before goes on serving.
        """
        for name in (*before, model):
            try:
                self._client.load_model(name, client_timeout=LOAD_TIMEOUT_SECONDS)
            except Exception as error:
                raise self._trouble(f"cannot load {name}", error) from error

    def unload(self, model: str) -> None:
        """Unload a model. gRPC only.

        Raises:
            ServerError: The server cannot unload the model.
        """
        try:
            self._client.unload_model(model, client_timeout=LOAD_TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble(f"cannot unload {model}", error) from error

    def unload_all(self, models: Iterable[str]) -> None:
        """Unload the models that are loaded. gRPC only.

        Errors are ignored, because most of the models were never loaded.
        """
        for model in models:
            with suppress(ServerError):
                self.unload(model)

    def runs_explicit(self) -> bool | None:
        """Return whether the server runs in explicit model control, or None if it does not say. gRPC only.

        The method asks the server to unload a model that does not exist, so nothing changes.

        Raises:
            ServerError: The server wants another key.
        """
        try:
            self._client.unload_model(_NOBODY, client_timeout=TIMEOUT_SECONDS)
        except Exception as error:
            if _RESTRICTED in str(error):
                raise self._trouble("refuses its model-repository API", error) from error
            return False if _NOT_EXPLICIT in str(error) else None
        return True

    def models(self) -> dict[str, str]:
        """Return the models that the server sees in its repository, loaded or not. gRPC only.

        Returns:
            The models, each with the reason why it could not be loaded or was unloaded. Otherwise the reason is empty.

        Raises:
            ServerError: The server does not list its models.
        """
        try:
            index = self._client.get_model_repository_index(client_timeout=TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble("does not list its models", error) from error
        return {item.name: item.reason if item.state == "UNAVAILABLE" else "" for item in index.models}

    def ready_models(self, *, seconds: float = TIMEOUT_SECONDS) -> set[str]:
        """Return the models that the server holds ready. gRPC only.

        Raises:
            ServerError: The server does not list its models.
        """
        try:
            index = self._client.get_model_repository_index(client_timeout=seconds)
        except Exception as error:
            raise self._trouble("does not list its models", error) from error
        return {item.name for item in index.models if item.state == "READY"}

    def failed_requests(self, *, seconds: float = TIMEOUT_SECONDS) -> dict[str, int]:
        """Return how many requests to each model have failed since it was loaded. gRPC only.

        Raises:
            ServerError: The server does not give its statistics.
        """
        try:
            found = self._client.get_inference_statistics(client_timeout=seconds)
        except Exception as error:
            raise self._trouble("does not say what its models did", error) from error
        return {item.name: int(item.inference_stats.fail.count) for item in found.model_stats}

    def _limit(self, seconds: float) -> dict[str, float]:
        return {"client_timeout": seconds} if self.protocol == "grpc" else {}

    def _trouble(self, what: str, error: Exception) -> ServerError:
        """Return an error with the server's own words, or with the way to start a server if none is live."""
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
    """Return the input tensors of one request, strings `[items, 1]` each.

    Args:
        api: `tritonclient.grpc` or `tritonclient.http`.
        contract: The inputs of the model.
        items: The rows of the request. All rows have the same inputs.
        **binary: The HTTP client's option `binary_data`, where that client is used.
    """
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
    """Return the server's reason for not loading a model, with the remedy added if one is known."""
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
    """Return whether a Triton server answers gRPC at the address and holds the model."""
    with TextClient(address, connection=connection) as client:
        return client.is_live() and client.is_ready(model)
