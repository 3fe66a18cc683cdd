"""Send test requests to one release, either as the release that serves or under a second name beside it."""

from __future__ import annotations

import json
from pathlib import Path

from resources.errors import ServerError
from resources.pipelines import PIPELINE_FILE
from resources.storage.locations import Location
from resources.tasks import TASKS
from resources.tasks.base import broken_answers
from resources.triton.client import TextClient
from resources.triton.config import write_config
from resources.triton.layout import CONFIG, internal_name
from resources.triton.release import Release

_TEXT = "Is this release what was published?"


def write_alias(repository: Location, release: Release, root: Path) -> str:
    """Write a second public model of the release below `root`, and return its name.

    The name exists for test requests only. No user sends requests to it, so the models that serve are not touched.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    name = internal_name(release.model, release.number, "proof")
    pointer = repository / release.model / str(release.number) / CONFIG
    config = text_format.Parse(pointer.read_text(encoding="utf-8"), ModelConfig())
    config.name = name
    config.ClearField("response_cache")  # an answer from the cache proves nothing
    (root / name / str(release.number)).mkdir(parents=True)
    (root / name / str(release.number) / "placeholder").touch()
    write_config(config, root / name / CONFIG)
    return name


def ask(client: TextClient, repository: Location, release: Release, name: str | None = None) -> None:
    """Send a few short requests to the server's model, and check that the model is the release and answers.

    Args:
        client: A gRPC connection to the server.
        repository: The repository that holds the release.
        release: The release that must answer.
        name: The model to send the requests to. None means the public model of the release.

    Raises:
        ServerError: The model is not the release, does not answer, or gives a broken answer.
    """
    name = name or release.model
    number = client.release_of(name)
    if number != release.number:
        raise ServerError(
            f"The server at {client.address} serves {f'release {number}' if number else 'something else'} as "
            f"{release.model}, not release {release.number}."
        )
    front = next(file for file in release.files if file.endswith(f"/{PIPELINE_FILE}"))
    settings = json.loads((repository / front).read_text(encoding="utf-8"))["settings"]
    contract = client.contract(name)
    for item in TASKS[release.task].odd_items(settings, _TEXT):
        answers = client.ask(name, contract, [item])
        broken = broken_answers(answers, answers)
        if broken:
            raise ServerError(f"{release.model}: release {release.number} answers {item} with {broken}.")
