"""The command that plans a run on many GPUs. See `commands.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from selftrans.cli.options import Config, Overrides, RecipeCommand, Trust, Typed


@dataclass
class Plan(RecipeCommand[Config]):
    """What a run takes on many GPUs: batch, bytes on the wire, images/s, hours, memory, disk. Nothing is trained.

    The figures of one GPU come from `selftrans bench` on it (--measured bench/bench.json), or from --rate. What is assumed is
    listed; plan.json has the numbers. `selftrans train RECIPE --dry-run` measures a run on the machine at hand instead.
    """

    recipe: Positional[str]
    """name of the recipe"""
    gpus: int = 8
    """number of GPUs, in all machines"""
    measured: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """bench.json of one such GPU"""
    rate: float | None = None
    """images per second of the last stage on one GPU, in place of --measured"""
    gpus_per_machine: int = 8
    """GPUs of a machine"""
    link_gbps: float = 400.0
    """gigabits per second from one machine to the others"""
    local_gbps: float = 3600.0
    """gigabits per second from one GPU to the others of its machine"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """prepared data, or the URL of such; None: as many latents as ImageNet has"""
    out: Path = Path("plan.json")
    """json file to write"""
    trust: Trust = ()
    config: Annotated[Config, *Overrides] = tyro.MISSING
    typed: Typed = ()

    def run(self) -> None:
        import dataclasses

        from selftrans.experiments.scale_plan import Cluster, scale_plan, text
        from selftrans.storage import check_writable, write_json

        config: Any = self.config
        if self.data is not None:
            config = config.override({"data.path": self.data})
        check_writable(self.out)
        cluster = Cluster(self.gpus, self.gpus_per_machine, self.link_gbps, self.local_gbps)
        found = scale_plan(config, cluster, measured=self.measured, rate=self.rate)
        print(text(found))
        write_json(self.out, dataclasses.asdict(found))
