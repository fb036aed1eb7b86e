"""selftrans: train diffusion transformers fast, guided by nothing but themselves.

`library.py` lists what the package offers. It is loaded at the first use of one of its names, so that the command line
prints help and errors without loading torch. Using it needs torch only.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from selftrans.library import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        import selftrans.library as library

        if name not in {"__all__", *library.__all__}:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(library, name)

    def __dir__() -> list[str]:
        import selftrans.library as library

        return sorted({*globals(), *library.__all__})
