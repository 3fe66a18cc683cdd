"""Addresses of the services that hold checkpoints, and the credentials for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from resources.boundary.addresses import Address, authorization
from resources.boundary.http import Tls

HUB = Address("https://huggingface.co")
_OWN_STORE = Address("sqlite:///.refinery/mlflow.db")


@dataclass(frozen=True)
class Access:
    """Addresses and credentials of services that hold checkpoints.

    A credential that is None is not sent.
    """

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
        """The Hub's authorization header, from the token or from the name and password in a mirror's address."""
        return {"Authorization": f"Bearer {self.hub_token}"} if self.hub_token else self.hub_endpoint.authorization


@dataclass(frozen=True)
class SourceSettings:
    """The local folder, the registry and the credentials that are used to find and fetch sources.

    Args:
        folder: The folder with the copies of registry versions and of object storage, and with the answers about
            sources.
        tracking_uri: The address of the MLflow whose registry holds the `models:/` sources.
        access: The addresses and credentials of the services.
    """

    folder: Path = Path(".refinery/sources")
    tracking_uri: Address = _OWN_STORE
    access: Access = Access()

    @property
    def mlflow_login(self) -> tuple[str, str] | None:
        """The name and password for the tracking server, from its address or from MLflow's variables."""
        name, password = self.access.mlflow_username, self.access.mlflow_password
        given = (name, password) if name is not None and password is not None else None
        return self.tracking_uri.login or given

    @property
    def mlflow_headers(self) -> dict[str, str]:
        """The tracking server's authorization header. As in MLflow's client, a login is preferred to a token."""
        if self.mlflow_login is not None:
            return authorization(*self.mlflow_login)
        return {"Authorization": f"Bearer {self.access.mlflow_token}"} if self.access.mlflow_token else {}
