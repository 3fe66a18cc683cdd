"""Whom sources are asked of, and as whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from resources.boundary.addresses import Address, authorization
from resources.boundary.http import Tls

HUB = Address("https://huggingface.co")
_OWN_STORE = Address("sqlite:///.refinery/mlflow.db")


@dataclass(frozen=True)
class Access:
    """Addresses and credentials of services that hold checkpoints. None: asked as nobody."""

    hub_endpoint: Address = HUB
    hub_token: str | None = field(default=None, repr=False)
    hub_cache: Path = Path("~/.cache/huggingface/hub")
    hub_offline: bool = False
    mlflow_username: str | None = None
    mlflow_password: str | None = field(default=None, repr=False)
    mlflow_token: str | None = field(default=None, repr=False)
    mlflow_trust: Tls = field(default_factory=Tls)
    azure_key: str | None = field(default=None, repr=False)

    @property
    def hub_headers(self) -> dict[str, str]:
        """Who asks the Hub: by a token, or by the name and password of a mirror's address."""
        return {"Authorization": f"Bearer {self.hub_token}"} if self.hub_token else self.hub_endpoint.authorization


@dataclass(frozen=True)
class SourceSettings:
    """folder: where copies of what a registry or an object store holds lie, and what was found out about sources.

    tracking_uri: of the MLflow whose registry `models:/` means.
    """

    folder: Path = Path(".refinery/sources")
    tracking_uri: Address = _OWN_STORE
    access: Access = Access()

    @property
    def mlflow_login(self) -> tuple[str, str] | None:
        """The name and password for the tracking server: its address's, or those of MLflow's variables."""
        name, password = self.access.mlflow_username, self.access.mlflow_password
        given = (name, password) if name is not None and password is not None else None
        return self.tracking_uri.login or given

    @property
    def mlflow_headers(self) -> dict[str, str]:
        """As MLflow's client sends it: a name and password before a token."""
        if self.mlflow_login is not None:
            return authorization(*self.mlflow_login)
        return {"Authorization": f"Bearer {self.access.mlflow_token}"} if self.access.mlflow_token else {}
