"""The names of runs, tags and aliases.

MLflow's table shows every tag as a column, and can sort runs by any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resources.artifacts.fingerprint import library_versions

if TYPE_CHECKING:
    from resources.artifacts.records import Checkpoint

TAG = "refinery."
#: MLflow shows this tag as the run's description, and renders it as Markdown.
NOTE = "mlflow.note.content"
PARENT = "mlflow.parentRunId"
ALIAS = "champion"
#: A version has a tag with this prefix for each release that was made of it, followed by the release's number.
RELEASES = f"{TAG}release_"
#: The libraries that a run's figures depend on. Each version is a tag of its own, so that a comparison in MLflow that
#: shows only differences shows the library that changed.
LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "openvino", "tensorrt")
#: MLflow's own limit is 8,000 characters. The limit of older servers is 5,000.
_LONGEST_NOTE = 4000


def run_name(what: str, revision: str, target: str) -> str:
    """Return a run's name, such as `onnxruntime_int8 @ 2e2b8be9b45a (cpu)`.

    In a table that is sorted by name, the runs of an engine are together, ordered by revision.
    """
    return f"{what} @ {revision[:12]} ({target})"


def checkpoint_tags(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tags of every run: the checkpoint that is optimized, and the versions of the libraries."""
    versions = library_versions(*LIBRARIES)
    return {
        f"{TAG}model": checkpoint.model,
        f"{TAG}revision": checkpoint.revision,
        f"{TAG}allow_pickle": yes(checkpoint.allow_pickle),
        f"{TAG}trust_remote_code": yes(checkpoint.trust_remote_code),
        **{f"{TAG}version.{name}": version for name, version in versions.items() if version != "absent"},
    }


def note(*sentences: str) -> dict[str, str]:
    """Return the tag of a run's description, with one paragraph for each sentence that is not empty."""
    return {NOTE: "\n\n".join(filter(None, sentences))[:_LONGEST_NOTE]}


def yes(value: bool) -> str:
    """Return a boolean as the text of a tag."""
    return "true" if value else "false"
