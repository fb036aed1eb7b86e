"""Pictures to training data: sources ⇒ shards of moments ⇒ batches."""

from selftrans.data.encode import prepare, prepare_digits
from selftrans.data.encode_features import prepare_features
from selftrans.data.images import Picture, Source, iter_images, open_source
from selftrans.data.manifest import Manifest
from selftrans.data.shards import Shards

__all__ = [
    "Manifest",
    "Picture",
    "Shards",
    "Source",
    "iter_images",
    "open_source",
    "prepare",
    "prepare_digits",
    "prepare_features",
]
