"""Where everything lies and what a step may take: the one object that assets get, made by orchestration.definitions."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from resources.artifacts.remote import RemoteArtifacts
from resources.artifacts.store import ArtifactStore
from resources.boundary.addresses import Address
from resources.catalog.entries import ModelEntry
from resources.catalog.loading import Catalog, load_catalog
from resources.errors import CatalogError
from resources.machine.device import physical_cores
from resources.processes.isolation import Limits
from resources.settings.sources import Access, SourceSettings
from resources.settings.triton import TritonSettings
from resources.storage.locations import Location
from resources.storage.objects import RemotePath

#: Protobuf cannot serialize a message of 2 GiB or more, so larger graphs keep their weights in a file beside them.
#: A little below, because the graph itself takes room too.
EXTERNAL_DATA_THRESHOLD_BYTES = 2**31 - 64 * 2**20
#: Between two looks of the sensor at the same source, and how long a folder must have been still.
WATCH_SECONDS = 30


#: What this process read last: by the catalog's files, and the model.
_ENTRIES: dict[tuple[Path, Path, str], ModelEntry] = {}


@dataclass(frozen=True)
class Workspace:
    """All mutable state lies below `home`, each part of it movable by a field of its own."""

    home: Path
    catalog_path: Path
    targets: tuple[str, ...] = ("cpu",)
    limits: Limits = field(default_factory=Limits)
    external_data_threshold_bytes: int = EXTERNAL_DATA_THRESHOLD_BYTES
    artifacts: Location | None = None
    tracking_uri: Address | None = None
    tracking_ui: Address | None = None
    dagster_ui: Address | None = None
    triton: TritonSettings = field(default_factory=TritonSettings)
    access: Access = Access()
    watch_seconds: int = WATCH_SECONDS

    @property
    def sources(self) -> SourceSettings:
        """How checkpoints are looked for and fetched."""
        return SourceSettings(self.home / "sources", self.mlflow_uri(), self.access)

    @property
    def store(self) -> ArtifactStore:
        folder = self.home / "artifacts"
        if isinstance(self.artifacts, RemotePath):
            return ArtifactStore(folder, RemoteArtifacts(self.artifacts))
        return ArtifactStore(self.artifacts or folder)

    @property
    def additions(self) -> Path:
        """Models files that the command line added."""
        return self.home / "models.d"

    def catalog(self) -> Catalog:
        """Read anew at each call: a long-lived Dagster process must see what was added since. Raises CatalogError."""
        return load_catalog(self.catalog_path, self.additions)

    def entry(self, model: str) -> ModelEntry:
        """The model's entry. Where the catalog cannot be read at the moment, somebody is editing it, and a run that is
        under way goes on with what this process read last. Raises CatalogError where it has read nothing.
        """
        key = (self.catalog_path, self.additions, model)
        unreadable = True
        try:
            catalog = self.catalog()
            unreadable = bool(catalog.refused)
            _ENTRIES[key] = catalog.get(model)
        except CatalogError:
            if not unreadable or key not in _ENTRIES:
                raise
        return _ENTRIES[key]

    @property
    def scratch(self) -> Path:
        """Where releases are made that go to object storage, and looked at when they come from there."""
        return self.home / "staging"

    @property
    def copies(self) -> Path:
        """Where lies what the embedded server serves of repositories in object storage."""
        return self.home / "served"

    def repository(self, target: str) -> Location:
        """The Triton model repository of a target."""
        return self.repositories / target

    @property
    def repositories(self) -> Location:
        """Where the repositories of all targets lie."""
        return self.triton.repositories or self.home / "triton_models"

    def mlflow_uri(self) -> Address:
        return Address(self.tracking_uri or f"sqlite:///{self.home.resolve() / 'mlflow.db'}")

    def log(self, model: str, step: str) -> Path:
        """Where the children of a step write what their libraries print."""
        path = self.home / "logs" / model / f"{step}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def threads(self, entry: ModelEntry) -> int:
        """The most threads that an engine may have: the models file's number, or the cores we may use."""
        return entry.benchmark.threads or len(os.sched_getaffinity(0))

    def baseline_threads(self, entry: ModelEntry) -> int:
        """Threads of PyTorch: the models file's number, or what its users get, one for each physical core."""
        return entry.benchmark.threads or min(self.threads(entry), physical_cores())
