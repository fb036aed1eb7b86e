"""What the commands on the pages read: small pictures, captions, sounds, and stand-ins for the models of a hub."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from tests.support import captioned, published_files, published_vae
from tests.support.clip import save_clip
from tests.support.clips import sounds
from tests.support.pictures import encoded, write, zipped
from tests.support.vision import save_encoder


def make(folder: Path) -> Path:
    """Every input, in an empty folder that is then the working directory."""
    pictures(folder)
    captions(folder)
    sounds(folder / "words")
    models_of_the_hub(folder)
    published(folder)
    return folder


def pictures(folder: Path) -> None:
    """Class folders, a small ImageNet, and a zip of CIFAR-10's shape."""
    rng = np.random.default_rng(0)
    for where, side in (("pictures", 40), ("imagenet/train", 64)):
        write(
            folder / where,
            {
                f"{name}/{k}.png": encoded(rng.integers(0, 256, (side, side + k, 3), dtype=np.uint8))
                for name in ("first class", "second")
                for k in range(12)
            },
        )
    cifar = {
        f"{'cat' if k % 2 else 'dog'}/{k}.png": encoded(rng.integers(0, 256, (32, 32, 3), np.uint8)) for k in range(24)
    }
    zipped(folder / "cifar10-train.zip", cifar)


def captions(folder: Path) -> None:
    """Captioned pictures: next to each other, as COCO's json, in a tar, in a parquet file; and a file of prompts."""
    captioned.pictures(folder / "captioned")
    files = [encoded(captioned.picture(i, side=32), "JPEG") for i in range(16)]
    for part in ("train2014", "val2014"):
        write(folder / part, {f"{i:03d}.jpg": data for i, data in enumerate(files)})
    images = [{"id": i, "file_name": f"{i:03d}.jpg"} for i in range(16)]
    said = [{"image_id": i, "caption": caption} for i in range(16) for caption in captioned.sentences(i)]
    annotations = json.dumps({"images": images, "annotations": said}).encode()
    write(folder / "annotations", {f"captions_{part}2014.json": annotations for part in ("train", "val")})
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as tar:
        for i, data in enumerate(files):
            for name, content in ((f"{i}.jpg", data), (f"{i}.txt", captioned.sentences(i)[0].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    columns = {
        "image": [{"bytes": data, "path": None} for data in files],
        "caption": [captioned.sentences(i)[0] for i in range(16)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "pictures.parquet")
    (folder / "prompts.txt").write_text("a red square on the left\nthe square is blue\n")


def models_of_the_hub(folder: Path) -> None:
    """Tiny models with random weights, as folders that have the hub ids of the pages."""
    from diffusers import AutoencoderKL

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
    vae.save_pretrained(folder / "stabilityai" / "sd-vae-ft-mse")
    save_clip(folder / "openai" / "clip-vit-large-patch14")
    captioned.save_text_encoder(folder / "google" / "t5-v1_1-base", "t5")
    save_encoder(folder / "facebook" / "dinov2-base")


def published(folder: Path) -> None:
    """Checkpoints in the layouts of other code."""
    sizes = {"width": 32, "depth": 2, "heads": 2, "patch": 2, "channels": 4, "side": 4, "classes": 10}
    for name in ("SiT-XL-2-256.pt", "DiT-XL-2-256x256.pt"):
        published_files.save(folder / name, published_files.state(**sizes, learn_sigma=True))
    published_files.save(folder / "vavae-imagenet256-f16d32-dinov2.pt", published_vae.state(**published_vae.TINY))
    statistics = {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
    published_files.save(folder / "latents_stats.pt", statistics)
