"""The version that a registry source names now, from a tracking server's REST API.

MLflow's own client would do the same, but takes seconds and 120 MB to import. Stores that only the client can read are
looked at in resources.checkpoints.watch.background.
"""

from __future__ import annotations

from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode

from resources.boundary.http import get_json
from resources.checkpoints.sources.registry import Reference, Version, checked, missing, parse_reference, unanswered
from resources.settings.sources import SourceSettings


def ask_version(source: str, settings: SourceSettings) -> Version:
    """Return the version that the source names, by one request to the server at `settings.tracking_uri`.

    Raises:
        CheckpointError: The server does not answer or has no such version, or the version cannot be a checkpoint.
    """
    reference, uri = parse_reference(source), settings.tracking_uri
    path, query = _question(reference)
    url = f"{uri}/api/2.0/mlflow/{path}?{urlencode(query)}"
    try:
        answer = get_json(url, settings.mlflow_headers, settings.access.mlflow_trust)
        found: list[dict[str, Any]] = answer.get("model_versions") or [answer.get("model_version")]
        data = found[0]
        if data is None:
            raise missing(reference, uri)
        version = Version(
            name=reference.name,
            number=str(data["version"]),
            address=str(data.get("source", "")),
            status=str(data.get("status", "READY")),
            made=int(data.get("creation_timestamp", 0)),
            tags={tag["key"]: tag.get("value", "") for tag in data.get("tags", ())},
        )
    except HTTPError as error:
        with error:
            refused = error.code in (400, 404)
        raise missing(reference, uri) if refused else unanswered(reference, uri, error) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise unanswered(reference, uri, error) from error
    return checked(reference, version)


def _question(reference: Reference) -> tuple[str, dict[str, str]]:
    if reference.alias is not None:
        return "registered-models/alias", {"name": reference.name, "alias": reference.alias}
    if reference.version is not None:
        return "model-versions/get", {"name": reference.name, "version": reference.version}
    newest = {"max_results": "1", "order_by": "version_number DESC"}
    return "model-versions/search", {"filter": f"name = '{reference.name}'", **newest}
