"""Compare the resources that the models' rate limiters take with the resources that a server is given."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from resources.errors import ServerError
from resources.settings.triton import Control
from resources.triton.layout import CONFIG, named_internals, public_models


def require_resources(repository: Path, given: Mapping[str, int], control: Control) -> list[str]:
    """Check that the given resources are enough for every model, and return those that no model takes.

    Without any given resource, Triton has as many of each as the neediest instance takes. As soon as one is given,
    Triton has 0 of the others.

    Args:
        repository: The repository to serve.
        given: The number of each resource that the server gets.
        control: The model control mode, which decides which models the server would load.

    Raises:
        ServerError: A model that the server would load takes more than is given. Triton would not load it.
    """
    if not given:
        return []
    needs = _needs(repository, control)
    short = {name: need for name, need in needs.items() if given.get(name, 0) < need[0]}
    if short:
        said = [
            f"{model} takes {count} of {name!r}, and there are {given.get(name, 0)}"
            for name, (count, model) in short.items()
        ]
        enough = {name: max(count, given.get(name, 0)) for name, (count, _) in needs.items()}
        options = " ".join(f"--resource {name}={count}" for name, count in sorted(enough.items()))
        raise ServerError(
            f"{'; '.join(said)}. Say at least {options}, or leave --resource out: then there is as much as the largest "
            "need of one instance. Once one resource is said, there is none of those that are not."
        )
    return sorted(given.keys() - needs.keys())


def _needs(repository: Path, control: Control) -> dict[str, tuple[int, str]]:
    """Return the most that one instance takes of each resource, with the name of its model."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    names = [path.name for path in repository.iterdir()]
    if control == "explicit":
        names = [name for model in public_models(repository) for name in (model, *_parts(repository / model / CONFIG))]
    needs: dict[str, tuple[int, str]] = {}
    for name in names:
        with suppress(OSError, UnicodeDecodeError, text_format.ParseError):  # Triton reports what is wrong
            config = text_format.Parse((repository / name / CONFIG).read_text(encoding="utf-8"), ModelConfig())
            for group in config.instance_group:
                for resource in group.rate_limiter.resources:
                    needs[resource.name] = max(needs.get(resource.name, (0, "")), (resource.count, name))
    return needs


def _parts(pointer: Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return named_internals(pointer.read_text(encoding="utf-8"))
    return []
