"""`selftrans doctor`: what a bug report needs to say about the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selftrans.cli.options import Command


@dataclass
class Doctor(Command):
    """Versions, device, compilation, attention kernels and disk speed, as text to paste into a bug report."""

    folder: Path = Path()
    """where the speed of the disk is measured, by a temporary file of 64 MB: of the data or the runs"""
    json: bool = False
    """as json instead of text"""

    def run(self) -> None:
        import json

        from selftrans.experiments.doctor import examine, text

        found = examine(self.folder)
        print(json.dumps(found, indent=2) if self.json else text(found))
