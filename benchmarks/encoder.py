"""An external encoder for REPA where none is available: a small network trained on the same pictures, with or without labels.

    python benchmarks/encoder.py --task contrastive --out results/encoder
    python benchmarks/encoder.py --task contrastive --data data/cifar10 --network resnet --epochs 4 --out results/cifar-encoder
    selftrans compare digits --out results/digits --methods vanilla repa --repa.encoder results/encoder

Tasks:
    contrastive   features of two augmented views of a picture agree, those of different pictures differ
                  (SimCLR, Chen et al., 2002.05709)
    rotation      which of four rotations a picture has (RotNet, Gidaris et al., 1803.07728)
    labels        the classes; such an encoder knows what the student is asked for, so it is an upper bound, not a competitor

REPA's own encoder (DINOv2) is far larger, and is trained without labels on other pictures. The network is a ViT of
`transformers`, or for pictures of 32 pixels and more a ResNet of one stage; each task reads the mean of its patches, which are
what REPA aligns with. It is trained on pixels: for latents, give it to `selftrans prepare --features`.

Writes a folder that `AutoModel.from_pretrained` reads, and encoder.json: the accuracy of a linear (ridge) probe on held-out
pictures, which no task has seen, and of the same probe on the untrained network.
Shape legend: N pictures, H W C their sides and channels, D width of a patch's features.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.device import default_device
from selftrans.evaluate.classifier import digits, to_input
from selftrans.evaluate.probes import class_guesses
from selftrans.storage import write_json

TEMPERATURE = 0.2  #: of the contrastive loss
MOST_HELD = 5000  #: pictures held out; a quarter of small data


def pictures_of(data: str | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """All pictures uint8 (N, H, W, C), on the CPU, and labels (N,), or None; of the digits without `data`."""
    labels: np.ndarray | None
    if data is None:
        images, labels = digits()
    else:
        dataset = Dataset.open(data)
        if not isinstance(dataset.manifest.resolution, int):
            raise ValueError(f"{data} does not hold square pictures; prepare some with --resolution SIDE")
        images = np.concatenate(list(decoded_images(dataset, device=device)), axis=0)
        labels = dataset.labels if dataset.manifest.num_classes > 1 else None
    return torch.from_numpy(images), None if labels is None else torch.as_tensor(labels).long()


def build(network: str, size: int, channels: int, patch: int) -> nn.Module:
    """A ViT with (size / patch)² patches, or a ResNet whose features lie on a grid of size / 4."""
    if network == "resnet":
        if size % 4 or size < 32:
            raise ValueError(f"a ResNet divides pictures by 4 and needs 32 pixels, not {size}; choose --network vit")
        sizes = {"embedding_size": 64, "hidden_sizes": [128], "depths": [3], "layer_type": "basic"}
        return ResNetModel(ResNetConfig(num_channels=channels, image_size=size, **sizes))
    if size % patch:
        raise ValueError(f"pictures of {size} pixels cannot be divided into patches of {patch}; choose another --patch")
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        num_channels=channels,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
    )
    return ViTModel(config, add_pooling_layer=False)


def pooled(model: nn.Module, x: Tensor) -> Tensor:
    """Mean (N, D) of the patches' features; a ViT has a class token before them."""
    hidden = model(pixel_values=x).last_hidden_state
    return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden[:, 1:].mean(dim=1)


# ---- tasks: pictures (N, C, H, W) in [-1, 1], labels (N,) => loss


def labels_loss(model: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(head(pooled(model, x)), y)


def rotation_loss(model: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each picture is rotated by a random multiple of 90 degrees, which is to be named."""
    turns = torch.randint(4, (len(x),), device=x.device)
    turned = torch.stack([x.rot90(k, dims=(2, 3)) for k in range(4)])[turns, torch.arange(len(x), device=x.device)]
    return F.cross_entropy(head(pooled(model, distorted(turned, turn=0.0, flip=False))), turns)


def contrastive_loss(model: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """NT-Xent: among the 2 N - 1 other views, that of the same picture is to be found by cosine similarity."""
    z = F.normalize(head(pooled(model, torch.cat([distorted(x), distorted(x)]))), dim=-1)  # (2 N, D)
    near = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
    return F.cross_entropy(near, torch.arange(2 * len(x), device=x.device).roll(len(x)))


def distorted(x: Tensor, *, turn: float = 15.0, flip: bool = True) -> Tensor:
    """Random crops with jitter of brightness and contrast, and noise; colour pictures are also mirrored, with colour jitter.

    Grey pictures (digits, characters) are never mirrored, which would change what they show. They are rotated instead, by at
    most `turn` degrees, and cropped less.
    """
    n, grey = len(x), x.shape[1] == 1
    low, high = (0.7, 1.1) if grey else (0.45, 1.0)
    side = uniform(n, low, high, x)  # of the crop, relative to the picture's
    angle = uniform(n, -turn, turn, x) * (math.pi / 180 if grey else 0.0)
    mirror = torch.where(uniform(n, 0, 1, x) < 0.5, -1.0, 1.0) if flip and not grey else torch.ones(n, device=x.device)
    room = (1 - side).clamp(min=0.0) + (0.1 if grey else 0.0)
    across, down = (uniform(n, -1, 1, x) * room for _ in range(2))
    cos, sin = side * angle.cos(), side * angle.sin()
    rows = [torch.stack([mirror * cos, -sin, across], dim=-1), torch.stack([mirror * sin, cos, down], dim=-1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    view = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    if not grey:
        mean = view.mean(dim=1, keepdim=True)
        saturation = torch.where(uniform(n, 0, 1, x) < 0.2, 0.0, uniform(n, 0.4, 1.6, x)).view(-1, 1, 1, 1)
        view = mean + saturation * (view - mean) + 0.2 * torch.randn(n, x.shape[1], 1, 1, device=x.device)
    level = view.mean(dim=(1, 2, 3), keepdim=True)
    contrast, brightness = uniform(n, 0.6, 1.4, x).view(-1, 1, 1, 1), uniform(n, -0.2, 0.2, x).view(-1, 1, 1, 1)
    return level + contrast * (view - level) + brightness + 0.05 * torch.randn_like(view)


def uniform(n: int, low: float, high: float, like: Tensor) -> Tensor:
    return low + (high - low) * torch.rand(n, device=like.device)


def head_of(task: str, width: int, classes: int) -> nn.Module:
    if task == "contrastive":
        return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 64))
    return nn.Linear(width, 4 if task == "rotation" else classes)


TASKS: dict[str, Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]] = {
    "labels": labels_loss,
    "rotation": rotation_loss,
    "contrastive": contrastive_loss,
}


def train(model: nn.Module, task: str, x: Tensor, y: Tensor | None, *, epochs: int, batch: int, lr: float) -> None:
    """AdamW with a one-cycle schedule on pictures x, uint8 (N, H, W, C), on the model's device."""
    device = next(model.parameters()).device
    with torch.no_grad():
        width = pooled(model, to_input(x[:2], device)).shape[1]
    targets = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    head, batch = head_of(task, width, int(targets.max()) + 1).to(device), min(batch, len(x))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=max(2, steps))
    model.train()
    with tqdm(total=steps, desc=f"encoder ({task})", unit="step") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(batch):
                if len(rows) < batch:
                    break
                loss = TASKS[task](model, head, to_input(x[rows], device), targets[rows].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


@torch.no_grad()
def probe(model: nn.Module, x: Tensor, y: Tensor | None, train_rows: Tensor, held: Tensor) -> float | None:
    """Accuracy on the rows `held` of a ridge classifier of the mean of the patches, fitted on `train_rows`."""
    if y is None:
        return None
    device = next(model.parameters()).device
    model.eval()
    features = torch.cat([pooled(model, to_input(part, device)).cpu() for part in x.split(256)])
    guesses = class_guesses(features[train_rows], y[train_rows], features[held], kind="ridge")
    return float((guesses == y[held]).double().mean())


def save(model: Any, out: Path, size: int, channels: int) -> None:
    """A folder of `transformers`, with the settings of its processor: pixels in [-1, 1], as it was trained."""
    model.save_pretrained(out, safe_serialization=True)
    half = [0.5] * channels
    ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=half, image_std=half, do_resize=False
    ).save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", choices=list(TASKS), default="labels")
    parser.add_argument("--data", help="prepared pictures; the digits of scikit-learn by default")
    parser.add_argument("--network", choices=("vit", "resnet"), default="vit")
    parser.add_argument(
        "--patch", type=int, help="side of a ViT's patch; an eighth of the picture by default, at least 2"
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, help="64 by default, and 256 for the contrastive task")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = default_device()
    torch.manual_seed(options.seed)
    try:
        x, y = pictures_of(options.data, device)
    except ValueError as error:
        parser.error(str(error))
    if options.task == "labels" and y is None:
        parser.error(f"{options.data} has no classes; choose --task contrastive or rotation")
    order = torch.randperm(len(x))
    held, rows = order.split([few := min(MOST_HELD, len(x) // 4), len(x) - few])
    channels, size = x.shape[3], x.shape[1]
    try:
        model = build(options.network, size, channels, options.patch or max(2, size // 8)).to(device)
    except ValueError as error:
        parser.error(str(error))
    untrained = probe(model, x, y, rows, held)
    batch = options.batch or (256 if options.task == "contrastive" else 64)
    train(
        model, options.task, x[rows], None if y is None else y[rows], epochs=options.epochs, batch=batch, lr=options.lr
    )
    accuracy = probe(model, x, y, rows, held)
    save(model, options.out, size, channels)
    about = {"task": options.task, "network": options.network, "linear_probe": accuracy, "untrained_probe": untrained}
    about |= {"held_out": len(held), "trained_on": len(rows), "data": options.data or "digits"}
    write_json(
        options.out / "encoder.json",
        about | {"epochs": options.epochs, "batch": batch, "lr": options.lr, "seed": options.seed},
    )
    probed = "no classes to probe" if accuracy is None else f"linear probe {accuracy:.3f} ({untrained:.3f} untrained)"
    print(f"{options.out}: {probed} on {len(held)} held-out pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
