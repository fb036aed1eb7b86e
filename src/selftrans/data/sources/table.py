"""Pictures in table columns, read by `datasets`: parquet files and the hub. Code from a data set is never run."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selftrans.data.sources.captions import CAPTIONS, CaptionSource, with_captions
from selftrans.data.sources.decode import open_picture
from selftrans.data.sources.labelling import Numbered, as_label, numbered
from selftrans.data.sources.source import MAX_CLASSES, Source
from selftrans.data.sources.table_rows import StoredRows, StreamedRows, TableRows
from selftrans.messages import first_line, printable

if TYPE_CHECKING:
    from PIL import Image

IMAGE_NAMES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "class", "cls")
#: named in a warning, not read without --label-column
PERHAPS_LABELS = (*LABEL_NAMES, "label_id", "class_id", "category", "target")


def parquet(
    files: list[Path], label_column: str | None, captions: CaptionSource | None = None, *, streaming: bool = False
) -> Source:
    """Rows of local parquet files, in their order; `streaming`: without a copy of them. Raises ValueError as `_source` does."""
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    rows = _load(where, "parquet", streaming, data_files=[str(file) for file in files], split="train")
    return _source(rows, where, label_column, captions, trusted=())


def hub(
    name: str, split: str, label_column: str | None, captions: CaptionSource | None = None, *, streaming: bool = False
) -> Source:
    """Rows of one split of a hub data set, which is downloaded or (`streaming`) read from there.

    Raises ValueError when it cannot be loaded, and as `_source` does.
    """
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (Path(HF_HUB_CACHE).resolve(), Path(datasets.config.HF_DATASETS_CACHE).resolve())
    return _source(_load(name, name, streaming, split=split), name, label_column, captions, trusted=caches)


def _load(where: str, path: str, streaming: bool, **options: Any) -> TableRows:
    import datasets

    try:
        if streaming:
            return StreamedRows(lambda **more: datasets.load_dataset(path, streaming=True, **options, **more), where)
        return StoredRows(datasets.load_dataset(path, **options))
    except Exception as error:  # every type means: no such data set, no connection, or damage
        reason = _reason(error)
        if path == "parquet":
            raise ValueError(f"{where} cannot be read as parquet ({reason}); make or download it again") from error
        raise ValueError(f"{where} is neither an existing path nor a data set that can be read ({reason})") from error


def _reason(error: BaseException) -> str:
    """Why a table cannot be loaded: `datasets` wraps the error that says it."""
    cause = error.__cause__ if error.__cause__ and str(error).startswith("An error occurred") else error
    if "CastError" in type(cause).__name__:
        return "its files do not all have the same columns"
    return "it has no rows" if "BatchSize must be greater than 0" in str(cause) else first_line(cause)


def _source(
    rows: TableRows, where: str, label_column: str | None, wanted: CaptionSource | None, trusted: tuple[Path, ...]
) -> Source:
    """A table as a source; picture files outside the table are read from `trusted` folders only.

    The image column is the one of type Image, or one of encoded bytes with a usual name; the label column is one of type
    ClassLabel, or one of integers with a usual name; without one the source is unconditional. With `wanted`, captions are
    read in place of labels. Rows without a label, or with a negative one, become faults of the source. Raises ValueError when
    a column is ambiguous.
    """
    image_column = _image_column(rows.features, where)
    captions = _captions(rows, where, wanted.column) if wanted else None
    label_column = None if wanted else _label_column(rows.features, where, label_column)
    if not wanted and label_column is None:
        _warn_of_unread(rows.features, where)
    found = _labels(rows, label_column, where)
    pictures = rows.pictures(image_column)

    def open_row(i: int) -> Image.Image:
        cell = pictures(i)
        if cell is None:
            raise ValueError("the cell is empty")
        if cell["bytes"] is not None:
            return open_picture(io.BytesIO(cell["bytes"]))
        # a path in an untrusted table could name any file of this machine
        path = Path(cell["path"] or "").resolve()
        if not any(path.is_relative_to(folder) for folder in trusted):
            raise ValueError("the table holds a file name instead of the picture")
        return open_picture(path)

    names = [f"row {i:08d}" for i in range(len(rows))]
    faults = found.faults(f"column {printable(label_column)!r}")
    source = Source(
        names,
        open_row,
        labels=found.labels,
        classes=found.classes,
        faults=faults,
        in_order=rows.in_order,
        is_table=True,
    )
    return source if captions is None else with_captions(source, captions)


def _captions(rows: TableRows, where: str, column: str | None) -> list[list[str]]:
    """The captions of each row; of an empty cell none. Raises ValueError unless the column holds texts or lists of texts."""
    named = [name for name in rows.features if name.lower() in CAPTIONS]
    if column is None and len(named) != 1:
        found = f"{len(named)} columns with captions among {', '.join(rows.features)}"
        raise ValueError(f"{where} has {found}; choose one by --caption-column")
    column = column or named[0]
    if column not in rows.features:
        raise ValueError(f"{where} has no column {column!r}; it has {', '.join(rows.features)}")
    cells = rows.column(column).to_pylist()
    lists = [[cell] if isinstance(cell, str) else cell or [] for cell in cells]
    if not all(isinstance(cell, list) and all(isinstance(each, str) for each in cell) for cell in lists):
        raise ValueError(
            f"column {column!r} of {where} does not hold texts or lists of texts; choose another by --caption-column"
        )
    return lists


def _image_column(features: Any, where: str) -> str:
    """The column of type Image, of a usual name, or the only one that holds bytes. ValueError where that is not clear."""
    import datasets

    usual = [name for name in features if name.lower() in IMAGE_NAMES]
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    columns = typed or usual or [name for name, kind in features.items() if _holds_bytes(kind)]
    if len(columns) > 1 and len({*columns} & {*usual}) == 1:
        columns = [name for name in columns if name in usual]
    if len(columns) != 1:
        found = f"several columns of pictures: {', '.join(columns)}" if columns else "no column of pictures"
        raise ValueError(
            f"{where} has {found}, among {', '.join(map(printable, features))}; rename the one to read to `image`, and store "
            "the bytes of a picture file in each row"
        )
    if columns[0] not in typed:
        _check_pictures(columns[0], features[columns[0]], where)
    return columns[0]


def _holds_bytes(kind: Any) -> bool:
    """Whether each row of a column holds bytes, or a struct with them."""
    return "bytes" in kind if isinstance(kind, dict) else "binary" in str(getattr(kind, "dtype", ""))


def _check_pictures(column: str, kind: Any, where: str) -> None:
    """Raise ValueError for a column whose rows are no pictures: text, numbers, lists of numbers or of several pictures."""
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
    if inner is not None and (isinstance(inner, list) or hasattr(inner, "feature")):
        return  # rows of pixels
    dtype = str(getattr(kind, "dtype", ""))
    if inner is None and (_holds_bytes(kind) or not dtype or hasattr(kind, "shape")):
        return
    held = "lists" if inner is not None else "text" if "string" in dtype else f"values of type {dtype}"
    remedy = (
        "; for files with these names give their folder, and the table's labels by --labels" if held == "text" else ""
    )
    raise ValueError(
        f"column {printable(column)!r} of {where} holds {held} in place of pictures; store the bytes of one picture file in "
        f"each row{remedy}"
    )


def _label_column(features: Any, where: str, wanted: str | None) -> str | None:
    import datasets

    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"{where} has no column {wanted!r}; it has {', '.join(features)}")
        return wanted
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    integers = [name for name in LABEL_NAMES if "int" in str(getattr(features.get(name), "dtype", ""))]
    columns = [name for name in typed if name in LABEL_NAMES] or typed or integers
    if len(columns) > 1:
        raise ValueError(f"{where} has several label columns: {', '.join(columns)}; choose one by --label-column")
    return columns[0] if columns else None


def _warn_of_unread(features: Any, where: str) -> None:
    """Say that columns which look like labels or captions are not read: data without conditions would be a surprise."""
    if held := [name for name in features if name.lower() in CAPTIONS]:
        warnings.warn(
            f"column {printable(held[0])!r} of {where} is not read, so the pictures have neither classes nor captions; give "
            "--text MODEL, if it holds their captions",
            stacklevel=5,
        )
    for name, kind in features.items():
        if name.lower() in PERHAPS_LABELS:
            dtype = str(getattr(kind, "dtype", "values of another kind"))
            words = any(kind in dtype for kind in ("int", "float", "string", "bool"))
            remedy = f"give --label-column {name}" if words else "store each class as a word or an integer from 0"
            warnings.warn(
                f"column {printable(name)!r} of {where} ({dtype}) is not read as labels, so the pictures have no classes; "
                f"{printable(remedy)}, if they should",
                stacklevel=5,
            )


def _labels(rows: TableRows, column: str | None, where: str) -> Numbered:
    """Labels and class names, which are numbers if the table has no names, and the rows without a label.

    The column holds integers, words, truth values, which are the words False and True, or whole numbers as floats, as pandas
    stores integers of which one is missing.
    """
    if column is None:
        return Numbered(np.zeros(len(rows), dtype=np.int64), (), {})
    values = rows.column(column).to_pylist()
    # only NaN differs from itself
    whole = (None if value is None or value != value else as_label(value) for value in values)
    labels = list(whole)
    if not all(label is None or isinstance(label, int | str) for label in labels):
        raise ValueError(
            f"column {column!r} of {where} holds neither integers nor words; choose another by --label-column"
        )
    names = getattr(rows.features[column], "names", None)
    if names is None:
        return numbered(labels, f"column {column!r} of {where}")
    missing = {i: None for i, label in enumerate(labels) if label is None or label < 0}
    found = np.array([0 if label is None else max(0, label) for label in labels], dtype=np.int64)
    if len(names) > MAX_CLASSES or (len(found) and found.max() >= len(names)):
        raise ValueError(f"column {column!r} of {where} has label {found.max()}, beyond its classes")
    return Numbered(found, tuple(names), missing)
