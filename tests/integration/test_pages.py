"""Commands and Python blocks of the README and of the pages in docs/ run, at toy size, in the order of PAGES."""

from __future__ import annotations

import html
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selftrans.cli.commands import COMMANDS
from selftrans.cli.main import main, parse_command
from selftrans.cli.parse import UsageError
from selftrans.config import to_json
from selftrans.data.prepare import BUILT_IN
from selftrans.experiments.comparison.comparison_settings import for_method
from selftrans.experiments.quickstart import quickstart
from selftrans.recipes.digits import digits
from tests.support import page_inputs
from tests.support.browser import browser, window  # noqa: F401 - a fixture
from tests.support.pages import PROGRAMS, REASONS, ROOT, Block, blocks, inline_commands, smaller, words_of
from tests.support.pools import one_process  # noqa: F401 - a fixture
from tests.support.toy import quick  # noqa: F401 - a fixture
from tests.test_architecture import ORDER

#: pages whose commands run, in this order: a page may use what those above it have made
PAGES = (
    "README.md",
    "docs/tutorial.md",
    "docs/measuring.md",
    "docs/comparing.md",
    "docs/autoencoder.md",
    "docs/checkpoints.md",
    "docs/ecosystem.md",
    "docs/fine-tuning.md",
    "docs/guidance.md",
    "docs/target.md",
    "docs/published-figures.md",
    "docs/data.md",
    "docs/text.md",
)
LIBRARY = "docs/library.md"  #: its blocks run on a small model, in a test of their own
SHORT = (
    "--train.steps 4 --train.batch-size 8 --train.checkpoint-every 4 --train.preview-every 4 --log.preview-images 4 "
    "--log.preview-steps 2 --log.tensorboard False"
)
HEADS = "--stage1.head-width 16 --stage2.head-width 16"
NARROW = f"--model.width 32 --model.depth 3 --model.patch 8 {HEADS}"
OF_DIGITS = "quickstart/digits-classifier.safetensors"  #: trained once, by the quickstart
#: options that make a command small, by its name
TOY = {
    "sample": "--steps 2 --num 8",
    "classifier": "--epochs 1",
    "autoencoder": "--steps 3 --widths 8 8 8 --batch-size 4",
    "analyse": "--samples 40 --timesteps 0.4",
    "quickstart": "--steps 3 --images 40 --workers 1",
    "compare": "--steps 2 --sample.steps 2 --images 24 --seeds 0 --workers 1 --methods vanilla layersync "
    f"--features {OF_DIGITS}",
    "import": "--heads 2",  # of a width that no published model has
}
#: of `train`, by its recipe
TOY_TRAIN = {
    "digits": SHORT,  # is small
    "digits_t2i": SHORT,
    "imagefolder": f"{SHORT} {NARROW}",
    "imagefolder_t2i": f"{SHORT} {NARROW}",
    "mmdit_coco": f"{SHORT} {NARROW} --stage1.block 1 --stage2.student-block 2 --stage2.teacher-block 2 --stage1.steps 2",
    "sit_imagenet_b2": f"{SHORT} {NARROW}",
}
#: of a command with this word in it: options in addition to those above, or in their place
SPECIAL = {
    ("train", "runs/buckets"): "--model.patch 2",  # which divides the sides of all buckets
    ("train", "runs/small"): "--model.name SiT-S/8 --stage1.steps 2",
    ("sample", "samples/wide"): "--num 2",
    ("autoencoder", "vae-digits"): "--widths 8 8",
}


def small(command: str) -> list[str]:
    """Arguments of a command of a page for `main`, at toy size."""
    words = words_of(command)
    assert words, f"the page shows a command that this test cannot run: {command}"
    options = TOY_TRAIN[words[1]] if words[0] == "train" else TOY.get(words[0], "")
    if words[0] == "evaluate":
        options = "--num 40 --steps 2" if words[1].startswith("runs/") else ""
        options += f" --features {OF_DIGITS}" if "digits" in words else ""
    if "--init" in words:  # the model is that of the given weights
        options = f"{SHORT} {HEADS}" + (" --init.heads 2" if "--init.convention" in words else "")
    if "--target" in words:
        options = "--images 160"
    made = smaller(words, options)
    for (name, word), others in SPECIAL.items():
        if words[0] == name and word in words:
            made = smaller(made, others)
    return made


class Pages:
    """Runs the commands of pages in one folder; each different command once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = page_inputs.make(folder), set()

    def run(self, page: str, capsys: pytest.CaptureFixture[str]) -> None:
        for earlier in PAGES[: PAGES.index(page) + 1]:
            for block in blocks(earlier):
                if not block.skipped:
                    self.run_block(block, capsys)

    def run_block(self, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
        key = (block.page, block.text)
        if block.language == "python" and key not in self.ran:
            exec(compile(block.text, block.page, "exec"), {"__name__": "page"})
            self.ran.add(key)
        for command in block.commands if block.language == "bash" else ():
            if command in self.ran or command.startswith(("make ", "pip ")):
                continue
            assert main(small(command)) == 0, f"{block.page}: {command}\n{capsys.readouterr().err}"
            self.ran.add(command)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return Pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def there(pages: Pages, monkeypatch: pytest.MonkeyPatch, quick: None, one_process: None) -> Pages:  # noqa: F811
    """The folder of the pages as the working directory; the sentences of digits_t2i are not encoded beforehand."""
    monkeypatch.setitem(BUILT_IN, "digits_t2i", replace(BUILT_IN["digits_t2i"], store="ids"))
    monkeypatch.chdir(pages.folder)
    return pages


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page: str, there: Pages, capsys: pytest.CaptureFixture) -> None:
    there.run(page, capsys)


def test_first_screen_is_short() -> None:
    """What, why, two commands, a table, and links: everything else has its page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 75
    assert {"make quickstart", "make test"} <= set(commands_of("README.md"))


def commands_of(page: str) -> list[str]:
    return [command for block in blocks(page) if block.language == "bash" for command in block.commands]


def test_pages_leave_what_they_say(there: Pages, capsys: pytest.CaptureFixture) -> None:
    there.run(PAGES[-1], capsys)
    for file in (
        "samples/pictures/evaluate.json",
        "analysis/pca.png",
        "compared/compare.html",
        "vae/reconstructions.png",
        "exported/model.safetensors",
        "data/buckets/buckets.json",
    ):
        assert (there.folder / file).is_file(), file
    assert len(list((there.folder / "samples" / "sentences").glob("*.png"))) == 8


def test_quickstart_writes_a_self_contained_page(
    there: Pages, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.run("docs/tutorial.md", capsys)
    page = (there.folder / "quickstart" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7  # curves, and samples and maps of three methods
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page needs other files"
    for name in ("vanilla", "stage 1 only", "Self-Transcendence", "Fréchet distance"):
        assert name in page
    outcome = json.loads((there.folder / "quickstart" / "table.json").read_text())["outcome"]
    assert outcome.startswith("With one seed, the distance of Self-Transcendence is ") and html.escape(outcome) in page
    assert "FID" not in re.sub(r"base64,[^\"]*", "", page)
    runs = there.folder / "quickstart"
    alone, taught = (
        json.loads((runs / f"{name}-seed0" / "run.json").read_text()) for name in ("vanilla", "self_transcendence")
    )
    assert taught["teacher"]["steps"] == 2, "an early checkpoint of stage 1 alone"
    assert alone["total_tflops"] >= taught["total_tflops"] > alone["total_tflops"] * (1 - 1 / alone["student_steps"])
    monkeypatch.chdir(there.folder)
    capsys.readouterr()
    quickstart(Path("quickstart"), steps=3, images=40, workers=1)  # again
    assert capsys.readouterr().out.startswith("All is trained and measured; drawing quickstart/report.html\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("self_transcendence", {"stage1.steps": 1000}, "with stage1.steps 1000, now 320; remove that folder"),
        (
            "self_transcendence",
            {"train.lr": 1e-3, "stage1.steps": 320},
            "with train.lr 0.001, now 0.008; remove that folder",
        ),
        ("vanilla", {"train.steps": 2200}, "with train.steps 2200, now 1287; remove that folder"),
        ("vanilla", "{", r"config.json cannot be used \(.*\); restore it, or choose another --out"),
    ],
)
def test_quickstart_of_other_settings_is_kept(name: str, text: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}-seed0" / "config.json"
    file.parent.mkdir()
    config = for_method(digits().override({"train.steps": 800}), name)
    file.write_text(text if isinstance(text, str) else to_json(config.override(text)))
    before = file.read_text()
    with pytest.raises(ValueError, match=message):
        quickstart(tmp_path)
    assert file.read_text() == before and not list(tmp_path.glob("*/run.json"))


def test_quickstart_page_in_a_browser(there: Pages, capsys: pytest.CaptureFixture, browser: Any) -> None:  # noqa: F811
    """Every picture loads, nothing is asked of another machine, and neither a wide nor a narrow window scrolls sideways."""
    there.run("docs/tutorial.md", capsys)
    file = (there.folder / "quickstart" / "report.html").resolve()
    outcome = json.loads(file.with_name("table.json").read_text())["outcome"]
    with window(browser, file.as_uri()) as page:
        page.goto(file.as_uri())
        for width in (400, 1400):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.get_by_text(outcome).is_visible()
            assert "Self-Transcendence" in page.locator("table").first.inner_text()
        pictures = page.evaluate("[...document.images].map((each) => each.complete && each.naturalWidth > 0)")
    assert pictures == [True] * 7


def test_make_targets_run_what_they_say() -> None:
    for target, runs in {
        "quickstart": "selftrans quickstart",
        "test": "pytest",
        "docs": "mkdocs build --strict",
    }.items():
        printed = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert runs in printed


def test_training_loop_of_the_library_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import selftrans

    toy = {"SiT-B/2": {"width": 32, "depth": 12, "heads": 2, "patch": 16}}
    monkeypatch.setattr(selftrans, "SIT_SIZES", toy)  # the block as it is, with a small SiT-B/2
    code = [block.text for block in blocks(LIBRARY) if block.language == "python" and not block.skipped]
    lines = [line for line in code[0].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 11  # a training loop and both stages
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4, 32, 32), torch.randint(1000, (8,))) for _ in range(3)]
    scope = {"batches": batches}
    exec(compile("\n".join(code), LIBRARY, "exec"), scope)
    assert scope["latents"].shape == (4, 4, 32, 32)
    assert torch.isfinite(scope["latents"]).all()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in scope["student"].parameters())


def test_tree_of_the_layout_page_names_the_packages_that_exist() -> None:
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    block = re.search(r"^```\nsrc/selftrans/\n(.*?)^tests/", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [re.fullmatch(r"  (\w+)(?:/|\.py) {2,}\S.*", line) for line in block[1].splitlines()]
    assert [line and line[1] for line in lines] == [name for name in reversed(ORDER) if name != "__main__"]
    others = re.findall(r"^(\w+)/ ", text, flags=re.MULTILINE)
    assert {"tests", "examples", "benchmarks", "docs"} <= set(others)
    assert [name for name in others if not (ROOT / name).is_dir()] == []


def test_every_page_is_run_or_says_why_not() -> None:
    """A page that is new: add it to PAGES, or write `<!-- not run: REASON -->` above its blocks."""
    others = sorted(f"docs/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md"))
    for page in [*PAGES, *(page for page in others if page not in PAGES)]:
        for block in blocks(page):
            if block.skipped:
                assert block.skipped.startswith(REASONS), f"{page}: '{block.skipped}' is none of {REASONS}"
                named = re.search(r"run by (tests/\S+)", block.skipped)
                assert named is None or (ROOT / named[1]).is_file(), f"{page}: {block.skipped}"
            elif block.language == "python" or any(words_of(command) for command in block.commands):
                assert page in (*PAGES, LIBRARY), f"{page} has commands: add it to PAGES of {Path(__file__).name}"
            if block.language == "bash":
                known = [
                    command
                    for command in block.commands
                    if re.split(r"[= ]", command)[0].isupper() or command.startswith(PROGRAMS)
                ]
                assert known == block.commands, f"{page}: {set(block.commands) - set(known)}"
            if block.language == "":
                assert not re.search(r"^selftrans ", block.text, flags=re.MULTILINE), f"{page}: write ```bash"


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in DOCUMENTS])
def test_commands_that_are_not_run_can_be_parsed(page: str) -> None:
    """Names of commands, recipes and options are right in blocks that are not run, and in the text."""
    skipped = [each for block in blocks(page) if block.language == "bash" and block.skipped for each in block.commands]
    for command in (*skipped, *inline_commands(page)):
        for script in re.findall(r"benchmarks/\w+\.py", command):
            assert (ROOT / script).is_file(), command
        words = words_of(command.replace("RECIPE", "digits"))
        wrong = ""
        if len(words) > 1 and not {"--help", "NAME"} & set(words) and "my_method" not in command:
            try:
                parse_command(words)
            except UsageError as error:
                wrong = str(error)
        incomplete = command not in skipped and "missing" in wrong  # the text may leave out what a command needs
        assert not wrong or incomplete, f"{command}: {wrong}"
        assert not words or words[0] in COMMANDS, command
