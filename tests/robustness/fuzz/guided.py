"""Coverage-guided fuzzing with libFuzzer, through atheris, of each parser of `parsers.py`.

    python tests/robustness/fuzz/guided.py OUT [PARSER ...] [--runs N] [--seed K]
prints a line of json for each parser: inputs tried, seconds, and the inputs that broke it, which are kept in OUT.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.dont_write_bytecode = True
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atheris  # noqa: E402

#: packages whose coverage is measured
INSTRUMENTED = ["selftrans", "zipfile", "numpy.lib", "PIL", "safetensors", "json"]
with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
    from tests.robustness.fuzz import parsers

MEMORY = 1 << 31  #: bytes that a parser may allocate
LARGEST = 16_384  #: bytes of an input


def words(examples: list[bytes]) -> list[str]:
    """A dictionary for libFuzzer: words of the examples, and values that often break parsers."""
    spelled = {word for data in examples for word in re.findall(rb'"[\w.]{2,30}"', data)}
    nasty = [
        b"null",
        b"true",
        b"-1",
        b"1e999",
        b"NaN",
        b"9" * 30,
        b"0",
        b"[]",
        b"{}",
        b'"../x"',
        b"\\u0000",
        b"PK\x01\x02",
    ]
    return ['"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in [*sorted(spelled)[:200], *nasty]]


def fuzz(name: str, folder: Path, out: Path, runs: int, seed: int) -> None:
    """Fuzz in a forked process, which libFuzzer ends."""
    log = os.open(out / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, -1))
    options = [
        f"-runs={runs}",
        f"-seed={seed}",
        f"-max_len={LARGEST}",
        "-len_control=0",
        "-timeout=20",
        "-rss_limit_mb=0",
    ]
    files = [f"-dict={out / 'words'}", f"-artifact_prefix={out}/", "-print_final_stats=1", str(out / "corpus")]

    def one(data: bytes) -> None:
        try:
            parsers.attempt(name, folder, data)
        except BaseException:
            (out / f"crash-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            raise

    atheris.Setup([sys.argv[0], *options, *files], one)
    atheris.Fuzz()


def run(name: str, out: Path, runs: int, seed: int) -> dict[str, object]:
    """Fuzz one parser; returns the line of json for it."""
    (out / "corpus").mkdir(parents=True)
    examples = parsers.PARSERS[name].examples()
    for i, data in enumerate(examples):
        (out / "corpus" / str(i)).write_bytes(data)
    (out / "words").write_text("\n".join(words(examples)) + "\n")
    started = time.perf_counter()
    with parsers.folder_for(name) as folder:
        child = os.fork()
        if child == 0:
            try:
                fuzz(name, folder, out, runs, seed)
            finally:
                os._exit(70)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = (out / "log").read_text(errors="replace")
    tried = re.search(r"number_of_executed_units: (\d+)", log)
    broke = [str(path) for kind in ("crash", "timeout", "oom", "slow") for path in out.glob(f"{kind}-*")]
    seconds = round(time.perf_counter() - started, 1)
    result = {"parser": name, "inputs": int(tried[1]) if tried else 0, "seconds": seconds, "code": code, "broke": broke}
    return result | ({"log": log[-3000:]} if code or broke else {})


def main() -> int:
    """Fuzz the named parsers one after the other; 1 if one broke."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path)
    options.add_argument("names", nargs="*", default=list(parsers.PARSERS))
    options.add_argument("--runs", type=int, default=0, help="of each; 0: as parsers.py says")
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    bad = False
    gc.collect()
    gc.freeze()  # a forked process does not go through the objects of its parent
    for name in given.names:
        result = run(name, given.out / name, given.runs or parsers.PARSERS[name].runs, given.seed)
        print(json.dumps(result), flush=True)
        bad |= bool(result["code"] or result["broke"])
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
