"""Published SiT files: the same network in either convention of time, sizes from shapes, and which tensors are refused."""

import pytest
import torch

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.models.sit_published import reflection
from tests.support.importing import HEADS, off, run_import
from tests.support.published_files import TINY, Assembled, options, save, state
from tests.support.toy import quick  # noqa: F401 - a fixture


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("convention", ["repa", "sit"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_imported_network_equals_one_assembled_from_diffusers(tmp_path, qk_norm, convention, learn_sigma):
    raw, ema = (state(**TINY, qk_norm=qk_norm, learn_sigma=learn_sigma, seed=k) for k in (1, 2))
    file = save(tmp_path / "a.pt", {"model": raw, "ema": ema, "opt": None, "args": options(convention)})
    run, output = run_import(file, tmp_path / "run")
    assert f"those of {convention.upper()}, from its stored options" in output
    for weights, named in (("raw", raw), ("ema", ema)):
        assert off(run, Assembled(named, **TINY), TINY, weights=weights, flip=convention == "sit") < 1e-5
    found = load_model(run).config.model
    assert (found.qk_norm, found.width, found.depth, found.heads, found.patch) == (qk_norm, 32, 3, 2, 2)


@pytest.mark.parametrize(("qk_norm", "convention"), [(False, "sit"), (True, "repa")])
def test_published_size_at_full_width_and_depth(tmp_path, qk_norm, convention):
    sizes = {"width": 384, "depth": 12, "heads": 6, "patch": 2, "channels": 4, "side": 8, "classes": 1000}
    named = state(**sizes, qk_norm=qk_norm, learn_sigma=convention == "sit")
    file = save(tmp_path / "SiT.pt", named)
    run, output = run_import(file, tmp_path / "run", heads=None, name="SiT-S/2", convention=convention)
    assert off(run, Assembled(named, **sizes), sizes, flip=convention == "sit") < 1e-5
    found = load_model(run)
    assert found.config.model.name == "SiT-S/2" and found.config.model.width is None
    assert found.autoencoder == "stabilityai/sd-vae-ft-mse" and found.model.num_classes == len(found.classes) == 1000
    assert found.step == 0 and "taken as 0; set it with --step N" in output


def test_reflection_maps_sinusoids_of_t_to_those_of_one_minus_t():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.linspace(0, 1, 33)
    embedded = [
        get_timestep_embedding(s, 256, flip_sin_to_cos=True, downscale_freq_shift=0).double() for s in (t, 1 - t)
    ]
    turn = reflection(256)
    assert (embedded[0] @ turn - embedded[1]).abs().max() < 1e-6
    assert (turn @ turn - torch.eye(256, dtype=torch.float64)).abs().max() < 1e-15 and torch.equal(turn, turn.T)


def test_half_precision_and_averaged_positions_are_accepted(tmp_path):
    named = {name: tensor.half() for name, tensor in state(**TINY).items()}
    named["pos_embed"] = named["pos_embed"] + 5e-4
    run, _ = run_import(save(tmp_path / "a.pt", named), tmp_path / "run", convention="repa")
    named = {name: tensor.float() for name, tensor in named.items()} | {"pos_embed": state(**TINY)["pos_embed"]}
    assert off(run, Assembled(named, **TINY), TINY) < 1e-5
    assert load_model(run).model.pos_embed.dtype == torch.float32


def test_possible_dit_file_warns(tmp_path, capsys):
    """DiT's files have the same names and shapes; the user must decide."""
    for name, content in {"a": state(**TINY, learn_sigma=True), "b": {"ema": state(**TINY, learn_sigma=True)}}.items():
        file = save(tmp_path / f"{name}.pt", content)
        words = ["import", str(file), *HEADS, "--out"]
        assert main([*words, str(tmp_path / name / "guessed")]) == 0
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and file.name in output.err, output.err
        assert "may be a DiT checkpoint" in output.err and "--convention sit" in output.err
        assert "those of SIT, a guess" in output.out and "DiT" in output.out
        assert main([*words, str(tmp_path / name / "chosen"), "--convention", "sit"]) == 0
        output = capsys.readouterr()
        assert not output.err and "those of SIT, from --convention" in output.out
    certain = {"ema": state(**TINY, learn_sigma=True), "args": options("sit")}
    for name, content in {"none": state(**TINY), "args": certain}.items():
        assert main(["import", str(save(file, content)), *HEADS, "--out", str(tmp_path / name)]) == 0
        assert not capsys.readouterr().err, name


def altered(changes):
    named = state(**TINY, qk_norm=True) | changes
    return {name: tensor for name, tensor in named.items() if tensor is not None}


FLAT = torch.zeros(1)


TURNED = state(**TINY)["pos_embed"].view(4, 4, 32).transpose(0, 1).reshape(1, 16, 32)


NAN = torch.full((96,), float("nan"))


WRONG = {
    "unknown": ({"blocks.1.extra.weight": FLAT}, "unknown: 1 (blocks.1.extra.weight)"),
    "many": ({f"x{k}": FLAT for k in range(9)}, "unknown: 9 (x0, x1, x2, ...)"),
    "missing": (
        {"blocks.1.mlp.fc1.bias": None, "t_embedder.mlp.2.bias": None},
        "missing: 2 (t_embedder.mlp.2.bias, blocks.1.mlp.fc1.bias)",
    ),
    "misshapen": (
        {"blocks.0.attn.proj.weight": torch.zeros(32, 31)},
        "misshapen: 1 (blocks.0.attn.proj.weight (32, 31) instead of (32, 32))",
    ),
    "all three": (
        {"x": FLAT, "blocks.0.attn.proj.bias": None, "blocks.0.mlp.fc1.bias": torch.zeros(5)},
        "unknown: 1 (x); missing: 1 (blocks.0.attn.proj.bias); misshapen: 1",
    ),
    "another ratio": ({f"blocks.{k}.mlp.fc1.weight": torch.zeros(64, 32) for k in range(3)}, "misshapen: 3"),
    "a gap": ({k: None for k in state(**TINY, qk_norm=True) if k.startswith("blocks.1.")}, "unknown: 14 (blocks.2."),
    "positions": ({"pos_embed": torch.randn(1, 16, 32)}, "pos_embed is not the fixed table"),
    "rows for columns": ({"pos_embed": TURNED}, "pos_embed is not the fixed table"),
    "no square": ({"pos_embed": torch.zeros(1, 15, 32)}, "15 tokens"),
    "nan": ({"blocks.2.attn.qkv.bias": NAN}, "blocks.2.attn.qkv.bias holds values that are not finite"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_unknown_missing_and_misshapen_tensors_are_listed(tmp_path, capsys, kind):
    changes, message = WRONG[kind]
    file = save(tmp_path / "a.pt", altered(changes))
    assert main(["import", str(file), "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists() and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ({}, [], "width 32, not a published size; set its number of attention heads with --heads"),
        ({"qk_norm": True}, ["--heads", "4"], "has 2 attention heads"),
        ({"heads_": 5}, ["--heads", "5"], "heads 5"),
        ({"channels": 16}, HEADS, "--autoencoder"),
        ({}, [*HEADS, "--name", "SiT-XL/2"], "is not SiT-XL/2: it has width 32, depth 3, heads 2, patch 2"),
        ({"args": options("sit", path_type="VP")}, HEADS, "path VP"),
        ({"args": options("sit", prediction="score")}, HEADS, "predicts score"),
        ({"args": options("repa", num_classes=11)}, HEADS, "11 label vectors for 11 classes"),
        ({"args": options("repa", encoder_depth="x"), "projectors": "stage1"}, HEADS, "its stored options cannot be used"),
        ({"args": options("repa", encoder_depth=9), "projectors": "stage1"}, HEADS, "block 9"),
        ({}, [*HEADS, "--step", "-1"], "must not be negative"),
    ],
)  # fmt: skip
def test_unsupported_file_names_the_reason(tmp_path, capsys, content, words, message):
    args = content.pop("args", None)
    content.pop("heads_", None)
    named = state(**TINY | content)
    file = save(tmp_path / "a.pt", {"model": named, "ema": named, "args": args})
    assert main(["import", str(file), "--out", str(tmp_path / "run"), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_cosine_path_of_sit_is_kept(tmp_path):
    named = state(**TINY)
    file = save(tmp_path / "a.pt", {"model": named, "ema": named, "args": options("sit", path_type="GVP")})
    run, _ = run_import(file, tmp_path / "run")
    assert load_model(run).config.train.path == "cosine"
