"""Features of a backbone at a noise level: linear probes, PCA colour maps, t-SNE.

Shape legend: N images, T tokens on a grid of one to three dimensions, D width, F features, (C, *S) latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selftrans.flow import LINEAR, Path, interpolate
from selftrans.messages import are, plural
from selftrans.types import Backbone, Cond, eval_mode, map_cond

MOST_BLOCKS = 12  #: of deeper models, some of the blocks are shown


def spread_blocks(depth: int, count: int, more: Iterable[int | None] = ()) -> tuple[int, ...]:
    """All blocks (1-based); of more than MOST_BLOCKS, `count` at equal distances, and those of `more` up to the depth."""
    if depth <= MOST_BLOCKS:
        return tuple(range(1, depth + 1))
    spread = np.linspace(1, depth, count).round().astype(int).tolist()
    return tuple(sorted({*spread, *(k for k in more if k is not None and k <= depth)}))


@torch.no_grad()
def collect(
    backbone: Backbone,
    z0: Tensor,
    cond: Cond,
    *,
    t: float,
    taps: Sequence[int],
    path: Path = LINEAR,
    seed: int = 0,
    batch_size: int = 256,
    pooled: bool = False,
) -> dict[int, Tensor]:
    """Features (N, T, D), float32 on the CPU, after each block of `taps`, for latents z0 (N, C, *S) at noise level t.

    `pooled`: their means over tokens (N, D), taken on the device of the backbone: T times less to copy and to keep.

    The noise depends only on `seed` and the shape of z0, so it is the same for every model, block and batch size. Keeps
    torch's global RNG state. The backbone runs in eval mode, then returns to its previous mode. ValueError for t out of range.
    """
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"noise level t = {t} is outside [0, 1]; 0 is data and 1 is noise")
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed))
    device = next(backbone.parameters()).device if isinstance(backbone, nn.Module) else z0.device
    feats: dict[int, list[Tensor]] = {k: [] for k in taps}
    with eval_mode(backbone):
        for rows in torch.arange(len(z0)).split(batch_size):
            data = z0[rows.to(z0.device)].to(device, torch.float32)
            times = torch.full((len(rows),), t, device=device)
            zt, _ = interpolate(path, data, noise[rows].to(device), times)
            part = map_cond(lambda x, rows=rows: x[rows.to(x.device)].to(device), cond)
            out = backbone(zt, times, part, taps=tuple(taps), stop=True)
            for k in taps:
                found = out.feats[k].float()
                feats[k].append((pool(found) if pooled else found).cpu())
    return {k: torch.cat(parts) for k, parts in feats.items()}


def pool(features: Tensor) -> Tensor:
    """Mean over tokens, (N, T, D) -> (N, D); features (N, F) are returned unchanged."""
    return features.mean(dim=1) if features.dim() == 3 else features


def linear_probe(features: Tensor, labels: Tensor) -> float:
    """Accuracy, in [0, 1], of ridge regression on features (N, F), or (N, T, D), which are averaged over tokens.

    It is fitted on three quarters of them and tested on the others, always the same rows. ValueError as `class_guesses`.
    """
    x = pool(features)
    y = labels.long().to(x.device)
    fit, held = _split(len(x))
    return (class_guesses(x[fit], y[fit], x[held], kind="ridge") == y[held]).double().mean().item()


def held_out(count: int) -> int:
    """How many of `count` rows `linear_probe` is tested on."""
    return min(max(1, round(0.25 * count)), count - 1)


def _split(count: int) -> tuple[Tensor, Tensor]:
    """Rows that a probe is fitted on, and those that are held out, at least one of each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[held_out(count) :], order[: held_out(count)]


def can_be_probed(labels: Tensor) -> bool:
    """Whether the rows that `linear_probe` is fitted on hold at least two classes."""
    return len(labels) > 1 and len(torch.unique(labels[_split(len(labels))[0]])) > 1


def class_guesses(features: Tensor, labels: Tensor, others: Tensor, *, kind: str) -> Tensor:
    """Classes (M,) of `others` (M, F) or (M, T, D) by a linear classifier fitted on features (N, F) or (N, T, D).

    Both are standardised by the mean and deviation of `features`. kind: "ridge" (one-hot targets, closed form) or "logistic"
    (multinomial, scikit-learn, slower). Raises ValueError for labels of one class.
    """
    x = pool(features).double()
    y = labels.long().to(x.device)
    if len(torch.unique(y)) < 2:
        raise ValueError("a probe needs at least two classes among the images that it is fitted on")
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    deviation = torch.where(deviation > 1e-12, deviation, 1.0)  # a constant feature stays zero
    return PROBES[kind]((x - mean) / deviation, y, (pool(others).to(x) - mean) / deviation)


def ridge_guesses(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Classes (M,) of x_test (M, F) by ridge regression of one-hot labels y (N,) on standardised x (N, F)."""
    targets = F.one_hot(y).double()
    prior = targets.mean(dim=0)
    gram = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.T @ (targets - prior))  # (F, K)
    return (x_test @ weights + prior).argmax(dim=-1)


def logistic_guesses(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Classes (M,) of x_test (M, F) by multinomial logistic regression on x (N, F)."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=1000, tol=1e-3).fit(x.cpu().numpy(), y.cpu().numpy())
    return torch.from_numpy(model.predict(x_test.cpu().numpy())).to(x.device)


PROBES = {"logistic": logistic_guesses, "ridge": ridge_guesses}


class Basis(NamedTuple):
    """Three directions in feature space, and the range of each that is mapped to the colour range."""

    mean: Tensor  #: (D,)
    components: Tensor  #: (3, D), orthonormal
    low: Tensor  #: (3,)
    high: Tensor  #: (3,)


def pca_basis(feats: Tensor) -> Basis:
    """First three principal components of all tokens of feats (N, T, D), with the 1st and 99th percentile along each.

    The sign of a component is arbitrary: its largest entry is made positive. D is at least 3.
    """
    tokens = feats.reshape(-1, feats.shape[-1]).double()  # (N T, D)
    mean = tokens.mean(dim=0)
    _, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))  # ascending eigenvalues
    components = vectors.T[-3:].flip(dims=(0,))
    largest = components.gather(dim=1, index=components.abs().argmax(dim=1, keepdim=True))
    components = components * torch.sign(largest)
    along = np.percentile(((tokens - mean) @ components.T).numpy(), [1, 99], axis=0)  # torch.quantile has a size limit
    return Basis(mean, components, torch.from_numpy(along[0]), torch.from_numpy(along[1]))


def pca_maps(feats: Tensor, grid: tuple[int, ...], *, basis: Basis | None = None) -> np.ndarray:
    """Colour maps (N, *grid, 3), float32 in [0, 1], of the tokens of feats (N, T, D) in a basis.

    `grid` is the backbone's: tokens along each spatial dimension. `basis` None: that of these features; to compare maps,
    give all of them the same basis.
    """
    basis = basis if basis is not None else pca_basis(feats)
    along = (feats.double() - basis.mean) @ basis.components.T  # (N, T, 3)
    span = basis.high - basis.low
    flat = span <= 1e-12 * (1 + basis.mean.norm())  # constant features: grey instead of amplified rounding
    maps = torch.where(flat, 0.5, (along - basis.low) / torch.where(flat, 1.0, span)).clamp(0, 1)
    return maps.view(len(feats), *grid, 3).float().numpy()


def tsne(features: Tensor) -> np.ndarray:
    """t-SNE (N, 2), from scikit-learn, of standardised features (N, F), or (N, T, D), which are averaged over tokens.

    The perplexity is 30, or (N - 1) / 3 if that is less. Raises ValueError for fewer than four images.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    x = pool(features).double()
    if len(x) < 4:
        raise ValueError(f"{plural(len(x), 'image')} {are(len(x))} too few for t-SNE; give at least four")
    deviation = x.std(dim=0, correction=0)
    x = (x - x.mean(dim=0)) / torch.where(deviation > 1e-12, deviation, 1.0)
    model = TSNE(n_components=2, perplexity=min(30.0, (len(x) - 1) / 3), init="pca", random_state=0)
    # its threads wait in a busy loop: more than one is twenty times slower while another process is busy
    with threadpool_limits(limits=1):
        return model.fit_transform(x.numpy())
