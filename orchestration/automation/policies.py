"""The policies of all assets: their owners, and how old they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from resources.errors import CatalogError

if TYPE_CHECKING:
    import dagster as dg

#: The number of days after which the schedule runs every part of a model again, to confirm it.
FRESH_DAYS = 30.0
#: The schedule may be this late before anybody is warned, because it comes once a day and a run takes its time.
GRACE_DAYS = 2.0
#: This bound is as good as never, and clocks can still represent it.
_LONGEST_DAYS = 36500.0


@dataclass(frozen=True)
class Policies:
    """The policies of all assets.

    Args:
        owners: The owners of every asset. If it is empty, each asset keeps the owners that it names itself.
        fresh_days: The number of days after which a model is confirmed again; see FRESH_DAYS.
    """

    owners: tuple[str, ...] = ()
    fresh_days: float = FRESH_DAYS

    @property
    def warn_days(self) -> float:
        """The age in days at which Dagster warns that an asset was not confirmed in time."""
        return min(self.fresh_days + GRACE_DAYS, _LONGEST_DAYS)

    def applied(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        """Return the asset's spec with these policies.

        Dagster's daemon judges the asset's freshness by the newest of all its partitions.
        """
        import dagster as dg

        fresh = dg.FreshnessPolicy.time_window(
            fail_window=timedelta(days=2 * self.warn_days), warn_window=timedelta(days=self.warn_days)
        )
        return spec.replace_attributes(owners=self.owners or spec.owners, freshness_policy=fresh)


def check_owners(owners: Sequence[str], variable: str) -> tuple[str, ...]:
    """Return the owners if Dagster accepts them.

    Raises:
        CatalogError: Dagster does not accept an owner. The error names the variable.
    """
    import dagster as dg

    for owner in owners:
        try:
            dg.AssetSpec("any", owners=[owner])
        except dg.DagsterInvalidDefinitionError:
            raise CatalogError(
                f"{variable}: {owner!r} is not an owner. Name teams and people, such as "
                "team:ml-platform,someone@example.org."
            ) from None
    return tuple(owners)
