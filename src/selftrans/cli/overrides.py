"""Which settings the command line can override: those of the run, of the chosen model, and of every known method.

The names given for `--method` and `--model.name` decide which classes of settings there are, so they are looked up before
the other words are parsed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selftrans.config import RunConfig


def override_type(config: RunConfig, words: Sequence[str]) -> tuple[type, Any]:
    """The dataclass whose fields are the overrides of a recipe, and an instance of it with the recipe's values.

    ValueError for a method or a model that is not known.
    """
    from selftrans.config import Data, Log, SampleConfig, Train
    from selftrans.methods import registry as methods
    from selftrans.models import registry as models
    from selftrans.plugins import trust

    method, name = _given(words, "method") or config.method, _given(words, "model.name")
    for given in filter(None, (method, name)):
        if ":" in given:
            trust(given)  # the user has named it
    spec = methods.find(method)
    kinds = methods.sections_of([*methods.REGISTRY.every(), spec])
    model = config.model
    if name is not None and not isinstance(model, models.find(name).Config):
        model = models.find(name).Config(name=name)
    values: dict[str, Any] = {"data": config.data, "model": model, "train": config.train}
    values |= {key: config.section(kind) for key, kind in kinds.items()}
    values |= {"sample": config.sample, "log": config.log}
    types = {"data": Data, "model": type(model), "train": Train, "sample": SampleConfig, "log": Log, **kinds}
    fields = [("method", _method_type(methods.REGISTRY.known()), dataclasses.field(default=method))]
    fields += [(key, types[key], dataclasses.field(default=value)) for key, value in values.items()]
    kind = dataclasses.make_dataclass("Overrides", fields, frozen=True)
    kind.__doc__ = "Overrides of a recipe."
    return kind, kind()


def overridden(config: RunConfig, parsed: Any) -> RunConfig:
    """The recipe's configuration with parsed overrides; it still holds the sections of every method (`restricted`)."""
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}
    own = {name: values.pop(name) for name in ("method", "data", "model", "train", "sample", "log")}
    return dataclasses.replace(config, **own, sections=values)


def _method_type(known: Sequence[str]) -> Any:
    from typing import Annotated

    import tyro

    return Annotated[str, tyro.conf.arg(help=f"one of {', '.join(known)}, or module:function")]


def _given(words: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`; the last one where there are several."""
    found = None
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            found = value if equals else words[i + 1] if i + 1 < len(words) else None
    return found
