"""The settings of the backbone `wave`: `--model.*` on the command line, the object `model` in config.json."""

from __future__ import annotations

from dataclasses import dataclass

from selftrans.models.spec import ModelConfig

SIZES = {"wave-s": {"width": 64, "depth": 6}, "wave-m": {"width": 128, "depth": 12}}


@dataclass(frozen=True)
class WaveConfig(ModelConfig):
    """Gated convolutions. A field left at None comes from the size `name`."""

    name: str = "wave-s"
    """wave-s or wave-m"""
    width: int | None = None
    """channels of a token"""
    depth: int | None = None
    """number of blocks"""
    kernel: int = 3
    """kernel size of a convolution in tokens, an odd number"""
    patch: int = 2
    """positions per token"""

    def sizes(self) -> dict[str, int]:
        """Width and depth. A name that is not a size, such as that of the family or module:function, means wave-s."""
        given = {"width": self.width, "depth": self.depth}
        return SIZES.get(self.name, SIZES["wave-s"]) | {key: value for key, value in given.items() if value is not None}

    def check(self) -> None:
        sizes = {**self.sizes(), "kernel": self.kernel, "patch": self.patch}
        for key, value in sizes.items():
            if not 1 <= value <= 1 << 16 or (key == "kernel" and value % 2 == 0):
                raise ValueError(
                    f"model.{key} {value} is not possible; give a number from 1 to 65536, odd for the kernel"
                )

    def blocks(self) -> int:
        return self.sizes()["depth"]
