"""Rules of the source tree, checked on its syntax trees: imports, names, sizes, tests, words. Start with `ORDER`."""

from __future__ import annotations

import ast
import collections
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from selftrans.config import RunConfig
from selftrans.methods.registry import METHODS, sections_of, stages

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
SRC = ROOT / "src" / "selftrans"
FILES = {path.relative_to(SRC).as_posix(): path.read_text(encoding="utf-8") for path in sorted(SRC.rglob("*.py"))}

MODULES = {file.removesuffix(".py") for file in FILES}
PACKAGES = {Path(file).parent.as_posix() for file in FILES}

#: packages and modules of src/selftrans; each may import those above it in this list
ORDER = (
    "suggest",      # the nearest known word to a misspelt one
    "messages",     # numbers, names and errors in messages, safe for a terminal
    "progress",     # progress bars, on a terminal and in a file
    "storage",      # atomic writes, locks, hashes
    "plain_json",   # json of files that may be damaged, checked by declared types
    "precision",    # fp32, bf16, fp16 -> torch's dtypes
    "device",       # which device a process works on, its memory, cores and load
    "graphs",       # functions recorded as CUDA graphs
    "sections",     # settings as frozen dataclasses, to and from json
    "fine_tuning",  # settings of a run that starts from given weights
    "plugins",      # records that other packages add
    "types",        # shapes, batches, draws, outputs; what a backbone and a guidance are
    "flow",         # paths, timestep samplers, the draw of a step
    "encoders",     # autoencoders, vision and text models
    "data",         # sources => shards => batches
    "models",       # backbones; no heads: those belong to the objective
    "methods",      # get a Backbone, never import models
    "sample_config",  # how images are sampled
    "config",       # a run's settings, built from the registries of methods and models
    "recipes",      # functions that return a config
    "checkpoints",  # format on disk, loading
    "evaluate",     # image iterators in, numbers out: neither models nor methods
    "sampling",     # model => images
    "library",      # what `import selftrans` offers
    "interop",      # other people's checkpoints in, ours out
    "train",        # a run
    "experiments",  # compare, quickstart, bench, evaluate, analyse
    "ui",           # the local page of runs
    "cli",
    "__main__",
)  # fmt: skip
#: packages that may import less than the order allows
EXCEPT = {
    "encoders": "messages plain_json types",
    "models": "suggest messages plain_json sections plugins types flow",
    "methods": "sections plugins types flow",
    "evaluate": "suggest messages storage types flow encoders",
    "library": "sections types flow models methods config sampling checkpoints",  # import selftrans: torch and nothing else
    "__init__": "library",
}

#: imports against the order, for the type checker only: methods read the config of a run, which holds their sections
TYPES_FROM_ABOVE = {("methods", "config")}
#: packages whose only third-party import is torch (others may import numpy, pillow, diffusers, ...)
TORCH_ONLY = {"device", "graphs", "precision", "types", "flow", "methods"}
#: packages whose wheels fail to import with some builds of torch
NEVER = {"torchvision", "timm", "torchmetrics"}
#: modules that run code stored in a file
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
MAX_FILE, MAX_FUNCTION = 350, 60


def method_names() -> set[str]:
    """Every built-in method, the keys of its sections, and its stages."""
    configs = [RunConfig(recipe="digits", method=name) for name in METHODS]
    return {*METHODS, *sections_of(METHODS.values()), *(stage.name for config in configs for stage in stages(config))}


METHOD_NAMES = method_names()
METHOD_NAME = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(sorted(METHOD_NAMES, key=len, reverse=True))})(?![A-Za-z0-9])")
#: syntax node -> its field that holds a name
NAMED_BY = {ast.Attribute: "attr", ast.Name: "id", ast.keyword: "arg", ast.arg: "arg"}
ENGLISH = {"structure"}  #: method names that are ordinary words of messages, too
#: methods themselves, recipes for them, and the two experiments that are about Self-Transcendence alone
MAY_NAME_METHODS = ("methods/", "recipes/", "experiments/quickstart.py", "experiments/bench/")
#: published layouts of checkpoints that have the name of a method, and where they are read, written and chosen
LAYOUTS, MAY_NAME_LAYOUTS = (
    {"repa"},
    (
        "models/sit_published.py",
        "models/mmdit_published.py",
        "interop/published_file.py",
        "cli/",
    ),
)
#: files that may probe attributes of models: file -> why
MAY_PROBE = dict.fromkeys(
    ("encoders/text.py", "encoders/vision.py", "evaluate/vision_features.py"),
    "models of transformers, whose attributes differ between families",
)
#: file names that several packages use: name -> why
SHARED_FILE_NAMES = {
    "__init__.py": "required by Python",
    "registry.py": "one in methods and one in models: the records by name",
    "spec.py": "one in methods and one in models: the record",
    "folder.py": "data/sources: a folder of pictures; sampling: a folder of samples",
}
MANNERED = re.compile(
    r"\b(strangers?|moods?|lest|whoever|told|beside|honest|somebody)\b|three in the morning|for want of|make room",
    re.IGNORECASE,
)

#: modules without a unit test of their name -> the test that covers them
COVERED_BY = {
    "__main__": "unit/cli/test_main.py",
    "cli/commands": "unit/cli/test_main.py",
    "cli/experiment_commands": "unit/cli/test_main.py",
    "cli/interop_commands": "unit/cli/test_main.py",
    "cli/prepare_command": "unit/cli/test_main.py",
    "data/decoded": "unit/data/test_prepare.py",
    "data/encode": "unit/data/test_prepare.py",
    "data/manifest": "unit/data/test_dataset.py",
    "data/manifest_text": "unit/data/test_dataset.py",
    "data/source_samples": "unit/data/test_prepare.py",
    "data/prepare_options": "unit/data/test_prepare.py",
    "data/reports": "unit/data/sources/test_source_warnings.py",
    "data/resolution": "unit/data/sources/test_decode.py",
    "data/resumable": "integration/test_prepare_parts.py",
    "data/shard_plan": "unit/data/test_prepare.py",
    "data/streaming/shard_reader": "unit/data/streaming/test_streamed.py",
    "data/sources/source": "unit/data/sources/test_open_source.py",
    "data/sources/table_file": "unit/data/sources/test_label_file.py",
    "encoders/latent_space": "unit/encoders/test_autoencoder.py",
    "encoders/pretrained": "unit/encoders/test_vision.py",
    "evaluate/extractors": "unit/evaluate/test_statistics.py",
    "experiments/autoencoder_report": "unit/experiments/test_train_autoencoder.py",
    "experiments/bench/loading_sampling": "unit/experiments/bench/test_bench.py",
    "experiments/bench/machine": "unit/experiments/bench/test_bench.py",
    "experiments/bench/plain_step": "unit/experiments/bench/test_bench.py",
    "experiments/bench/rounds": "unit/experiments/bench/test_bench.py",
    "experiments/bench/text_table": "unit/experiments/bench/test_bench.py",
    "experiments/step_cost": "unit/experiments/test_scale_plan.py",
    "experiments/comparison/compared_runs": "unit/experiments/comparison/test_finished_runs.py",
    "experiments/comparison/comparison_settings": "unit/experiments/comparison/test_compare.py",
    "experiments/comparison/measurement": "unit/experiments/comparison/test_compare.py",
    "experiments/opened_samples": "unit/experiments/test_evaluate_samples.py",
    "experiments/quickstart": "integration/test_pages.py",
    "experiments/comparison/runner": "unit/experiments/comparison/test_compare.py",
    "experiments/comparison/summary": "unit/experiments/comparison/test_compare.py",
    "experiments/comparison/worker": "unit/experiments/comparison/test_compare.py",
    "experiments/target_report": "unit/experiments/test_analyse_target.py",
    "experiments/target_teacher": "unit/experiments/test_analyse_target.py",
    "fine_tuning": "unit/train/test_initial_weights.py",
    "interop/interpolant_transformer": "unit/interop/test_sit_pipeline.py",
    "interop/pipeline_parts": "unit/interop/test_sit_pipeline.py",
    "interop/published_file": "unit/interop/test_importing.py",
    "interop/run_facts": "unit/interop/test_pushing.py",
    "models/bias_kernel": "unit/models/test_fused_bias.py",
    "models/gelu_product": "unit/models/test_fused_gelu.py",
    "models/label_published": "unit/models/test_sit_published.py",
    "models/dit_published": "unit/models/test_dit.py",
    "models/norm_kernel": "unit/models/test_fused_norm.py",
    "models/patch_transformer": "unit/models/test_label_transformer.py",
    "recipes/cifar10": "unit/recipes/test_recipes.py",
    "recipes/digits": "unit/recipes/test_recipes.py",
    "recipes/digits_t2i": "unit/recipes/test_recipes.py",
    "recipes/imagefolder": "unit/recipes/test_recipes.py",
    "recipes/imagenet": "unit/recipes/test_recipes.py",
    "recipes/imagenet_lightning": "unit/recipes/test_recipes.py",
    "recipes/mmdit_coco": "unit/recipes/test_recipes.py",
    "recipes/moving_digits": "integration/test_other_data.py",
    "recipes/speech_words": "integration/test_other_data.py",
    "sample_config": "unit/sampling/test_images.py",
    "sampling/run_settings": "unit/sampling/test_images.py",
    "train/checkpointing": "unit/train/test_resume.py",
    "train/dry_run_report": "unit/train/test_dry_run.py",
    "train/fitting": "unit/train/test_initial_weights.py",
    "train/given_weights": "unit/train/test_initial_weights.py",
    "train/interrupted": "unit/train/test_signals.py",
    "train/memory_use": "unit/checkpoints/test_adapted.py",
    "train/run": "integration/test_train.py",
    "train/run_report": "integration/test_train.py",
    "train/autoencoder_settings": "unit/experiments/test_train_autoencoder.py",
    "train/training_step": "unit/train/test_trainer.py",
    "ui/feature_job": "unit/ui/test_server.py",
    "ui/models_of_runs": "unit/ui/test_server.py",
    "ui/sampling_jobs": "unit/ui/test_server.py",
}
#: unit tests that are not named after a module -> why
OTHER_UNIT_TESTS = {
    "data/test_prepare_values": "`prepare` on arrays, which have no decoder and no autoencoder",
    "experiments/bench/test_gpu_lease": "benchmarks/gpu_lease.sh with its parts",
    "experiments/bench/test_prompt_control": "benchmarks/prompt_control.py",
    "experiments/bench/test_evidence_scripts": "scripts in benchmarks/ that make the evidence of docs/results/",
    "sampling/test_sample_to_folder": "`sample_to_folder` from a run to its files",
}


class Import(NamedTuple):
    module: str  #: dotted, absolute
    names: tuple[str, ...]  #: of `from module import names`
    when: str  #: "load" of the module, "call" of a function, or "typing" (for the type checker only)
    line: int


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import in `source` of src/selftrans/`file`; relative imports as absolute names."""
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
    """The packages of selftrans that an import names; `__init__` is selftrans itself."""
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


def forbidden_imports(source: str, file: str) -> list[str]:
    """Imports within selftrans that the order does not allow to `file`."""
    own = package_of(file)
    return [
        f"{file}:{found.line} imports {entered}; '{own}' may import: {' '.join(sorted(may_import(own))) or '-'}"
        for found in imports(source, file)
        for entered in sorted(packages_of(found) - {own} - may_import(own))
        if found.when != "typing" or (own, entered) not in TYPES_FROM_ABOVE
    ]


def cheap(module: str) -> bool:
    """Whether the command line may import this before it has parsed its arguments."""
    own = module.split(".")[:2] in (["selftrans", "cli"], ["selftrans", "suggest"], ["selftrans", "plugins"])
    return (
        own
        or module in ("selftrans.train.autoencoder_settings", "selftrans.messages")
        or module.split(".")[0] in {"tyro"} | sys.stdlib_module_names
    )


def foreign_packages(source: str, file: str) -> list[str]:
    """Imports of third-party packages that `file` may not use."""
    own, wrong = package_of(file), []
    for found in imports(source, file):
        top = found.module.split(".")[0]
        third_party = top != "selftrans" and top not in sys.stdlib_module_names
        if (
            top in NEVER | PICKLES
            or (third_party and own in TORCH_ONLY and top != "torch")
            or (own == "cli" and found.when == "load" and not cheap(found.module))
        ):
            wrong.append(f"{file}:{found.line} imports {found.module}")
    return wrong


def unsafe_calls(source: str, file: str) -> list[str]:
    """Calls that may run code from a file or from a hub, or write such a file."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            (name == "torch.load" and options.get("weights_only") != "True")
            or name in {"torch.save", "eval", "exec"}
            or (name.endswith(("import_module", "__import__")) and file != "plugins.py")  # code outside selftrans
            or options.get("allow_pickle", "False") != "False"
            or options.get("trust_remote_code", "False") != "False"
        ):
            wrong.append(f"{file}:{node.lineno} {ast.unparse(node)}")
    return wrong


def private_attributes(source: str, file: str) -> list[str]:
    """Private attributes of accelerate, which any version may change, outside of the one file that has a test for them."""
    if file == "train/processes.py":
        return []
    return [
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and ast.unparse(node.value).lower().endswith(("accelerator", "acceleratorstate"))
    ]


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
    """Projection heads by their names; `MultiHeadAttention` is not one."""
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


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """String constants that stand as statements: docstrings, and those below the fields of a dataclass."""
    bodies = (node for parent in ast.walk(tree) for node in ast.iter_child_nodes(parent) if isinstance(node, ast.Expr))
    return {node.value for node in bodies if isinstance(node.value, ast.Constant)}


def names_of_methods(source: str, file: str) -> list[str]:
    """Strings, attributes, variables and arguments that name a method, a section of one, or a stage."""
    if file.startswith(MAY_NAME_METHODS):
        return []
    tree, wrong = ast.parse(source), []
    skipped = docstrings(tree)
    allowed = LAYOUTS if file.startswith(MAY_NAME_LAYOUTS) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            found = set(METHOD_NAME.findall(node.value))
            found -= ENGLISH if " " in node.value else set()
        else:
            found = {getattr(node, NAMED_BY.get(type(node), ""), "")}
        wrong += [f"{file}:{node.lineno} names {name}" for name in sorted((found & METHOD_NAMES) - allowed)]
    return wrong


def details_of_models(source: str, file: str) -> list[str]:
    """`.blocks` of a model (the method `blocks()` of its config is public), and arithmetic on the area of a patch."""
    if package_of(file) == "models":
        return []
    tree, wrong = ast.parse(source), []
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        blocks = isinstance(node, ast.Attribute) and node.attr == "blocks" and node not in called
        area = (
            isinstance(node, ast.BinOp)
            and re.search(r"\bpatch(_size)?$", ast.unparse(node.left))
            and (isinstance(node.op, ast.Pow) or ast.unparse(node.left) == ast.unparse(node.right))
        )
        if blocks or area:
            wrong.append(f"{file}:{node.lineno} {ast.unparse(node)}: use `Backbone.repeated`, `grid` or `patchify`")
    return wrong


def probed_attributes(source: str, file: str) -> list[str]:
    """`hasattr` and `getattr` with a default on models and guidances: what is asked of them is declared in their class."""
    if package_of(file) == "models" or file in MAY_PROBE:
        return []
    probed = re.compile(r"model|student|teacher|backbone|objective|average|ema|guidance|head|\bg\b")
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"hasattr", "getattr"} and node.args:
            probing = ast.unparse(node.func) == "hasattr" or len(node.args) == 3
            if probing and probed.search(ast.unparse(node.args[0])):
                wrong.append(f"{file}:{node.lineno} {ast.unparse(node)}")
    return wrong


def mannered_words(source: str, file: str) -> list[str]:
    """Words that plain technical English does without."""
    lines = enumerate(source.splitlines(), start=1)
    return [f"{file}:{number} '{match[0]}'" for number, line in lines for match in MANNERED.finditer(line)]


RULES = [
    forbidden_imports,
    foreign_packages,
    unsafe_calls,
    private_attributes,
    too_long,
    heads,
    names_of_methods,
    details_of_models,
    probed_attributes,
    mannered_words,
]


def test_narrower_rules_agree_with_the_order() -> None:
    for name in set(EXCEPT) - {"__init__"}:
        assert may_import(name) <= set(ORDER[: ORDER.index(name)])


def test_every_file_is_in_the_order() -> None:
    assert FILES, f"no source under {SRC}"
    unknown = {file for file in FILES if package_of(file) not in (*ORDER, "__init__")}
    assert not unknown, f"not in ORDER: {unknown}; add a row with its purpose"
    assert not [file for file in FILES if Path(file).stem in {"util", "utils", "helpers", "misc", "common"}]


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds(rule) -> None:
    wrong = [line for file, source in FILES.items() for line in rule(source, file)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (forbidden_imports, "methods/repa.py", "from selftrans.models.sit import SiT"),
        (forbidden_imports, "methods/repa.py", "from ..models import sit"),
        (forbidden_imports, "methods/repa.py", "from selftrans import models"),
        (forbidden_imports, "methods/repa.py", "if TYPE_CHECKING:\n    from selftrans.models import sit"),
        (forbidden_imports, "evaluate/metrics.py", "import selftrans.methods.objective"),
        (forbidden_imports, "evaluate/metrics.py", "def f():\n    from selftrans import models"),
        (forbidden_imports, "flow.py", "from .train import trainer"),
        (forbidden_imports, "train/trainer.py", "from selftrans import Objective"),
        (foreign_packages, "cli/main.py", "import torch"),
        (foreign_packages, "cli/main.py", "from selftrans.train import trainer"),
        (foreign_packages, "methods/repa.py", "import numpy as np"),
        (foreign_packages, "encoders/autoencoder.py", "def f():\n    import torchvision.transforms"),
        (foreign_packages, "checkpoints/format.py", "from pickle import dumps"),
        (unsafe_calls, "interop/exporting.py", "torch.load(path)"),
        (unsafe_calls, "train/resume.py", "importlib.import_module(name)"),
        (unsafe_calls, "interop/exporting.py", "torch.load(path, weights_only=False)"),
        (unsafe_calls, "interop/exporting.py", "np.load(path, allow_pickle=flag)"),
        (unsafe_calls, "interop/exporting.py", "AutoModel.from_pretrained(path, trust_remote_code=True)"),
        (private_attributes, "train/trainer.py", "self.accelerator._models.clear()"),
        (private_attributes, "train/run.py", "AcceleratorState._reset_state()"),
        (too_long, "flow.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION),
        (too_long, "flow.py", "x = 1\n" * (MAX_FILE + 1)),
        (heads, "models/sit.py", "class ProjectionHead: ..."),
        (heads, "models/sit.py", "self.projectors = build()"),
        (names_of_methods, "train/run.py", "if config.method == 'vanilla': pass"),
        (names_of_methods, "train/run.py", "config.sections['stage1']"),
        (names_of_methods, "train/run.py", "config.stage2.teacher"),
        (names_of_methods, "train/run.py", "override(config, 'stage2.teacher')"),
        (names_of_methods, "experiments/comparison/runner.py", "f'{out}/stage1/checkpoints'"),
        (names_of_methods, "experiments/comparison/summary.py", "print('faster than self_transcendence')"),
        (names_of_methods, "cli/main.py", "dict(sra=1)"),
        (names_of_methods, "train/run.py", "layout = 'repa'"),
        (details_of_models, "train/fsdp.py", "for block in model.blocks: pass"),
        (details_of_models, "methods/self_transcendence.py", "out = student.patch**2 * channels"),
        (details_of_models, "methods/self_transcendence.py", "out = patch * patch * channels"),
        (probed_attributes, "train/trainer.py", "hasattr(self.objective.student, 'null')"),
        (probed_attributes, "methods/objective.py", "getattr(guidance, 'until_step', None)"),
        (probed_attributes, "methods/objective.py", "getattr(g, 'until_step', None)"),
        (mannered_words, "flow.py", "# lest a stranger changes it"),
        (mannered_words, "flow.py", "# at three in the morning"),
    ],
)
def test_each_rule_detects_its_example(rule, file: str, source: str) -> None:
    assert rule(source, file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("methods/repa.py", "from selftrans.types import Draw\nfrom .objective import Guidance\nimport torch"),
        ("cli/main.py", "import sys\ndef main():\n    import tyro\n    from selftrans.train import trainer"),
        ("experiments/comparison/compare.py", "from selftrans import evaluate\nfrom selftrans.train.run import run"),
        ("interop/exporting.py", "torch.load(path, weights_only=True, map_location='cpu')\nmodel.eval()"),
        ("models/mmdit.py", "class MultiHeadAttention: ..."),
        ("train/run.py", '"""A docstring may name stage1."""\nprint("the structure of the file")\nvanillas = 1'),
        ("interop/published_file.py", "layout = 'repa'"),
        ("checkpoints/load.py", "config.model.blocks()"),
        ("storage.py", "getattr(os, 'O_NOFOLLOW', 0)\ngetattr(model, 'depth')"),
        ("models/sit.py", "self.blocks, self.patch**2, hasattr(model, 'blocks')"),
    ],
)
def test_valid_code_breaks_no_rule(file: str, source: str) -> None:
    assert not [line for rule in RULES for line in rule(source, file)]


def test_the_trainer_names_no_method() -> None:
    shared = {"__init__", "objective", "guidance", "contract", "spec", "registry"}
    methods = {Path(file).stem for file in FILES if package_of(file) == "methods"} - shared
    trainer = FILES.get("train/trainer.py", "")
    assert not [method for method in methods if re.search(rf"\b{method}\b", trainer)]


def test_import_needs_torch_only() -> None:
    """Besides the standard library, it loads torch, what torch loads, and nothing else."""
    code = "import sys, torch\nbefore = {*sys.modules}\nfrom selftrans import *\nprint(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert packages - {"torch"} == {"selftrans"}


def missing_imports(source: str, file: str) -> list[str]:
    """Modules of selftrans, and names in them, that `source` imports and that do not exist."""
    wrong = []
    for found in imports(source, file):
        if found.module.partition(".")[0] != "selftrans":
            continue
        path = found.module.replace(".", "/").removeprefix("selftrans").removeprefix("/")
        held = FILES.get(f"{path}.py", FILES.get(f"{path}/__init__.py".removeprefix("/")))
        submodules = {name for name in found.names if f"{path}/{name}".removeprefix("/") in MODULES | PACKAGES}
        known = {"*"} | submodules | set(re.findall(r"\w+", held or ""))
        if held is None or not (set(found.names) <= known or "import *" in held):
            wrong.append(f"{file}:{found.line} imports {found.module} {' '.join(set(found.names) - known)}")
    return wrong


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "docs", "tests"])
def test_scripts_import_what_exists(folder: str) -> None:
    """No test runs all of them, and the type checker is not asked about modules that are missing."""
    sources = {path.as_posix(): path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py"))}
    wrong = [line for file, source in sources.items() for line in missing_imports(source, file)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("from selftrans.train.data_window import data_of", False),
        ("from selftrans.train.run_data import accelerator_of", False),
        ("def f():\n    import selftrans.experiments.compare", False),
        ("from selftrans.train.run_data import data_of", True),
        ("from selftrans.experiments import bench, html_report", True),
        ("from selftrans import flow, Objective\nimport selftrans", True),
    ],
)
def test_missing_imports_are_found(source: str, right: bool) -> None:
    assert bool(missing_imports(source, "script.py")) != right


def shared_file_names(files: Iterable[str]) -> set[str]:
    """Names that more than one file of these paths has, without those that may be shared."""
    counts = collections.Counter(Path(file).name for file in files)
    return {name for name, count in counts.items() if count > 1} - set(SHARED_FILE_NAMES)


def test_file_names_are_unique() -> None:
    assert not shared_file_names(FILES)
    assert shared_file_names(["data/sources/npz.py", "sampling/npz.py", "data/__init__.py", "cli/__init__.py"]) == {
        "npz.py"
    }
    counts = collections.Counter(Path(file).name for file in FILES)
    assert not [name for name in SHARED_FILE_NAMES if counts[name] < 2], "remove the entries that are no longer needed"
    assert counts["registry.py"] == counts["spec.py"] == 2


def module_of(test: str) -> str:
    """`methods/test_sra` -> `methods/sra`; a test with the name of its package tests `__init__`."""
    folder, _, name = test.rpartition("/")
    name = name.removeprefix("test_")
    if folder.rpartition("/")[2] == name:
        name = "__init__"
    return f"{folder}/{name}" if folder else name


UNIT_TESTS = {
    path.relative_to(TESTS / "unit").as_posix().removesuffix(".py") for path in TESTS.glob("unit/**/test_*.py")
}


def test_every_unit_test_belongs_to_a_module() -> None:
    assert module_of("methods/test_sra") == "methods/sra" and module_of("test_flow") == "flow"
    assert module_of("recipes/test_recipes") == "recipes/__init__"
    other = {test for test in UNIT_TESTS if module_of(test) not in MODULES}
    assert other == set(OTHER_UNIT_TESTS)


def test_every_module_says_what_is_in_it() -> None:
    assert not [file for file, source in FILES.items() if source.strip() and not ast.get_docstring(ast.parse(source))]


def test_every_module_has_a_unit_test_or_names_the_test_that_covers_it() -> None:
    tested = {module_of(test) for test in UNIT_TESTS}
    packages = {module for module in MODULES if module.endswith("__init__")}
    assert MODULES - packages - tested == set(COVERED_BY)
    assert not [file for file in COVERED_BY.values() if not (TESTS / file).is_file()]


def test_documents_and_tests_have_no_mannered_words() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(TESTS.rglob("*.py"))]
    texts = {path: path.read_text(encoding="utf-8") for path in pages if path != Path(__file__)}
    wrong = [line for path, text in texts.items() for line in mannered_words(text, path.relative_to(ROOT).as_posix())]
    assert not wrong, "\n" + "\n".join(wrong)
