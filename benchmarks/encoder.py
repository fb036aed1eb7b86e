"""A replacement for REPA's external encoder where none is available: a small vision transformer trained on the labels.

    python benchmarks/encoder.py --out results/encoder
    selftrans compare digits --out results/digits --methods vanilla repa --repa.encoder results/encoder

DINOv2 is far larger and is trained without labels. This encoder is trained on the labels, so REPA's row in the table is that
of an encoder made for these pictures. It is a ViT of `transformers` on the digits (a 4 x 4 grid of patches, like the students'
tokens), trained on three quarters of them. Writes a folder that `AutoModel.from_pretrained` reads, and encoder.json with its
accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from selftrans.evaluate.classifier import digits
from selftrans.storage import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, labels = digits()
    x = (
        torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    )  # (N, 1, 8, 8), normalised as by the processor below
    y = torch.as_tensor(labels)
    order = torch.randperm(len(x))
    held, train = order[: len(x) // 4], order[len(x) // 4 :]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = options.epochs * (len(train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for step in trange(steps, desc="encoder", unit="step"):
        if step % (len(train) // 64) == 0:
            train = train[torch.randperm(len(train))]
        rows = train[(step * 64) % (len(train) // 64 * 64) :][:64]
        loss = F.cross_entropy(model(pixel_values=x[rows]).logits, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        accuracy = (model(pixel_values=x[held]).logits.argmax(dim=1) == y[held]).float().mean().item()
    model.save_pretrained(options.out, safe_serialization=True)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_resize=False)
    processor.save_pretrained(options.out)
    about = {"accuracy": accuracy, "held_out": len(held), "epochs": options.epochs, "seed": options.seed}
    write_json(options.out / "encoder.json", about)
    print(f"{options.out}: accuracy {accuracy:.3f} on {len(held)} held-out digits")


if __name__ == "__main__":
    main()
