"""What a backbone has learnt: features, probes and maps, and the figures that show them."""

from selftrans.analyse.features import Basis, collect, linear_probe, pca_basis, pca_maps, tsne
from selftrans.analyse.plots import (
    bars,
    curves,
    figure_to_data_uri,
    image_grid,
    pca_grid,
    save,
    save_png,
    scatter,
)

__all__ = [
    "Basis",
    "bars",
    "collect",
    "curves",
    "figure_to_data_uri",
    "image_grid",
    "linear_probe",
    "pca_basis",
    "pca_grid",
    "pca_maps",
    "save",
    "save_png",
    "scatter",
    "tsne",
]
