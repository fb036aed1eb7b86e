"""The README: every command and Python block runs, at toy size, and the tree of the package names what exists."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.cli.main import main
from tests.support import captioned, published_files, published_vae
from tests.test_architecture import ORDER

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
TOY_TRAIN = (
    "--train.steps 4 --train.batch-size 8 --train.checkpoint-every 2 --model.width 32 --model.depth 3 --model.patch 8 "
    "--log.preview-images 4 --log.preview-steps 2 --stage1.head-width 16 --stage2.head-width 16"
)
#: options that make a README command small; appended to the command
TOY = {
    "prepare": "",
    "train": TOY_TRAIN,
    "sample": "--steps 2 --num 8",
    "classifier": "--epochs 1",
    "autoencoder": "--steps 3 --widths 8 8 8 --batch-size 4",
    "evaluate": "",
    "analyse": "--samples 40 --timesteps 0.4",
    "quickstart": "--steps 5 --images 40",
    "compare": "--steps 5 --images 24 --seeds 0 --workers 1 --methods vanilla layersync",
    "import": "--heads 2",  # of a width that no published model has
    "import-vae": "",
    "export": "",
}


def commands(kind: str = "bash") -> list[str]:
    lines = [
        line.split("#")[0].strip() for language, block in BLOCKS if language == kind for line in block.splitlines()
    ]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the inputs of the README's commands: pictures, a small ImageNet, and a VAE under its hub id."""
    from diffusers import AutoencoderKL

    workdir = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for folder, side in (("pictures", 40), ("imagenet/train", 64)):
        for name in ("first class", "second"):
            (workdir / folder / name).mkdir(parents=True)
            for k in range(12):
                image = Image.fromarray(rng.integers(0, 256, (side, side + k, 3), dtype=np.uint8))
                image.save(workdir / folder / name / f"{k}.png")
    captioned.pictures(workdir / "captioned")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=256,
    )
    vae.save_pretrained(workdir / "stabilityai" / "sd-vae-ft-mse")
    published = {"width": 32, "depth": 2, "heads": 2, "patch": 2, "channels": 4, "side": 4, "classes": 10}
    for name in ("SiT-XL-2-256.pt", "DiT-XL-2-256x256.pt"):
        published_files.save(workdir / name, published_files.state(**published, learn_sigma=True))
    published_files.save(workdir / "vavae-imagenet256-f16d32-dinov2.pt", published_vae.state(**published_vae.TINY))
    published_files.save(workdir / "latents_stats.pt", {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)})
    return workdir


def small(command: str) -> list[str]:
    """Arguments of a README command for `main`, with its toy options appended."""
    words = shlex.split(command.removeprefix("accelerate launch -m "))
    assert words[0] == "selftrans", f"the README shows a command that this test cannot run: {command}"
    extra = shlex.split(TOY[words[1]])
    if "diffusers-dit" in words:  # sizes have other names there
        extra = [{"--model.width": "--model.head-dim", "--model.depth": "--model.layers"}.get(x, x) for x in extra]
    if words[1] == "sample" and "--num" in words:  # TOY gives a smaller number
        del words[words.index("--num") : words.index("--num") + 2]
    return [*words[1:], *extra]


def test_every_shell_command_runs(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workdir)
    for command in commands():
        if command.startswith(("make ", "pip ")):
            continue
        assert main(small(command)) == 0, f"{command}\n{capsys.readouterr().err}"
    assert len(list((workdir / "samples" / "b2").glob("*.png"))) == 8
    assert (workdir / "samples" / "pictures" / "evaluate.json").exists()
    assert (workdir / "analysis" / "pca.png").exists()
    assert (workdir / "compared" / "compare.html").exists() and (workdir / "exported" / "model.safetensors").exists()


def test_make_targets_of_the_readme_run_quickstart_and_tests() -> None:
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert {"quickstart", "test"} <= set(targets)
    for target, runs in {"quickstart": "selftrans quickstart", "test": "pytest"}.items():
        printed = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert runs in printed


def test_quickstart_writes_a_self_contained_page(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workdir)
    assert main(["quickstart", "--out", "quickstart", *shlex.split(TOY["quickstart"])]) == 0, capsys.readouterr().err
    page = (workdir / "quickstart" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7  # curves, and samples and maps of three methods
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page needs other files"
    for name in ("vanilla", "stage 1 only", "Self-Transcendence"):
        assert name in page
    assert "FID" not in re.sub(r"base64,[^\"]*", "", page)
    printed = capsys.readouterr().out
    outcome = json.loads((workdir / "quickstart" / "table.json").read_text())["outcome"]
    assert outcome.startswith("With one seed, the distance of Self-Transcendence is ") and outcome in printed
    assert html.escape(outcome) in page and "Fréchet distance" in printed
    assert printed.count("\n") < 12 and "at step 5" in printed.splitlines()[0], "the table, what it shows, the outcome"


def test_python_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import selftrans

    toy = {"SiT-B/2": {"width": 32, "depth": 12, "heads": 2, "patch": 16}}
    monkeypatch.setattr(selftrans, "SIT_SIZES", toy)  # the block as it is, with a small SiT-B/2
    blocks = [block for language, block in BLOCKS if language == "python"]
    code = "\n".join(blocks)
    lines = [line for line in blocks[0].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 11  # a training loop and both stages
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4, 32, 32), torch.randint(1000, (8,))) for _ in range(3)]
    scope = {"batches": batches}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["latents"].shape == (4, 4, 32, 32)
    assert torch.isfinite(scope["latents"]).all()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in scope["student"].parameters())


def test_tree_of_the_readme_names_the_packages_that_exist() -> None:
    block = re.search(r"^```\nsrc/selftrans/\n(.*?)^tests/", README, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [re.fullmatch(r"  (\w+)(?:/|\.py) {2,}\S.*", line) for line in block[1].splitlines()]
    assert [line and line[1] for line in lines] == [name for name in reversed(ORDER) if name != "__main__"]
    others = re.findall(r"^(\w+)/ ", README, flags=re.MULTILINE)
    assert {"tests", "examples", "benchmarks", "docs"} <= set(others)
    assert [name for name in others if not (ROOT / name).is_dir()] == []
