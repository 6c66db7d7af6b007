"""Preference data as a parquet file that `PairReader` reads back.

Other columns are kept, standard columns get their standard names, and images are written as bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffalign.data.pairs import PairReader
from diffalign.data.sources import IMAGES, LAYOUTS, ParquetRows
from diffalign.errors import InputError

_TO_PICKAPIC = {
    "prompt": "caption",
    "chosen": "jpg_0",
    "rejected": "jpg_1",
    "score_chosen": "score_0",
    "score_rejected": "score_1",
}


class Output:
    """Rows of a source on their way into a new file."""

    def __init__(self, reader: PairReader, *, pickapic: bool = False) -> None:
        """Names the columns; `pickapic` brings pairs of other layouts into Pick-a-Pic's, chosen images first.

        Raises:
            InputError: Two columns would have one name.
        """
        self.reader = reader
        own = {name: standard for standard, name in reader.source.columns.items()}
        columns = reader.columns or LAYOUTS["trl"]
        further = _TO_PICKAPIC if pickapic and reader.layout != "pickapic" else {}
        self.naming = {column: further.get(own.get(column, column), own.get(column, column)) for column in columns}
        """The name in the result of each column of the source."""
        twice = [name for name, count in Counter(self.naming.values()).items() if count > 1]
        if twice:
            raise InputError(f"data.path must have one column for {twice[0]!r}, got {', '.join(columns)}")
        self.images = [self.naming[reader.source.columns.get(name, name)] for name in IMAGES[reader.layout]]
        """Names in the result of the columns of images."""

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record under the names of the result, with its images as bytes."""
        row = {name: record.get(column) for column, name in self.naming.items()}
        cells = self.reader.images(record)
        return row | {n: image_bytes(self.reader, c) for n, c in zip(self.images, cells, strict=True)}

    def schema(self, numbers: Sequence[str] = ()) -> Any:
        """Types of the result's columns: those of the source, bytes for images, and `numbers` as float64."""
        import pyarrow as pa

        table = self.reader.table
        try:
            if isinstance(table, ParquetRows):
                types = {f.name: f.type for f in table.files[0].schema_arrow}
            elif isinstance(table, list):
                types = {f.name: f.type for f in pa.Table.from_pylist(table).schema}
            else:
                types = {f.name: f.type for f in table.features.arrow_schema}
        except pa.ArrowException as error:
            raise InputError(f"data.path must have one type of value a column: {error}") from error
        fields = {name: types[column] for column, name in self.naming.items()}
        fields |= dict.fromkeys(self.images, pa.binary())
        return pa.schema(fields | dict.fromkeys(numbers, pa.float64()))


def image_bytes(reader: PairReader, cell: Any) -> bytes | None:
    """Bytes of an image cell; None where there is no image, which readers count as broken."""
    try:
        return reader.image(cell)
    except (OSError, TypeError):
        return None


def check_out(out: str | Path) -> Path:
    """The file to write, which must not be there yet."""
    file = Path(out)
    if file.suffix != ".parquet":
        raise InputError(f"out must be a .parquet file, got {str(out)!r}")
    if file.exists():
        raise InputError(f"out must be a new file, got {str(out)!r}, which exists")
    return file


@contextmanager
def fresh_parquet(file: Path, schema: Any) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Inside, rows can be written; the file appears whole at the end, and not at all after an error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    beside = file.with_name(f".{file.name}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(beside, schema, compression="zstd") as writer:
            yield lambda rows: writer.write_table(pa.Table.from_pylist(rows, schema=schema)) if rows else None
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
