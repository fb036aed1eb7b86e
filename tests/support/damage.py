"""Damage to the files of a checkpoint."""

from pathlib import Path


def flip(path: Path) -> None:
    """Change one bit of a weights file, or of the hash in a state file."""
    content = bytearray(path.read_bytes())
    content[-1 if path.suffix == ".safetensors" else content.index(b"sha256") + 30] ^= 1
    path.write_bytes(content)
