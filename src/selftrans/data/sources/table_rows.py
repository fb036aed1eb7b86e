"""The rows of a table of `datasets`: stored on this machine, or streamed one after another, without a copy on the disk."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from selftrans.data.sources.source import InOrder
from selftrans.messages import first_line
from selftrans.progress import progress_bar

CHUNK = 4096  #: rows of a column that are read at a time


class StoredRows:
    """Rows on this machine; `features`: name -> type of each column."""

    in_order = False  #: whether rows should be read in their order, by one thread

    def __init__(self, rows: Any) -> None:
        self._rows, self.features = rows, rows.features

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> Any:
        """All values of a column, as a pyarrow column."""
        return self._rows.select_columns([name]).with_format("arrow")[:][name]

    def pictures(self, name: str) -> Callable[[int], dict[str, Any] | None]:
        """A function that returns the cell of row i, not decoded: its `bytes` or its `path`; None where it is empty."""
        import datasets

        rows = self._rows.select_columns([name])
        if rows.features[name] == datasets.Value("large_binary"):  # which datasets 4 does not take as pictures
            rows = rows.cast_column(name, datasets.Value("binary"))
        rows = rows.cast_column(name, datasets.Image(decode=False))
        return lambda i: rows[i][name]


class StreamedRows:
    """As StoredRows, of rows that are read in their order, from the hub or from local files; only the last one is kept.

    `load` returns the `datasets.IterableDataset`; where the format allows it (parquet), `columns` limits what is read.
    ValueError for a table whose columns are not known before it is read.
    """

    in_order = True

    def __init__(self, load: Callable[..., Any], where: str) -> None:
        self._load, self._where, self._count = load, where, -1
        rows = load()
        self.features = rows.features
        if self.features is None:
            raise ValueError(f"the columns of {where} are not known before it is read; leave out --streaming")
        splits = rows.info.splits or {}
        if str(rows.split) in splits:
            self._count = int(splits[str(rows.split)].num_examples or -1)

    def __len__(self) -> int:
        if self._count < 0:
            import datasets

            light = [name for name, kind in self.features.items() if not isinstance(kind, datasets.Image)]
            if not light:
                raise ValueError(f"{self._where} does not say how many rows it has; leave out --streaming")
            self.column(light[0])
        return self._count

    def column(self, name: str) -> Any:
        import pyarrow

        chunks = []
        with progress_bar(desc=f"column {name}", unit=" rows", disable=None, leave=False) as bar:
            for table in _read_stream(self._only(name).with_format("arrow").iter(CHUNK), self._where):
                chunks += table[name].chunks
                bar.update(len(table))
        found = pyarrow.chunked_array(chunks) if chunks else pyarrow.chunked_array([], pyarrow.null())
        self._count = len(found)
        return found

    def _only(self, name: str) -> Any:
        try:
            return self._load(columns=[name])
        except ValueError:  # not a format that reads single columns
            return self._load().select_columns([name])

    def pictures(self, name: str) -> Callable[[int], dict[str, Any] | None]:
        import datasets

        rows = self._load().select_columns([name]).cast_column(name, datasets.Image(decode=False))
        read = InOrder(lambda i: (row[name] for row in _read_stream(rows.skip(i) if i else rows, self._where)))
        return read


TableRows: TypeAlias = StoredRows | StreamedRows


def _read_stream(rows: Any, where: str) -> Iterator[Any]:
    """The rows of a stream. Any error is raised as one of the connection (OSError): the next row is not to blame."""
    items = iter(rows)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:  # of the hub, of a connection, of pyarrow
            raise OSError(errno.ETIMEDOUT, f"the stream of {where} stops: {first_line(error)}") from error
        yield item
