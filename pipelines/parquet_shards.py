"""Rows as a parquet file: a column `tokens`, a fixed-size list of L tokens a row, zstd; of labelled images `label`.

The file's metadata hold a checksum of the tokens and labels of each row group, which is compared when it is read.
"""

import io
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_CHECKSUMS = "md4.crc32"  # key in a shard's metadata: CRC-32 of each row group's tokens, then labels
LABEL_DTYPE = np.dtype(np.int32)


def pack(tokens: np.ndarray, labels: np.ndarray, rows_per_group: int) -> bytes:
    """The file of rows of tokens `[n, L]` with labels `[n]`, or `[0]` without any. Equal rows give equal bytes."""
    rows, length = tokens.shape
    kind = pa.list_(pa.field("item", pa.from_numpy_dtype(tokens.dtype), nullable=False), length)
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), type=kind)
    groups = range(0, rows, rows_per_group)
    checksums = [
        _checksum(tokens[start : start + rows_per_group], labels[start : start + rows_per_group]) for start in groups
    ]
    fields, columns = [pa.field("tokens", kind, nullable=False)], [column]
    if len(labels):
        fields.append(pa.field("label", pa.from_numpy_dtype(LABEL_DTYPE), nullable=False))
        columns.append(pa.array(labels))
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields, {_CHECKSUMS: json.dumps(checksums)}))
    buffer = pa.BufferOutputStream()
    pq.write_table(
        table,
        buffer,
        row_group_size=rows_per_group,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"},  # parquet stores small integers in 4 bytes each
        write_statistics=False,
        write_page_checksum=True,
    )
    return buffer.getvalue().to_pybytes()


def _checksum(tokens: np.ndarray, labels: np.ndarray) -> int:
    return zlib.crc32(labels.tobytes(), zlib.crc32(tokens.tobytes()))


def footer_size(tail: bytes) -> int:
    """Bytes of the footer of the file that ends with `tail`: thrift, its length in 4 bytes, and the letters PAR1."""
    return int.from_bytes(tail[-8:-4], "little") + 8


class ParquetContent:
    """What is in a parquet file, by its footer; ValueError or an error of pyarrow for one that makes no sense."""

    def __init__(self, footer: bytes, size: int, local: str | None):
        """size: bytes of the file. local: its path, if it is on this machine."""
        self._metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
        self._columns = [name for name in ("tokens", "label") if name in self._metadata.schema.to_arrow_schema().names]
        self._checksums: list[int] = json.loads((self._metadata.metadata or {})[_CHECKSUMS.encode()])
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        self.counts = np.array([group.num_rows for group in groups], np.int64)  # rows of each row group
        self.spans = [_span(group) for group in groups]
        # No memory map: a file truncated under one ends the process by a signal instead of an error.
        self._local = None if local is None else self._parquet(local)

    def read(self, groups: list[int], file: io.RawIOBase | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows `[n, L]` of row groups, one group after the other, and labels `[n]`, or `[0]` without any.

        file: has the spans of the groups at least; None where the file is on this machine.
        """
        parquet = self._local if file is None else self._parquet(pa.PythonFile(file, "r"))
        assert parquet is not None
        table = parquet.read_row_groups(groups, columns=self._columns, use_threads=False)
        column = table["tokens"].combine_chunks()
        rows = column.flatten().to_numpy().reshape(len(column), -1)
        labels = table["label"].to_numpy() if "label" in self._columns else np.empty(0, LABEL_DTYPE)
        stop = 0
        for group in groups:
            start, stop = stop, stop + self.counts[group]
            if stop > len(rows) or _checksum(rows[start:stop], labels[start:stop]) != self._checksums[group]:
                raise ValueError(f"the tokens of its row group {group} are not those that were written")
        return rows, labels

    def _parquet(self, source: str | pa.NativeFile) -> pq.ParquetFile:
        return pq.ParquetFile(source, metadata=self._metadata, page_checksum_verification=True, pre_buffer=False)


def _span(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """The bytes `start..stop-1` of a row group."""
    columns = [group.column(i) for i in range(group.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    sizes = [column.total_compressed_size for column in columns]
    return min(starts), max(start + size for start, size in zip(starts, sizes, strict=True))
