"""What holds for every asset alike: who owns it, and how old it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from resources.errors import CatalogError

if TYPE_CHECKING:
    import dagster as dg

#: How old what was confirmed last may be: every part of every model is run again after so many days, by the schedule.
FRESH_DAYS = 30.0
#: What the schedule may be late by before anybody is warned: it comes once a day, and a run takes its time.
GRACE_DAYS = 2.0
#: As good as never, and what clocks still take.
_LONGEST_DAYS = 36500.0


@dataclass(frozen=True)
class Policies:
    """owners: of every asset; empty: those that the assets name themselves. fresh_days: see FRESH_DAYS."""

    owners: tuple[str, ...] = ()
    fresh_days: float = FRESH_DAYS

    @property
    def warn_days(self) -> float:
        """How old something is that should have been confirmed, and was not."""
        return min(self.fresh_days + GRACE_DAYS, _LONGEST_DAYS)

    def applied(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        """The asset with these policies. Dagster's daemon judges its freshness, by the newest of all its partitions."""
        import dagster as dg

        fresh = dg.FreshnessPolicy.time_window(
            fail_window=timedelta(days=2 * self.warn_days), warn_window=timedelta(days=self.warn_days)
        )
        return spec.replace_attributes(owners=self.owners or spec.owners, freshness_policy=fresh)


def check_owners(owners: Sequence[str], variable: str) -> tuple[str, ...]:
    """The owners, as Dagster takes them. Raises CatalogError naming the variable."""
    import dagster as dg

    for owner in owners:
        try:
            dg.AssetSpec("any", owners=[owner])
        except dg.DagsterInvalidDefinitionError:
            raise CatalogError(
                f"{variable}: {owner!r} is no owner; name teams and people as team:ml-platform,someone@example.org."
            ) from None
    return tuple(owners)
