"""Does even spacing of the timesteps within a batch help or harm? Both samplers on the digits, over seeds.

    python benchmarks/times.py --out DIR [--steps 2000] [--seeds 0 1 2 3 4] [--images 1000] [--methods ...]

Each method is trained with `train.times` systematic and uniform, from the same seeds, and measured as `selftrans
quickstart` measures. Repeating the command continues it. Prints, and writes to DIR/times.json, the mean over seeds of
each and of the difference within a seed (systematic - uniform) with its standard error: a difference within two of
those says nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

from selftrans.compare import Comparison, compare
from selftrans.data.encode import prepare_digits
from selftrans.evaluate.features import load_extractor
from selftrans.recipes import recipe
from selftrans.train.stop import lock

TIMES = ("systematic", "uniform")
MEASURED = ("distance", "accuracy", "probe", "seconds")


def measure(out: Path, steps: int, seeds: tuple[int, ...], images: int, methods: tuple[str, ...]) -> dict[str, Any]:
    """(times -> method -> seed -> last measured point), trained and measured where that is not done yet."""
    config = recipe("digits")
    prepare_digits(out / "data")
    data = dataclasses.replace(config.data, path=str(out / "data"))
    classifier = out / "digits-classifier.safetensors"
    load_extractor("digits", weights=classifier)  # trained once, before the workers ask for it
    variants = {}
    for method, times in itertools.product(methods, TIMES):
        train = dataclasses.replace(config.train, steps=steps, times=times)
        variants[f"{method}-{times}"] = dataclasses.replace(config, method=method, data=data, train=train).check()
    results = compare(Comparison(variants, seeds, out, images, "digits", str(classifier)))
    return {
        times: {
            method: {seed: {key: results[f"{method}-{times}", seed][1][-1][key] for key in MEASURED} for seed in seeds}
            for method in methods
        }
        for times in TIMES
    }


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per method and quantity: both means, the mean difference within a seed, and its standard error."""
    table = []
    for method, by_seed in found[TIMES[0]].items():
        for key in MEASURED:
            pairs = [(by_seed[seed][key], found[TIMES[1]][method][seed][key]) for seed in by_seed]
            differences = [even - independent for even, independent in pairs]
            error = statistics.stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
            means = [statistics.fmean(values) for values in zip(*pairs, strict=True)]
            row = {"method": method, "measured": key, **dict(zip(TIMES, means, strict=True))}
            table.append(row | {"difference": statistics.fmean(differences), "standard_error": error})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="of the student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--images", type=int, default=1000, help="samples for each distance")
    parser.add_argument("--methods", nargs="+", default=["vanilla", "structure", "self_transcendence"])
    options = parser.parse_args()
    with lock(options.out):
        seeds, methods = tuple(options.seeds), tuple(options.methods)
        table = summary(measure(options.out, options.steps, seeds, options.images, methods))
        report = {"steps": options.steps, "seeds": list(seeds), "images": options.images, "table": table}
        (options.out / "times.json").write_text(json.dumps(report, indent=2))
    print(f"{'':<30}" + "".join(f"{name:>14}" for name in (*TIMES, "difference", "std. error")))
    for row in table:
        error = "-" if row["standard_error"] is None else f"{row['standard_error']:.4g}"
        values = "".join(f"{row[name]:>14.5g}" for name in (*TIMES, "difference"))
        print(f"{row['method'] + ' ' + row['measured']:<30}{values}{error:>14}")


if __name__ == "__main__":
    main()
