"""Import of published checkpoints, export to their layouts, and runs as pipelines of diffusers.

`SiTPipeline`, `InterpolantTransformer` and `InterpolantScheduler` are loaded at their first use, which needs diffusers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selftrans.interop.interpolant_scheduler import InterpolantScheduler
    from selftrans.interop.interpolant_transformer import InterpolantTransformer
    from selftrans.interop.sit_pipeline import SiTPipeline

__all__ = ["InterpolantScheduler", "InterpolantTransformer", "SiTPipeline"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "SiTPipeline":
            from selftrans.interop.sit_pipeline import SiTPipeline as found
        elif name == "InterpolantTransformer":
            from selftrans.interop.interpolant_transformer import InterpolantTransformer as found
        elif name == "InterpolantScheduler":
            from selftrans.interop.interpolant_scheduler import InterpolantScheduler as found
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return found
