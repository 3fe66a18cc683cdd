"""Whom sources are asked of, and as whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Access:
    """Addresses and credentials of services that hold checkpoints. None: asked as nobody."""

    hub_endpoint: str = HUB
    hub_token: str | None = field(default=None, repr=False)
    hub_cache: Path = Path("~/.cache/huggingface/hub")
    hub_offline: bool = False
    mlflow_username: str | None = None
    mlflow_password: str | None = field(default=None, repr=False)
    mlflow_token: str | None = field(default=None, repr=False)
    azure_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class SourceSettings:
    """folder: where copies of what a registry or an object store holds lie, and what was found out about sources.

    tracking_uri: of the MLflow whose registry `models:/` means.
    """

    folder: Path = Path(".refinery/sources")
    tracking_uri: str = "sqlite:///.refinery/mlflow.db"
    access: Access = Access()
