"""Asking a Triton server, over gRPC or HTTP, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from resources.errors import ServerError

if TYPE_CHECKING:
    import numpy as np

Protocol = Literal["grpc", "http"]
TEXT = "TEXT"
#: For questions. Loading a model has a limit of its own.
TIMEOUT_SECONDS = 60.0
LOAD_TIMEOUT_SECONDS = 300.0
#: For "is there a server at all".
_LIVE_SECONDS = 2.0


class TextClient:
    """One connection to a server. A context manager; one thread at a time over HTTP, any number over gRPC.

    address: `host:port`, without a scheme.
    """

    def __init__(self, address: str, protocol: Protocol = "grpc") -> None:
        self.address, self.protocol = address, protocol
        self._api: Any
        if protocol == "grpc":
            import tritonclient.grpc as api

            self._client: Any = api.InferenceServerClient(address)
        else:
            import tritonclient.http as api

            self._client = api.InferenceServerClient(
                address, network_timeout=TIMEOUT_SECONDS, connection_timeout=_LIVE_SECONDS
            )
        self._api = api

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

    def ask(self, model: str, output: str, texts: Sequence[str | bytes], *, as_json: bool = False) -> np.ndarray:
        """The answers fp32 `[texts, width]` to one request. Raises ServerError with the server's own words.

        as_json: send and get plain JSON, as curl would; HTTP alone.
        """
        import numpy as np

        rows = [[text.encode() if isinstance(text, str) else text] for text in texts]
        tensor = self._api.InferInput(TEXT, [len(texts), 1], "BYTES")
        binary = {} if self.protocol == "grpc" else {"binary_data": not as_json}
        tensor.set_data_from_numpy(np.array(rows, dtype=np.object_), **binary)
        wanted = [self._api.InferRequestedOutput(output, **binary)]
        limit = {"client_timeout": TIMEOUT_SECONDS} if self.protocol == "grpc" else {}
        try:
            answer = self._client.infer(model, [tensor], outputs=wanted, **limit).as_numpy(output)
        except Exception as error:
            raise self._trouble(f"refused a request to {model}", error) from error
        # Triton does not compare what a Python model answers with its configuration.
        if answer is None or answer.ndim != 2 or answer.dtype != np.float32 or len(answer) != len(texts):
            found = "nothing" if answer is None else f"{answer.dtype} {list(answer.shape)}"
            raise ServerError(
                f"{model} at {self.address} answered {len(texts)} texts with {found} as {output!r}, not with "
                f"float32 [{len(texts)}, width]. It is broken: publish another release, or go back to the one before."
            )
        answers: np.ndarray = answer
        return answers

    def rank(self, model: str, output: str, text: str, count: int) -> list[tuple[str, float]]:
        """Labels and their values, best first, named by the server (Triton's classification extension); gRPC alone.

        Empty for a model without labels. Raises ServerError.
        """
        import numpy as np

        tensor = self._api.InferInput(TEXT, [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
        wanted = [self._api.InferRequestedOutput(output, class_count=count)]
        try:
            answer = self._client.infer(model, [tensor], outputs=wanted, client_timeout=TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble(f"refused a request to {model}", error) from error
        # "value:index", and ":label" where there is one, which may hold colons of its own.
        parts = [item.decode().split(":", 2) for item in answer.as_numpy(output).ravel()]
        return [(part[2], float(part[0])) for part in parts if len(part) == 3 and part[2]]

    def output_of(self, model: str) -> str:
        """The name of a model's one output. Raises ServerError where the server does not have the model."""
        try:
            metadata = self._client.get_model_metadata(model, **self._limit(TIMEOUT_SECONDS))
        except Exception as error:
            raise self._trouble(f"does not serve {model}", error) from error
        outputs = metadata.outputs if self.protocol == "grpc" else metadata["outputs"]
        return str(outputs[0].name if self.protocol == "grpc" else outputs[0]["name"])

    def version(self) -> str:
        """The server's name and version. Raises ServerError."""
        try:
            metadata = self._client.get_server_metadata(**self._limit(TIMEOUT_SECONDS))
        except Exception as error:
            raise self._trouble("does not say its version", error) from error
        if self.protocol == "grpc":
            return f"{metadata.name} {metadata.version}"
        return f"{metadata['name']} {metadata['version']}"

    def load(self, model: str) -> None:
        """Load or reload a model, gRPC alone. Raises ServerError; the version that served before goes on serving."""
        try:
            self._client.load_model(model, client_timeout=LOAD_TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble(f"cannot load {model}", error) from error

    def unload(self, model: str) -> None:
        """Unload a model, gRPC alone. Raises ServerError."""
        try:
            self._client.unload_model(model, client_timeout=LOAD_TIMEOUT_SECONDS)
        except Exception as error:
            raise self._trouble(f"cannot unload {model}", error) from error

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
        elif not self.is_live():
            return ServerError(
                f"No Triton answers {self.protocol} at {self.address} ({first}). Start one (refinery serve), or give "
                "the right address."
            )
        return ServerError(f"The server at {self.address} ({self.protocol}) {what}: {first}.")


def serves(address: str, model: str) -> bool:
    """Whether a Triton server that holds the model answers gRPC there."""
    with TextClient(address) as client:
        return client.is_live() and client.is_ready(model)


def query_texts(address: str, model: str, texts: Sequence[str], protocol: Protocol = "grpc") -> np.ndarray:
    """The answers fp32 `[texts, width]`, one request a text: batching is the server's work. Raises ServerError."""
    import numpy as np

    with TextClient(address, protocol) as client:
        output = client.output_of(model)
        return np.concatenate([client.ask(model, output, [text]) for text in texts])


def query_ranked(
    address: str, model: str, texts: Sequence[str], count: int = 8
) -> tuple[np.ndarray, list[list[tuple[str, float]]]]:
    """The answers fp32 `[texts, width]`, and the best labels of each, none where the model has no labels."""
    answers = query_texts(address, model, texts)
    with TextClient(address) as client:
        output = client.output_of(model)
        count, ranked = min(count, answers.shape[1]), []
        for text in texts:
            ranked.append(client.rank(model, output, text, count))
            if not ranked[0]:
                return answers, [[] for _ in texts]
        return answers, ranked
