"""Sample and measure a run as published figures were: decoder, labels, rounding, sampler and number of samples.

    python benchmarks/published_figures.py runs/b2 --out results/b2 --reference VIRTUAL_imagenet256_labeled.npz
    python benchmarks/published_figures.py runs/xl2 --out results/xl2 --reference VIRTUAL_imagenet256_labeled.npz \\
        --protocol release-guided

Prints the commands and runs them one after the other; `--print` only prints them. Repeat the command to continue. The
samples go to OUT/samples, the report to OUT/evaluate.json. docs/published-figures.md says where each choice is from.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence

EMA = "stabilityai/sd-vae-ft-ema"  #: decodes the samples; the data are encoded with sd-vae-ft-mse
#: name -> options of `selftrans sample`
PROTOCOLS = {
    "release": f"--sampler sde --steps 250 --labels random --rounding down --decode-with {EMA}",
    "release-guided": f"--sampler sde --steps 250 --labels random --rounding down --decode-with {EMA} "
    "--guidance-scale 1.9 --guidance-interval 0 0.65",
    "repa-guided": f"--sampler sde --steps 250 --labels random --rounding down --decode-with {EMA} "
    "--guidance-scale 1.8 --guidance-interval 0 0.7",
    "sit": f"--sampler sde --steps 250 --labels random --rounding nearest --decode-with {EMA}",
    "sit-guided": f"--sampler sde --steps 250 --labels random --rounding nearest --decode-with {EMA} "
    "--guidance-scale 1.5 --guidance-channels 3",
}


def commands(run: str, out: str, reference: str, protocol: str, num: int = 50_000, seed: int = 0) -> list[list[str]]:
    """The arguments of `selftrans` that sample `run` under a protocol and measure the samples."""
    sample = ["sample", run, "--out", f"{out}/samples", "--num", str(num), "--seed", str(seed)]
    measure = ["evaluate", f"{out}/samples", "--reference", reference, "--out", f"{out}/evaluate.json"]
    return [[*sample, *PROTOCOLS[protocol].split()], [*measure, "--features", "inception"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands and run them; the exit status of the first that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory, checkpoint or weights file")
    parser.add_argument("--out", required=True, help="folder for the samples and the report")
    parser.add_argument("--reference", required=True, help="ADM's npz, or a folder of all training pictures")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="release")
    parser.add_argument("--num", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--print", action="store_true", dest="only_print", help="print the commands and do not run them"
    )
    given = parser.parse_args(argv)
    for words in commands(given.run, given.out, given.reference, given.protocol, given.num, given.seed):
        # sampling is shared by all GPUs of the machine, measuring is one process
        shared = words[0] == "sample"
        print(shlex.join([*(["accelerate", "launch", "-m"] if shared else []), "selftrans", *words]), flush=True)
        if given.only_print:
            continue
        own = ["accelerate.commands.launch", "-m", "selftrans"] if shared else ["selftrans"]
        status = subprocess.run([sys.executable, "-m", *own, *words], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
