"""`prepare`: what is stored is what the autoencoder says; stopped, repeated, hindered or misled, it loses nothing."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.data import Manifest, Shards, open_source, prepare, prepare_digits
from selftrans.data import encode as encode_module
from selftrans.latents import from_uint8, sample_latents, to_uint8
from selftrans.types import Batch


def picture(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """23 PNGs in two classes."""
    root = tmp_path / "my pictures"
    for i in range(23):
        folder = root / ("cat" if i % 3 else "wild dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def stopped_after(pictures_read: int) -> Iterator[None]:
    """Ctrl-C after this many pictures were encoded."""
    encode, seen = encode_module._Encoder.encode, 0

    def counting(self: encode_module._Encoder, decoded: encode_module._Decoded) -> np.ndarray:
        nonlocal seen
        seen += len(decoded.good)
        if seen > pictures_read:
            raise KeyboardInterrupt
        return encode(self, decoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module._Encoder, "encode", counting)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pixels_come_back_to_the_byte(pictures: Path, tmp_path: Path, dtype: str) -> None:
    manifest = prepare(pictures, tmp_path / "out", shard_size=10, batch_size=4, dtype=dtype, flip=True, progress=False)
    assert (manifest.count, manifest.shape, manifest.copies, manifest.resolution) == (23, (3, 8, 8), 2, 8)
    assert [shard.count for shard in manifest.shards] == [10, 10, 3] and manifest.classes == ("cat", "wild dog")
    assert sorted(contents(tmp_path / "out")) == sorted(
        ["manifest.json", *(f"{kind}-{k:05d}.bin" for kind in ("moments", "labels") for k in range(3))]
    )
    moments, labels = Shards.open(tmp_path / "out", verify=True).read(np.arange(23))
    source = open_source(pictures)
    expected = torch.from_numpy(np.stack([source.read(i) for i in range(23)]))
    assert torch.equal(to_uint8(moments[:, 0]), expected)
    assert torch.equal(to_uint8(moments[:, 1]), expected.flip(dims=(2,)))  # mirrored left to right
    assert torch.equal(moments[:, 0], from_uint8(expected).to(moments.dtype))  # as the pixel autoencoder says
    assert labels.tolist() == source.labels.tolist()


def test_vae_moments_are_stored_and_sampled_afresh(pictures: Path, tmp_path: Path, vae: str) -> None:
    from diffusers import AutoencoderKL

    options = {"autoencoder": vae, "flip": True, "dtype": "float32", "batch_size": 8, "progress": False}
    manifest = prepare(pictures, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert (manifest.shape, manifest.stochastic, manifest.scale) == ((2, 4, 4), True, 0.5)
    assert manifest.autoencoder == vae and manifest.moments_shape == (2, 4, 4, 4)
    moments, _ = Shards.open(tmp_path / "out").read(np.arange(23))
    pixels = from_uint8(torch.from_numpy(open_source(pictures).read(5))[None])
    with torch.no_grad():
        posteriors = AutoencoderKL.from_pretrained(vae).encode(torch.cat([pixels, pixels.flip(dims=(3,))])).latent_dist
    torch.testing.assert_close(moments[5, :, :2], posteriors.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments[5, :, 2:], posteriors.std, atol=1e-5, rtol=1e-5)
    first, second = (sample_latents(moments[:, 0], stochastic=True, scale=0.5, shift=0.0) for _ in range(2))
    assert Batch(first, torch.zeros(23)).z0.shape == (23, 2, 4, 4) and not torch.equal(first, second)


@pytest.mark.parametrize("autoencoder", ["pixel", "vae"])
def test_interrupted_and_continued_equals_uninterrupted(
    pictures: Path, tmp_path: Path, vae: str, autoencoder: str
) -> None:
    options = {
        "autoencoder": vae if autoencoder == "vae" else "pixel",
        "shard_size": 5,
        "batch_size": 2,
        "progress": False,
    }
    prepare(pictures, tmp_path / "whole", **options)  # type: ignore[arg-type]
    out = tmp_path / "parts"
    for count in (3, 7, 1, 9):  # 3 and 1 stop inside a shard: nothing of it counts
        with stopped_after(count):
            prepare(pictures, out, **options)  # type: ignore[arg-type]
        assert not (out / "manifest.json").exists() and not list(out.glob(".tmp*"))
        with pytest.raises(ValueError, match="not prepared or not finished"):
            Shards.open(out)
    assert len(list(out.glob("shard-*.json"))) == 2  # from 7, then from 9: none is made twice
    prepare(pictures, out, **options)  # type: ignore[arg-type]
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_between_writes(pictures: Path, tmp_path: Path) -> None:
    """A process that dies without a word, at a rename: the next call ends in the same bytes."""
    prepare(pictures, tmp_path / "whole", shard_size=12, progress=False)
    script = (
        "import os, sys; replace, left = os.replace, [int(sys.argv[3])]\n"
        "def dying(a, b):\n"
        "    left[0] -= 1\n"
        "    os._exit(9) if left[0] < 0 else replace(a, b)\n"
        "os.replace = dying\n"
        "from selftrans.data import prepare\n"
        "prepare(sys.argv[1], sys.argv[2], shard_size=12, progress=False)"
    )
    out, codes = tmp_path / "out", []
    for renames in (2, 4):  # between the two files of the first shard, inside the second
        codes.append(
            subprocess.run([sys.executable, "-c", script, pictures, out, str(renames)], check=False).returncode
        )
        assert list(out.glob(".tmp-*"))
    prepare(pictures, out, shard_size=12, progress=False)
    assert codes == [9, 9] and contents(out) == contents(tmp_path / "whole")


def test_repeating_does_nothing_and_says_so(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepare(pictures, tmp_path / "out")
    shown = capsys.readouterr()
    assert shown.out == "" and "23/23" in shown.err and "pictures/s" in shown.err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(encode_module, "load_autoencoder", None)  # is not needed
    pictures.rename(tmp_path / "elsewhere")  # the same pictures in another place
    assert prepare(tmp_path / "elsewhere", tmp_path / "out") == manifest
    assert "is complete already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": True}, "with flip False, not True"),
        ({"dtype": "float32"}, "with dtype float16, not float32"),
        ({"shard_size": 6}, "with shard_size 5, not 6"),
        ({"resolution": 16}, "with resolution None, not 16"),
        ({"source": "digits"}, "from other pictures"),
    ],
)
def test_other_options_are_refused_by_name(
    pictures: Path, tmp_path: Path, finished: bool, change: dict, message: str
) -> None:
    options = {"source": pictures, "out": tmp_path / "out", "shard_size": 5, "batch_size": 5, "progress": False}
    if finished:
        prepare(**options)  # type: ignore[arg-type]
    else:
        with stopped_after(7):
            prepare(**options)  # type: ignore[arg-type]
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{message}; repeat the command as it was, or choose another --out"):
        prepare(**(options | change))
    assert contents(tmp_path / "out") == before


def test_a_changed_picture_is_noticed(pictures: Path, tmp_path: Path) -> None:
    prepare(pictures, tmp_path / "out", progress=False)
    (pictures / "cat" / "new.png").write_bytes((pictures / "cat" / "01.png").read_bytes())
    with pytest.raises(ValueError, match="from other pictures"):
        prepare(pictures, tmp_path / "out", progress=False)


def test_a_lost_or_lying_shard_is_made_again(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(pictures, out, shard_size=5, progress=False)
    whole = contents(out)
    (out / "moments-00003.bin").unlink()
    (out / "labels-00001.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"labels-00001.bin has 5 bytes .* repeat the `selftrans prepare`"):
        Shards.open(out)
    prepare(pictures, out, shard_size=5, progress=False)
    assert contents(out) == whole
    Shards.open(out, verify=True)


# --- pictures that cannot be read -------------------------------------------------------------------------------------


def spoil(pictures: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(picture(0, 64)).save(whole, "JPEG")
    (pictures / "cat" / "04 torn.jpg").write_bytes(whole.getvalue()[:500])
    (pictures / "wild dog" / "empty ü.png").write_bytes(b"")


def test_an_unreadable_picture_stops_with_its_path(pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    with pytest.raises(ValueError, match=r"^cat/04 torn.jpg: cannot be read .*--skip-bad$"):
        prepare(pictures, tmp_path / "out", shard_size=3, progress=False)
    # what was done counts, and the same command with --skip-bad goes on from there
    manifest = prepare(pictures, tmp_path / "out", shard_size=3, skip_bad=True, progress=False)
    assert manifest.count == 23 and [name for name, _ in manifest.skipped] == [
        "cat/04 torn.jpg",
        "wild dog/empty ü.png",
    ]
    assert (
        "2 unreadable pictures left out" in manifest.summary() and "wild dog/empty ü.png: empty" in manifest.summary()
    )
    moments, labels = Shards.open(tmp_path / "out", verify=True).read(np.arange(23))
    source = open_source(pictures)
    good = [i for i in range(25) if source.name(i) not in dict(manifest.skipped)]
    assert torch.equal(to_uint8(moments[:, 0]), torch.from_numpy(np.stack([source.read(i) for i in good])))
    assert labels.tolist() == [source.label(i) for i in good]


def test_skipping_continues_to_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    options = {"shard_size": 1, "skip_bad": True, "progress": False}  # the shard of a bad picture is empty
    prepare(pictures, tmp_path / "whole", **options)  # type: ignore[arg-type]
    with stopped_after(9):
        prepare(pictures, tmp_path / "out", **options)  # type: ignore[arg-type]
    prepare(pictures, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(Shards.open(tmp_path / "out", verify=True).read(np.arange(23))[0]) == 23


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 pictures is readable; the first: a.png \(empty"):
        prepare(tmp_path / "x", tmp_path / "out", resolution=8, skip_bad=True, progress=False)


def test_a_fault_of_the_machine_is_not_a_bad_picture(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    source = open_source(pictures)
    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(ValueError, match="Too many open files") as caught:
        source.read(0)
    assert type(caught.value) is ValueError  # --skip-bad would pass over a BadPicture


# --- places that cannot be written ------------------------------------------------------------------------------------


def test_output_that_is_a_file_or_holds_other_things(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is not a folder"):
        prepare(pictures, tmp_path / "file", progress=False)
    with pytest.raises(ValueError, match=r"cannot write .*Not a directory"):
        prepare(pictures, tmp_path / "file" / "below", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no earlier preparation"):
        prepare(pictures, tmp_path / "full", progress=False)
    with pytest.raises(ValueError, match="lies inside the pictures"):
        prepare(pictures, pictures / "out", progress=False)
    assert (tmp_path / "file").read_text() == "mine" and sorted(contents(tmp_path / "full")) == ["thesis.tex"]
    assert sorted(p.name for p in pictures.iterdir()) == ["cat", "wild dog"]


def test_a_read_only_output(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # the superuser of a test machine is refused nothing
    with pytest.raises(ValueError, match=r"cannot write .*out: Permission denied; make room or choose another --out"):
        prepare(pictures, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_whole_shards(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, left, sync = tmp_path / "out", 8, os.fsync

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"cannot write .*moments-00001.bin: No space left on device; make room"):
            prepare(pictures, out, shard_size=5, progress=False)
    assert sorted(contents(out)) == [".lock", "labels-00000.bin", "moments-00000.bin", "plan.json", "shard-00000.json"]
    prepare(pictures, out, shard_size=5, progress=False)
    prepare(pictures, tmp_path / "whole", shard_size=5, progress=False)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_disk_that_refuses_large_files(pictures: Path, tmp_path: Path) -> None:
    """The kernel's own refusal: a limit on the size of files, reached in the middle of a shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
        with pytest.raises(ValueError, match=r"cannot write .*moments-00000.bin: File too large"):
            prepare(pictures, tmp_path / "out", batch_size=2, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").glob("moments*")) and not list((tmp_path / "out").glob(".tmp-*"))
    assert prepare(pictures, tmp_path / "out", progress=False).count == 23


def test_two_at_once(pictures: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another `selftrans prepare` is writing to"):
            prepare(pictures, tmp_path / "out", progress=False)
    assert prepare(pictures, tmp_path / "out", progress=False).count == 23


# --- options, digits, damage, and real photographs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of float16, float32"),
        ({"precision": "fp8"}, "precision 'fp8' is not one of"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"autoencoder": "nonsense"}, "no autoencoder 'nonsense'"),
    ],
)
def test_bad_options_leave_no_trace(pictures: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(pictures, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_resolutions_an_autoencoder_cannot_take(pictures: Path, tmp_path: Path, vae: str) -> None:
    with pytest.raises(ValueError, match=r"resolution 9 is not a multiple of 2"):
        prepare(pictures, tmp_path / "out", autoencoder=vae, resolution=9, progress=False)


def test_moments_beyond_half_precision(
    pictures: Path, tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selftrans.latents import DiffusersAutoencoder, Moments

    monkeypatch.setattr(
        DiffusersAutoencoder,
        "encode",
        lambda self, x: Moments(torch.full((len(x), 2, 4, 4), 1e5), torch.ones(len(x), 2, 4, 4)),
    )
    with pytest.raises(ValueError, match=r"^cat/01.png: its moments are too large for float16; try --dtype float32"):
        prepare(pictures, tmp_path / "half", autoencoder=vae, progress=False)
    assert prepare(pictures, tmp_path / "full", autoencoder=vae, dtype="float32", progress=False).count == 23


def test_an_ignored_option_warns(pictures: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="precision bfloat16 is ignored"):
        prepare(pictures, tmp_path / "a", precision="bfloat16", progress=False)
    with pytest.warns(UserWarning, match="label_column is ignored"):
        prepare(pictures, tmp_path / "b", label_column="x", progress=False)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_damaged_folder_is_named(pictures: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"version": 1')
    with pytest.raises(ValueError, match=r"out holds a damaged preparation \(.*\); delete it, or choose another --out"):
        prepare(pictures, tmp_path / "out", progress=False)


def test_digits_are_made_once(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    shards = prepare_digits(tmp_path / "digits")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").iterdir()}
    again = prepare_digits(tmp_path / "digits")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").iterdir()} == written
    assert again.manifest == shards.manifest and shards.manifest.shape == (1, 8, 8)
    assert shards.manifest.classes == tuple("0123456789") and len(shards) == 1797
    moments, labels = shards.read(np.arange(1797))
    data = load_digits()
    assert labels.tolist() == data.target.tolist()
    # 16 grey levels of the scan, recovered from the pixels
    assert np.array_equal(np.rint((moments[:, 0, 0].float().numpy() + 1) * 8), data.images)


def test_real_photographs(cifar10_zip: Path, tmp_path: Path) -> None:
    """The first shard of CIFAR-10's zip: 8192 of 50,000 pictures, in order, then stopped."""
    with stopped_after(8192):
        prepare(cifar10_zip, tmp_path / "out", resolution=32, batch_size=512, progress=False)
    plan = Manifest.from_json((tmp_path / "out" / "plan.json").read_text())
    assert plan.shape == (3, 32, 32) and len(plan.classes) == 10 and plan.classes[0] == "airplane"
    moments = np.fromfile(tmp_path / "out" / "moments-00000.bin", "<f2").reshape(8192, 3, 32, 32)
    labels = np.fromfile(tmp_path / "out" / "labels-00000.bin", "<i8")
    assert np.bincount(labels).tolist() == [5000, 3192]
    with zipfile.ZipFile(cifar10_zip) as archive:
        for row, name in ((0, "airplane/0000.jpg"), (4999, "airplane/4999.jpg"), (8191, "automobile/3191.jpg")):
            pixels = np.asarray(Image.open(archive.open(name)), dtype=np.float64)  # (32, 32, 3)
            assert np.abs((moments[row].transpose(1, 2, 0).astype(np.float64) + 1) * 127.5 - pixels).max() < 0.1
