"""What runs, tags and aliases are called. MLflow's table shows every tag as a column, and sorts runs by any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resources.artifacts.fingerprint import library_versions

if TYPE_CHECKING:
    from resources.artifacts.records import Checkpoint

TAG = "refinery."
#: MLflow shows it as the run's description, and renders it as Markdown.
NOTE = "mlflow.note.content"
PARENT = "mlflow.parentRunId"
ALIAS = "champion"
#: Of a version: before the number of each release that was made of it.
RELEASES = f"{TAG}release_"
#: What a run's figures depend on besides the checkpoint: each a tag of its own, so that a comparison that shows
#: differences alone shows the one that changed.
LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "openvino", "tensorrt")
#: MLflow's own limit is 8,000 characters, of older servers 5,000.
_LONGEST_NOTE = 4000


def run_name(what: str, revision: str, target: str) -> str:
    """`onnxruntime_int8 @ 2e2b8be9b45a (cpu)`: sorted by name, an engine's runs stand together, by revision."""
    return f"{what} @ {revision[:12]} ({target})"


def checkpoint_tags(checkpoint: Checkpoint) -> dict[str, str]:
    """Of every run: what was optimized, and with which libraries."""
    versions = library_versions(*LIBRARIES)
    return {
        f"{TAG}model": checkpoint.model,
        f"{TAG}revision": checkpoint.revision,
        f"{TAG}allow_pickle": yes(checkpoint.allow_pickle),
        f"{TAG}trust_remote_code": yes(checkpoint.trust_remote_code),
        **{f"{TAG}version.{name}": version for name, version in versions.items() if version != "absent"},
    }


def note(*sentences: str) -> dict[str, str]:
    """The tag that is a description, a paragraph a sentence; empty ones are left out."""
    return {NOTE: "\n\n".join(filter(None, sentences))[:_LONGEST_NOTE]}


def yes(value: bool) -> str:
    """As a tag says it."""
    return "true" if value else "false"
