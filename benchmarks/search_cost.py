"""Whether a search's predicted times are right: every point of its way, and the model that it wrote timed once more.

    haomiao compress CHECKPOINT -o ARTIFACT --target-ms 2.5 --json
    python benchmarks/search_cost.py ARTIFACT --repeat 9 --out FILE

Of every point: milliseconds a decode step as predicted before the point itself was timed, as measured then, and the
ratio. Then the artifact's own step, timed anew --repeat times, each time in a new executor, beside what the search said
of it. Run it alone on the machine, where the search ran. Prints one JSON line last, with the median of the ratios and
of their distance from 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path


def main() -> None:
    """The table, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="what `haomiao compress --target-ms` wrote")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="add the JSON line to this file")
    args = parser.parse_args()

    from haomiao.compress.search.cost import step_ms
    from haomiao.compress.search.levels import Model
    from haomiao.load.artifact import Artifact
    from haomiao.models.registry import plan_for

    artifact = Artifact.open(args.artifact)
    about = artifact.meta.get("search")
    if about is None:
        raise SystemExit(f"{args.artifact} was not made by a search")
    print(f"{'step':32} {'predicted':>10} {'measured':>10} {'ratio':>6} {'MB':>8}")
    ratios = []
    for point in about["front"]:
        ratios.append(point["ms_measured"] / point["ms_predicted"])
        print(
            f"{point['step'][:32]:32} {point['ms_predicted']:10.3f} {point['ms_measured']:10.3f} {ratios[-1]:6.2f} "
            f"{point['mb']:8.2f}"
        )
    config = artifact.meta["config"]
    model = Model(config, plan_for(config), dict(artifact.tensors), dict(artifact.vectors))
    times = sorted(step_ms(model, args.threads) for _ in range(args.repeat))
    last = about["front"][-1]
    distances = [abs(ratio - 1) for ratio in ratios[1:]] or [0.0]
    report = {
        "benchmark": "search_cost",
        "artifact": args.artifact.name,
        "target_ms": about["target_ms"],
        "points": len(ratios),
        "ratio": statistics.median(ratios),
        "distance": statistics.median(distances),
        "distance_most": max(distances),
        "predicted_ms": last["ms"],
        "measured_ms": statistics.median(times),
        "measured_least": times[0],
        "measured_most": times[-1],
        "threads": args.threads,
        "machine": platform.machine(),
    }
    print(
        f"written: {last['ms']:.3f} ms predicted, {report['measured_ms']:.3f} measured anew "
        f"[{times[0]:.3f}, {times[-1]:.3f}], asked for {about['target_ms']}"
    )
    line = json.dumps(report)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
