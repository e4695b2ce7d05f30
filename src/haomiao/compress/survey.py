"""A first look at all layers, on a few samples and with the weights as they are: what each layer's share of pruning is
decided by (OWL)."""

from __future__ import annotations

from collections.abc import Callable

from haomiao.compress.calibrate import Moments, Stream, stages
from haomiao.compress.forward import Buffers, Weights
from haomiao.compress.prune.masks import outlier_share
from haomiao.types import F32, I32


def survey_outliers(
    stream: Stream,
    matrix: Callable[[str], F32],
    rows: Callable[[str, I32], F32],
    vector: Callable[[str], F32],
    tell: Callable[[], None],
) -> dict[str, float]:
    """The share of outliers of every linear layer's matrix, by name. `stream` is begun anew and leaves no files."""
    stream.remove()
    stream.place = 0
    latest: dict[str, F32] = {}
    outliers: dict[str, float] = {}
    for stage in stages(stream.plan):
        moments = Moments(stream.plan.weights[stage.weight].cols)

        def take(buffers: Buffers, moments: Moments = moments, source: str = stage.source) -> None:
            moments.add(buffers[source])

        weights = Weights(latest.__getitem__, rows, vector)
        stream.advance(stage.place, weights, consume=take, store=stage.place)
        latest.clear()
        latest[stage.weight] = matrix(stage.weight)
        outliers[stage.weight] = outlier_share(latest[stage.weight], moments.hessian())
        tell()
    stream.remove()
    return outliers
