"""Spoken words as WAV files in class folders, synthesised by espeak-ng: data for the recipe `speech_words`.

    python benchmarks/make_speech.py --out data/words
    selftrans prepare data/words --out data/speech --audio mel --rate 8000 --length 0.64 --bins 24 --hop 160

Ten words, each with 200 recordings: voices, accents, speeds and pitches are drawn at random, with a fixed seed. It takes about
two minutes. The files are the same for the same release of espeak-ng (the results were made with 1.51).
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")


def speak(word: str, path: Path, random: np.random.Generator) -> None:
    """Write one recording. Raises CalledProcessError when espeak-ng fails."""
    voice = f"{random.choice(ACCENTS)}+{random.choice(VARIANTS)}"
    speed, pitch = int(random.integers(150, 231)), int(random.integers(20, 81))  # words per minute, 0 to 99
    options = ["-v", voice, "-s", str(speed), "-p", str(pitch), "-z", "-w", str(path)]
    subprocess.run(["espeak-ng", *options, word], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the class folders")
    parser.add_argument("--count", type=int, default=200, help="recordings of each word")
    args = parser.parse_args()
    for number, word in enumerate(WORDS):
        folder, random = args.out / word, np.random.default_rng([0, number])
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(args.count):
            speak(word, folder / f"{k:04d}.wav", random)
    print(f"{args.count} recordings of each of {len(WORDS)} words -> {args.out}")


if __name__ == "__main__":
    main()
