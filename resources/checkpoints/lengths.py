"""The lengths of a user's requests, and the choice of the lengths to which they are padded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from resources.artifacts.records import LengthProfile
from resources.pipelines.base import Item, Pipeline
from resources.pipelines.tokenization import buckets_up_to

#: Buckets are multiples of this, because matrix units work on tiles of this size.
STEP = 8
#: Each additional bucket is one more queue whose requests cannot run together, and one more engine profile to warm up.
MOST_BUCKETS = 8
#: Buckets are added until at most this share of all tokens is padding.
PADDING_WANTED = 0.1


def profile_lengths(pipeline: Pipeline, items: Sequence[Item], max_tokens: int) -> LengthProfile:
    """Measure the lengths of the engine's rows for requests, choose buckets, and compute the share of padding.

    Args:
        pipeline: The pipeline that turns the requests into rows.
        items: The requests.
        max_tokens: The checkpoint's limit of tokens for a row.
    """
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
    """Choose the fewest lengths that keep padding within a tenth of all tokens, at most eight.

    `max_tokens` is always one of them. For each number of buckets, dynamic programming over the sorted lengths finds
    the least possible padding. Each bucket takes a run of successive lengths.

    Args:
        counts: Pairs of a length and the number of rows that have it, in the order of lengths.
        max_tokens: The checkpoint's limit of tokens for a row.
    """
    sizes = sorted({min(max_tokens, -(-length // STEP) * STEP) for length, _ in counts} | {max_tokens})
    lengths, weights = (np.array(column, dtype=np.float64) for column in zip(*counts, strict=True))
    place = np.searchsorted(sizes, lengths)
    rows = np.zeros(len(sizes) + 1)
    np.add.at(rows, place + 1, weights)
    rows = np.cumsum(rows)  # rows[i] is the number of rows that fit into the sizes before i
    # spans[i, j] is the number of tokens, padding included, of the rows longer than size i - 1 and at most as long as
    # size j, if all are padded to size j.
    spans = (rows[None, 1:] - rows[:-1, None]) * np.array(sizes, dtype=np.float64)[None, :]
    spans[np.tril_indices(len(sizes), -1)] = np.inf
    real = float((lengths * weights).sum())
    best, cuts = spans[0].copy(), [np.zeros(len(sizes), dtype=int)]
    while 1 - real / best[-1] > PADDING_WANTED and len(cuts) < min(MOST_BUCKETS, len(sizes)):
        # The last bucket takes the rows longer than size k - 1, and the other buckets take the rest.
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
    """Return the share of padding, from 0 to 1, in all tokens that an engine gets if it runs one row at a time.

    Args:
        counts: Pairs of a length and the number of rows that have it.
        buckets: The lengths to which rows are padded, in order.
    """
    lengths, weights = (np.array(column, dtype=np.float64) for column in zip(*counts, strict=True))
    padded = np.array(buckets, dtype=np.float64)[np.searchsorted(buckets, lengths)]
    return float(1 - (lengths * weights).sum() / (padded * weights).sum())
