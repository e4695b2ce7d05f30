"""The greatest entries of a long row, in descending order, without sorting the row.

Knows nothing about tokens. Ties are broken by the lower index.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from haomiao.types import F32

_CHUNK = 64


def largest(row: F32, count: int) -> npt.NDArray[np.int64]:
    """Indexes, ascending, of all entries that are at least the `count`-th greatest; entries of -inf are left out.

    `count` of the chunks' maxima are at least the `count`-th greatest maximum, so that one bounds the threshold from
    below, and few entries are above it: 150 thousand entries take a tenth of a millisecond instead of a sort's twenty.
    """
    if count >= row.shape[0]:
        return np.flatnonzero(row > -np.inf)
    full = row.shape[0] // _CHUNK * _CHUNK
    maxima = np.append(row[:full].reshape(-1, _CHUNK).max(axis=1), row[full:])
    if count <= maxima.shape[0]:
        floor = np.partition(maxima, maxima.shape[0] - count)[maxima.shape[0] - count]
        near = np.flatnonzero(row >= floor) if floor > -np.inf else np.flatnonzero(row > -np.inf)
    else:
        near = np.flatnonzero(row > -np.inf)
    if near.shape[0] <= count:
        return near
    values = row[near]
    threshold = np.partition(values, values.shape[0] - count)[values.shape[0] - count]
    chosen: npt.NDArray[np.int64] = near[values >= threshold]
    return chosen


def descending(row: F32, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`ids`, which ascend, ordered by falling value."""
    ordered: npt.NDArray[np.int64] = ids[np.argsort(-row[ids], kind="stable")]
    return ordered
