"""How long a user's requests are, and the lengths to pad them to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from resources.artifacts.records import LengthProfile
from resources.pipelines.base import Item, Pipeline
from resources.pipelines.tokenization import buckets_up_to

#: Lengths that are tried as buckets are multiples of this: matrix units work on tiles of it.
STEP = 8
#: Every bucket more is one more queue whose requests cannot run together, and one more engine profile to warm.
MOST_BUCKETS = 8
#: More buckets are added until no more than this share of all tokens is padding.
PADDING_WANTED = 0.1


def profile_lengths(pipeline: Pipeline, items: Sequence[Item], max_tokens: int) -> LengthProfile:
    """Lengths of the engine's rows for those requests, buckets for them, and how much of the work would be padding."""
    rows = (row for group in pipeline.rows(items) for row in group)
    counts = tuple(sorted(Counter(row.tokens for row in rows).items()))
    buckets = choose_buckets(counts, max_tokens)
    return LengthProfile(
        requests=len(items),
        counts=counts,
        buckets=buckets,
        padding=padding_share(counts, buckets),
        padding_of_standard_buckets=padding_share(counts, buckets_up_to(max_tokens)),
        padding_of_one_length=padding_share(counts, (max_tokens,)),
    )


def choose_buckets(counts: Sequence[tuple[int, int]], max_tokens: int) -> tuple[int, ...]:
    """The fewest lengths, `max_tokens` always among them, that keep padding below a tenth of all tokens; at most eight.

    counts: rows by their length. For every number of buckets the least padding there can be, by dynamic programming
    over the lengths in order: each bucket takes a run of them.
    """
    sizes = sorted({min(max_tokens, -(-length // STEP) * STEP) for length, _ in counts} | {max_tokens})
    lengths, weights = (np.array(column, dtype=np.float64) for column in zip(*counts, strict=True))
    place = np.searchsorted(sizes, lengths)
    rows = np.zeros(len(sizes) + 1)
    np.add.at(rows, place + 1, weights)
    rows = np.cumsum(rows)  # rows[i]: how many fit into the sizes before i
    # cost[i, j]: tokens, padding included, of the rows above size i - 1 up to size j, all padded to size j.
    spans = (rows[None, 1:] - rows[:-1, None]) * np.array(sizes, dtype=np.float64)[None, :]
    spans[np.tril_indices(len(sizes), -1)] = np.inf
    real = float((lengths * weights).sum())
    best, cuts = spans[0].copy(), [np.zeros(len(sizes), dtype=int)]
    while 1 - real / best[-1] > PADDING_WANTED and len(cuts) < min(MOST_BUCKETS, len(sizes)):
        # The last bucket begins after size k - 1, the others end there.
        through = best[:-1, None] + spans[1:, :]
        first = np.vstack([np.full(len(sizes), np.inf), through])
        cuts.append(first.argmin(axis=0))
        best = first.min(axis=0)
    found, end = [], len(sizes) - 1
    for cut in reversed(cuts):
        found.append(sizes[end])
        end = int(cut[end]) - 1
    return tuple(reversed(found))


def padding_share(counts: Sequence[tuple[int, int]], buckets: Sequence[int]) -> float:
    """Of all tokens that an engine gets for rows of those lengths one at a time, how many are padding: 0 to 1."""
    lengths, weights = (np.array(column, dtype=np.float64) for column in zip(*counts, strict=True))
    padded = np.array(buckets, dtype=np.float64)[np.searchsorted(buckets, lengths)]
    return float(1 - (lengths * weights).sum() / (padded * weights).sum())
