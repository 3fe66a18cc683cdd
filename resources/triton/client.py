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
                address, network_timeout=TIMEOUT_SECONDS, connection_timeout=TIMEOUT_SECONDS
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
            return bool(self._client.is_server_live(**self._limit(2.0)))
        except Exception:  # the two clients raise errors of five libraries for a port where nobody listens
            return False

    def is_ready(self, model: str) -> bool:
        """Whether the server holds the model. Not whether it answers: only an answer says that."""
        try:
            return bool(self._client.is_model_ready(model, **self._limit(TIMEOUT_SECONDS)))
        except Exception:
            return False

    def ask(self, model: str, output: str, texts: Sequence[str | bytes]) -> np.ndarray:
        """The answers fp32 `[texts, width]` to one request. Raises ServerError with the server's own words."""
        import numpy as np

        rows = [[text.encode() if isinstance(text, str) else text] for text in texts]
        tensor = self._api.InferInput(TEXT, [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(rows, dtype=np.object_))
        wanted = [self._api.InferRequestedOutput(output)]
        limit = {"client_timeout": TIMEOUT_SECONDS} if self.protocol == "grpc" else {}
        try:
            answer: np.ndarray = self._client.infer(model, [tensor], outputs=wanted, **limit).as_numpy(output)
        except Exception as error:
            raise ServerError(f"{model} at {self.address} ({self.protocol}): {_first_line(error)}") from error
        return answer

    def output_of(self, model: str) -> str:
        """The name of a model's one output. Raises ServerError where the server does not have the model."""
        try:
            metadata = self._client.get_model_metadata(model, **self._limit(TIMEOUT_SECONDS))
        except Exception as error:
            raise ServerError(
                f"The server at {self.address} does not serve {model}: {_first_line(error)} Start it on the repository "
                f"that holds a release of {model} (refinery serve), or load it there."
            ) from error
        outputs = metadata.outputs if self.protocol == "grpc" else metadata["outputs"]
        return str(outputs[0].name if self.protocol == "grpc" else outputs[0]["name"])

    def version(self) -> str:
        """The server's name and version."""
        metadata = self._client.get_server_metadata(**self._limit(TIMEOUT_SECONDS))
        if self.protocol == "grpc":
            return f"{metadata.name} {metadata.version}"
        return f"{metadata['name']} {metadata['version']}"

    def load(self, model: str) -> None:
        """Load or reload a model, gRPC alone. Raises ServerError; the version that served before goes on serving."""
        try:
            self._client.load_model(model, client_timeout=LOAD_TIMEOUT_SECONDS)
        except Exception as error:
            raise ServerError(f"The server at {self.address} cannot load {model}: {_first_line(error)}") from error

    def unload(self, model: str) -> None:
        """Unload a model, gRPC alone. Raises ServerError."""
        try:
            self._client.unload_model(model, client_timeout=LOAD_TIMEOUT_SECONDS)
        except Exception as error:
            raise ServerError(f"The server at {self.address} cannot unload {model}: {_first_line(error)}") from error

    def _limit(self, seconds: float) -> dict[str, float]:
        return {"client_timeout": seconds} if self.protocol == "grpc" else {}


def is_live(address: str) -> bool:
    """Whether a Triton server answers gRPC there."""
    with TextClient(address) as client:
        return client.is_live()


def query_texts(address: str, model: str, texts: Sequence[str], protocol: Protocol = "grpc") -> np.ndarray:
    """The answers fp32 `[texts, width]`, one request a text: batching is the server's work."""
    import numpy as np

    with TextClient(address, protocol) as client:
        output = client.output_of(model)
        return np.concatenate([client.ask(model, output, [text]) for text in texts])


def _first_line(error: Exception) -> str:
    message = str(getattr(error, "message", lambda: error)())
    return (message.strip().splitlines() or [type(error).__name__])[0][:500]
