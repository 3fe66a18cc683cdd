"""The workspace: the paths, limits and settings that every asset gets.

orchestration.definitions makes the one workspace object.
"""

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
#: The threshold is 64 MiB lower, because the graph itself takes room too.
EXTERNAL_DATA_THRESHOLD_BYTES = 2**31 - 64 * 2**20
#: The time between two looks of the sensor at the same source, and the time that a folder must have been unchanged.
WATCH_SECONDS = 30


#: The entries that this process read last, by the catalog's paths and the model's name.
_ENTRIES: dict[tuple[Path, Path, str], ModelEntry] = {}


@dataclass(frozen=True)
class Workspace:
    """The folders, limits and settings of one installation.

    By default all mutable state lies below `home`. A field of its own can move each part elsewhere.
    """

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
        """The settings for finding and fetching checkpoints."""
        return SourceSettings(self.home / "sources", self.mlflow_uri(), self.access)

    @property
    def store(self) -> ArtifactStore:
        """The artifact store, in a folder or in object storage."""
        folder = self.home / "artifacts"
        if isinstance(self.artifacts, RemotePath):
            return ArtifactStore(folder, RemoteArtifacts(self.artifacts))
        return ArtifactStore(self.artifacts or folder)

    @property
    def additions(self) -> Path:
        """The folder with the models files that the command line added."""
        return self.home / "models.d"

    def catalog(self) -> Catalog:
        """Read the catalog anew, because a long-lived Dagster process must see later additions.

        Raises:
            CatalogError: The models file cannot be read or has a mistake.
        """
        return load_catalog(self.catalog_path, self.additions)

    def entry(self, model: str) -> ModelEntry:
        """Return the model's catalog entry.

        If the catalog cannot be read at the moment, a user is probably editing it. A run that is under way then
        continues with the entry that this process read last.

        Raises:
            CatalogError: The catalog has no such model, or it cannot be read and this process has not read the entry
                before.
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
        """The folder in which releases for object storage are made, and releases from object storage are inspected."""
        return self.home / "staging"

    @property
    def copies(self) -> Path:
        """The folder with local copies of repositories in object storage, for the embedded server."""
        return self.home / "served"

    def repository(self, target: str) -> Location:
        """Return the Triton model repository of a target."""
        return self.repositories / target

    @property
    def repositories(self) -> Location:
        """The folder or prefix that holds the repositories of all targets."""
        return self.triton.repositories or self.home / "triton_models"

    def mlflow_uri(self) -> Address:
        """Return the address of MLflow: the configured one, or else a SQLite file below `home`."""
        return Address(self.tracking_uri or f"sqlite:///{self.home.resolve() / 'mlflow.db'}")

    def log(self, model: str, step: str) -> Path:
        """Return the file for the output of a step's child processes, and create its folder."""
        path = self.home / "logs" / model / f"{step}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def threads(self, entry: ModelEntry) -> int:
        """Return the most threads that an engine may use: the models file's number, or the cores we may use."""
        return entry.benchmark.threads or len(os.sched_getaffinity(0))

    def baseline_threads(self, entry: ModelEntry) -> int:
        """Return the number of threads of PyTorch.

        It is the models file's number, or else PyTorch's own default, which is one for each physical core.
        """
        return entry.benchmark.threads or min(self.threads(entry), physical_cores())
