"""The share of a guided target that a table by label explains, on pictures that the table was not fitted on.

    f_g = f_u + w d,    d = f_c - f_u                  share = 1 - squared error of the table / that of the mean

Every predictor here is linear in the features (means of a group, ridge regression): it predicts f_g by f_u's prediction plus w
times that of d. So each squared error is a quadratic in w, and three sums per picture, of f_u f_u, f_u d and d d, give the
share for every w.
Shape legend: n pictures of a batch, M held-out pictures, P columns of the design, F = T D numbers of a picture's features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: mean: one mean for all pictures; time: one for each timestep; condition: the table by label, or the regression on the text;
#: condition_time: one of these for each timestep. All of them are per token and channel.
PREDICTORS = ("mean", "time", "condition", "condition_time")
#: strengths of the ridge regression that are tried, relative to the number of rows
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
CHUNK = 1 << 14  #: columns at a time in double precision


class Design(NamedTuple):
    """What features are predicted from: for each picture a row, for each column whether it is shrunk."""

    rows: Tensor  #: (N, P) float32, of all pictures
    shrunk: Tensor  #: (P,) bool; none: plain least squares

    @classmethod
    def of_labels(cls, labels: Tensor) -> Design:
        """Indicators of the classes that occur in labels (N,): least squares is then the table of means by class."""
        _, which = torch.unique(labels, return_inverse=True)
        rows = torch.nn.functional.one_hot(which).float()
        return cls(rows, torch.zeros(rows.shape[1], dtype=torch.bool))

    @classmethod
    def of_vectors(cls, vectors: Tensor, fitted: Tensor) -> Design:
        """A constant, and vectors (N, E) standardised by the pictures `fitted` (N,) bool: for ridge regression."""
        mean, deviation = vectors[fitted].mean(dim=0), vectors[fitted].std(dim=0, correction=0)
        varies = deviation > 1e-6 * (1 + mean.abs())
        rows = torch.cat([torch.ones(len(vectors), 1), ((vectors - mean) / deviation)[:, varies]], dim=1).float()
        return cls(rows, torch.arange(rows.shape[1]) > 0)


class Fits:
    """Predictors of f_u and d, fitted on sums over batches of pictures.

    Call `add` for every picture of the fitted part at every timestep, then `solve`, then `errors` for the others.
    """

    def __init__(self, times: int, design: Design | None, numbers: int) -> None:
        """numbers: F."""
        self.design, columns = design, 0 if design is None else design.rows.shape[1]
        self.count = torch.zeros(times, dtype=torch.float64)
        self.gram = torch.zeros(times, columns, columns, dtype=torch.float64)
        self.square = torch.zeros(times, 2, dtype=torch.float64)  # of f_u and of d
        self.total = torch.zeros(times, 2, numbers, dtype=torch.float64)
        self.cross = torch.zeros(times, 2, columns, numbers)
        self.weights: dict[str, Tensor] = {}

    def add(self, rows: Tensor, time: int, features: Tensor) -> None:
        """Features (2, n, F) of f_u and d of the pictures `rows` (n,), at the timestep with this index."""
        self.count[time] += len(rows)
        self.total[time] += features.sum(dim=1)
        if self.design is not None:
            x = self.design.rows[rows]
            self.gram[time] += x.T.double() @ x.double()
            self.cross[time] += x.T @ features
            self.square[time] += features.square().sum(dim=2).sum(dim=1, dtype=torch.float64)

    def solve(self) -> None:
        """Fit every predictor; the sums are then no longer needed."""
        self.weights["mean"] = (self.total.sum(dim=0) / self.count.sum()).float()  # (2, F)
        self.weights["time"] = (self.total / self.count[:, None, None]).float()  # (times, 2, F)
        if self.design is not None:
            pooled = self.gram.sum(dim=0), self.cross.sum(dim=0), self.square.sum(dim=0), self.count.sum()
            self.weights["condition"] = self._regression(*pooled)  # (2, P, F)
            each = zip(self.gram, self.cross, self.square, self.count, strict=True)
            self.weights["condition_time"] = torch.stack([self._regression(*sums) for sums in each])
        self.cross = torch.zeros(0)

    def errors(self, rows: Tensor, time: int, features: Tensor) -> dict[str, Tensor]:
        """Squared errors of each predictor, summed over F: (n, 3), of f_u, of the product of both, and of d."""
        x = None if self.design is None else self.design.rows[rows]
        found = {}
        for name, weights in self.weights.items():
            weights = weights[time] if name.endswith("time") else weights
            if weights.dim() == 2:  # a mean, the same for every picture
                guess = weights[:, None]
            else:
                assert x is not None
                guess = x @ weights
            u, d = features - guess
            found[name] = torch.stack([(a * b).sum(dim=1).double() for a, b in ((u, u), (u, d), (d, d))], dim=1)
        return found

    def _regression(self, gram: Tensor, cross: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """Weights (2, P, F) of f_u and d on the design; how much they are shrunk is chosen for each by cross-validation."""
        assert self.design is not None
        shrunk = self.design.shrunk.double()
        if not shrunk.any():
            return (torch.linalg.inv(gram).float()) @ cross
        chosen = [
            _best_inverse(gram, part, float(total), float(count), shrunk)
            for part, total in zip(cross, square, strict=True)
        ]
        return torch.stack([inverse.float() @ part for inverse, part in zip(chosen, cross, strict=True)])


def _best_inverse(gram: Tensor, cross: Tensor, square: float, count: float, shrunk: Tensor) -> Tensor:
    """(gram + ridge)^-1 for the ridge of least generalised cross-validation error (Golub, Heath and Wahba, 1979).

    gram (P, P) and cross (P, F) are sums of x x' and x y' over `count` rows, `square` is the sum of y² over F.
    """
    products = sum(part.double() @ part.double().T for part in cross.split(CHUNK, dim=1))  # (P, P) of x y' y x'
    scores, inverses = [], []
    for ridge in RIDGES:
        inverse = torch.linalg.inv(gram + ridge * count * torch.diag(shrunk))
        error = square - 2 * (inverse @ products).trace() + (inverse @ gram @ inverse @ products).trace()
        freedom = max(count - float((inverse @ gram).trace()), 1e-9)
        scores.append(float(error) / freedom**2)
        inverses.append(inverse)
    return inverses[min(range(len(RIDGES)), key=scores.__getitem__)]


def at(errors: Tensor, scale: float | None) -> Tensor:
    """Squared errors (M,) of f_u + w d, from those of f_u, of the product and of d (M, 3). scale None: of d alone."""
    if scale is None:
        return errors[:, 2]
    return errors @ torch.tensor([1.0, 2 * scale, scale**2], dtype=errors.dtype)


def share(errors: Tensor, base: Tensor, scale: float | None) -> tuple[float, float] | None:
    """1 - sum of errors / sum of base, (M, 3) each, at strength w; and its standard error over the M held-out pictures.

    None when the base has no error: the target does not vary. The standard error is that of a ratio of two sums (linearised);
    it holds for these pictures' draw, with the fitted predictors given.
    """
    part, whole = at(errors, scale), at(base, scale)
    total = whole.sum()
    if total <= 1e-12 * len(whole):
        return None
    ratio, m = part.sum() / total, len(whole)
    spread = (part - ratio * whole).square().sum().sqrt() / total * (m / max(1, m - 1)) ** 0.5
    return float(1 - ratio), float(spread)
