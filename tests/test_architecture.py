"""Who may import whom in src/selftrans, read from its imports. A newcomer may start with `ORDER`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).parents[1] / "src" / "selftrans"
FILES = {path.relative_to(SRC).as_posix(): path.read_text(encoding="utf-8") for path in sorted(SRC.rglob("*.py"))}

#: package or module of src/selftrans, from the bottom up: none imports one that stands below it in this list
ORDER = (
    "suggest",      # the nearest known word to a misspelt one
    "storage",      # atomic writes, locks, hashes, text made safe for a terminal
    "precision",    # fp32, bf16, fp16 -> torch's dtypes
    "device",       # which device a process works on
    "sections",     # settings as frozen dataclasses, to and from json
    "plugins",      # records that other packages add
    "types",        # shapes, batches, draws, outputs; what a backbone and a guidance are
    "flow",         # paths, timestep samplers, the draw of a step
    "encoders",     # autoencoders, vision models
    "data",         # sources => shards => batches
    "models",       # backbones; no heads: those belong to the objective
    "methods",      # is handed a Backbone, never imports models
    "config",       # a run's settings, built from the registries of methods and models
    "recipes",      # functions that return a config
    "checkpoints",  # format on disk, loading
    "evaluate",     # image iterators in, numbers out: neither models nor methods
    "sampling",     # model => images
    "library",      # what `import selftrans` offers
    "train",        # a run
    "interop",      # other people's checkpoints in, ours out
    "experiments",  # compare, quickstart, bench, evaluate, analyse
    "cli",
    "__main__",
)  # fmt: skip
#: narrower than the order
EXCEPT = {
    "encoders": "storage",
    "models": "suggest storage sections plugins types flow",
    "methods": "sections plugins types flow",
    "evaluate": "suggest storage types flow",
    "library": "types flow models methods config sampling",  # import selftrans: torch and nothing else
    "__init__": "library",
}

#: the one look upwards, for the type checker only: the registry reads a run's config, which holds the methods' configs
TYPES_FROM_ABOVE = {("methods", "config")}
#: rooms that import, of other people's, torch alone (others may: numpy, pillow, diffusers, ...)
TORCH_ONLY = {"device", "precision", "types", "flow", "methods"}
#: what `import selftrans` must not bring in
HEAVY = "accelerate datasets diffusers huggingface_hub matplotlib PIL scipy sklearn tensorboard transformers tyro"
#: these do not import beside every build of torch
NEVER = {"torchvision", "timm", "torchmetrics"}
#: code that arrives inside a file is never run
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
MAX_FILE, MAX_FUNCTION = 350, 60


class Import(NamedTuple):
    module: str  #: dotted, absolute
    names: tuple[str, ...]  #: of `from module import names`
    when: str  #: "load" of the module, "call" of a function, or "typing" (for the type checker only)
    line: int


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import of `source`, which lies in src/selftrans/`file`; relative ones made absolute."""
    package = ("selftrans", *Path(file).parent.parts)

    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, (), when, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join([*base, *([child.module] if child.module else [])])
                yield Import(module, tuple(alias.name for alias in child.names), when, child.lineno)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, "call")
            elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
                yield from walk(child, "typing")
            else:
                yield from walk(child, when)

    return walk(ast.parse(source), "load")


def package_of(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def packages_of(found: Import) -> set[str]:
    """The rooms of ours that an import enters; `__init__` is the package's face."""
    parts = found.module.split(".")
    if parts[0] != "selftrans":
        return set()
    if len(parts) > 1:
        return {parts[1]}
    return {name if name in ORDER else "__init__" for name in found.names} or {"__init__"}


def may_import(name: str) -> set[str]:
    if name in EXCEPT:
        return set(EXCEPT[name].split())
    return set(ORDER[: ORDER.index(name)]) | ({"__init__"} if name == "cli" else set())


def trespasses(source: str, file: str) -> list[str]:
    """Imports of ours that the plan does not allow to `file`."""
    own = package_of(file)
    return [
        f"{file}:{found.line} imports {entered}; '{own}' may import: {' '.join(sorted(may_import(own))) or 'nothing of ours'}"
        for found in imports(source, file)
        for entered in sorted(packages_of(found) - {own} - may_import(own))
        if found.when != "typing" or (own, entered) not in TYPES_FROM_ABOVE
    ]


def cheap(module: str) -> bool:
    """Whether the command line may import this before it knows what it is asked for."""
    ours = module.split(".")[:2] in (["selftrans", "cli"], ["selftrans", "suggest"], ["selftrans", "plugins"])
    return ours or module.split(".")[0] in {"tyro"} | sys.stdlib_module_names


def strangers(source: str, file: str) -> list[str]:
    """Imports of other people's packages that do not belong in `file`."""
    own, wrong = package_of(file), []
    for found in imports(source, file):
        top = found.module.split(".")[0]
        theirs = top != "selftrans" and top not in sys.stdlib_module_names
        if (
            top in NEVER | PICKLES
            or (theirs and own in TORCH_ONLY and top != "torch")
            or (own == "cli" and found.when == "load" and not cheap(found.module))
        ):
            wrong.append(f"{file}:{found.line} imports {found.module}")
    return wrong


def unsafe_calls(source: str, file: str) -> list[str]:
    """Calls that would run code found in a file or fetched from a hub, or write such a file."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            (name == "torch.load" and options.get("weights_only") != "True")
            or name in {"torch.save", "eval", "exec"}
            or (name.endswith(("import_module", "__import__")) and file != "plugins.py")  # a method of one's own
            or options.get("allow_pickle", "False") != "False"
            or options.get("trust_remote_code", "False") != "False"
        ):
            wrong.append(f"{file}:{node.lineno} {ast.unparse(node)}")
    return wrong


def too_long(source: str, file: str) -> list[str]:
    lines = source.count("\n")
    wrong = [f"{file}: {lines} lines, at most {MAX_FILE}"] if lines > MAX_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                wrong.append(f"{file}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION}")
    return wrong


def heads(source: str, file: str) -> list[str]:
    """Projection heads by their names; `MultiHeadAttention` is none."""
    pattern = re.compile(r"(?<!Multi)Heads?$|Project(or|ion)|projectors?$|_head$")
    if package_of(file) != "models":
        return []
    wrong = []
    for node in ast.walk(ast.parse(source)):
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        name = node.name if isinstance(node, ast.ClassDef) else node.attr if stored else ""
        if pattern.search(name):
            wrong.append(f"{file}:{node.lineno} {name}")
    return wrong


RULES = [trespasses, strangers, unsafe_calls, too_long, heads]


def test_narrower_rules_agree_with_the_order() -> None:
    for name in set(EXCEPT) - {"__init__"}:
        assert may_import(name) <= set(ORDER[: ORDER.index(name)])


def test_every_file_is_in_the_order() -> None:
    assert FILES, f"no source under {SRC}"
    homeless = {file for file in FILES if package_of(file) not in (*ORDER, "__init__")}
    assert not homeless, f"not in ORDER: {homeless}; add a row and say why"
    assert not [file for file in FILES if Path(file).stem in {"util", "utils", "helpers", "misc", "common"}]


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds(rule) -> None:
    wrong = [line for file, source in FILES.items() for line in rule(source, file)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (trespasses, "methods/repa.py", "from selftrans.models.sit import SiT"),
        (trespasses, "methods/repa.py", "from ..models import sit"),
        (trespasses, "methods/repa.py", "from selftrans import models"),
        (trespasses, "methods/repa.py", "if TYPE_CHECKING:\n    from selftrans.models import sit"),
        (trespasses, "evaluate/metrics.py", "import selftrans.methods.objective"),
        (trespasses, "evaluate/metrics.py", "def f():\n    from selftrans import models"),
        (trespasses, "flow.py", "from .train import trainer"),
        (trespasses, "train/trainer.py", "from selftrans import Objective"),
        (strangers, "cli/main.py", "import torch"),
        (strangers, "cli/main.py", "from selftrans.train import trainer"),
        (strangers, "methods/repa.py", "import numpy as np"),
        (strangers, "encoders/autoencoder.py", "def f():\n    import torchvision.transforms"),
        (strangers, "checkpoints/format.py", "from pickle import dumps"),
        (unsafe_calls, "interop/exporting.py", "torch.load(path)"),
        (unsafe_calls, "train/resume.py", "importlib.import_module(said)"),
        (unsafe_calls, "interop/exporting.py", "torch.load(path, weights_only=False)"),
        (unsafe_calls, "interop/exporting.py", "np.load(path, allow_pickle=flag)"),
        (unsafe_calls, "interop/exporting.py", "AutoModel.from_pretrained(path, trust_remote_code=True)"),
        (too_long, "flow.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION),
        (too_long, "flow.py", "x = 1\n" * (MAX_FILE + 1)),
        (heads, "models/sit.py", "class ProjectionHead: ..."),
        (heads, "models/sit.py", "self.projectors = build()"),
    ],
)
def test_each_rule_detects_its_example(rule, file: str, source: str) -> None:
    assert rule(source, file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("methods/repa.py", "from selftrans.types import Draw\nfrom .objective import Guidance\nimport torch"),
        ("cli/main.py", "import sys\ndef main():\n    import tyro\n    from selftrans.train import trainer"),
        ("experiments/compare.py", "from selftrans import evaluate\nfrom selftrans.train.run import run"),
        ("interop/exporting.py", "torch.load(path, weights_only=True, map_location='cpu')\nmodel.eval()"),
        ("models/mmdit.py", "class MultiHeadAttention: ..."),
    ],
)
def test_valid_code_breaks_no_rule(file: str, source: str) -> None:
    assert not [line for rule in RULES for line in rule(source, file)]


def test_the_trainer_names_no_method() -> None:
    shared = {"__init__", "objective", "guidance", "spec", "registry"}
    methods = {Path(file).stem for file in FILES if package_of(file) == "methods"} - shared
    trainer = FILES.get("train/trainer.py", "")
    assert not [method for method in methods if re.search(rf"\b{method}\b", trainer)]


def test_import_needs_torch_only() -> None:
    code = f"import sys; from selftrans import *; print(*[name for name in '{HEAVY}'.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()
