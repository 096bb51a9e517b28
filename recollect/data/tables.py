"""Reading text tables without trusting them: delimited files, JSON lines, bounded lines; plain or gzip.

Big tables go through Arrow's columnar parsers; the row of an error is looked for only once a read has failed.
Every failure is one `DataError` line that names the file and the row (1-based, the header not counted).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from recollect.errors import DataError

BLOCK_BYTES = 16 << 20  # a row of a big table must fit in two adjacent blocks at most
JSON_BLOCK_BYTES = 4 << 20  # likewise for JSON lines, whose parser is a third slower on larger blocks
LINE_BYTES = 1 << 20  # a line of a catalogue or user file
ID = pa.dictionary(pa.int32(), pa.string())

_CSV_CELL = re.compile(r"In CSV column #(\d+): Row #(\d+): CSV conversion error to ([^:]+): (.*)", re.S)
_CSV_WIDTH = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")


def pick_file(folder: Path, *names: str) -> Path | None:
    """The first of `names` (each also tried with `.gz`) that is a file in `folder`."""
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


def need_file(folder: Path, *names: str) -> Path:
    """Like `pick_file`, but a missing file is a `DataError`."""
    found = pick_file(folder, *names)
    if found is None:
        raise DataError(f"{folder} holds no {' or '.join(names)} (plain or .gz)")
    return found


def _open(path: Path) -> pa.NativeFile:
    try:
        stream = pa.OSFile(str(path), "rb")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    return pa.CompressedInputStream(stream, "gzip") if path.suffix == ".gz" else stream


def lines(path: Path, encodings: Sequence[str] = ("utf-8",)) -> Iterator[tuple[int, str]]:
    """Yield (1-based line number, text without its line end); for small files only.

    Args:
        path: plain or gzip file.
        encodings: tried in turn for each line; the last may be latin-1, which never fails.

    Raises:
        DataError: missing file, damaged gzip, a line over `LINE_BYTES`, or bytes in none of `encodings`.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as handle:
            while block := handle.readline(LINE_BYTES + 1):
                number += 1
                if len(block) > LINE_BYTES:
                    raise DataError(f"{path}, line {number} is longer than {LINE_BYTES} bytes")
                yield number, _decode(path, number, block.rstrip(b"\r\n"), encodings)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged or truncated gzip file after line {number}: {error}") from error


def _decode(path: Path, number: int, block: bytes, encodings: Sequence[str]) -> str:
    if number == 1 and block.startswith(b"\xef\xbb\xbf"):
        block = block[3:]
    for encoding in encodings:
        try:
            return block.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path}, line {number} is not {' or '.join(encodings)} text; convert the file to UTF-8")


def header_of(path: Path, delimiter: str) -> list[str]:
    """Column names of the first line.

    Raises:
        DataError: the file is empty, or a name occurs twice.
    """
    for _, line in lines(path):
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        if len(set(names)) != len(names):
            raise DataError(f"{path} names a column twice in its header: {names!r}")
        return names
    raise DataError(f"{path} is empty")


def read_delimited(
    path: Path,
    columns: Mapping[str, pa.DataType],
    *,
    delimiter: str,
    header: Sequence[str] | None = None,
    quoted: bool = False,
    multiline: bool = False,
) -> pa.Table:
    """Read the named columns of a delimited UTF-8 file.

    Args:
        path: plain or gzip file.
        columns: name -> Arrow type of what to read; the others are skipped.  Empty text stays "", an empty number
            becomes null.
        delimiter: one character.
        header: column names of a file without a header line.
        quoted: whether cells may be wrapped in double quotes.
        multiline: whether a quoted cell may hold line ends (slower).

    Raises:
        DataError: missing column, ragged row, cell of another type, wrong encoding, damaged gzip, no row at all.
    """
    names = list(header) if header is not None else header_of(path, delimiter)
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(names)}")

    def read(threads: bool) -> pa.Table:
        return pyarrow.csv.read_csv(
            _open(path),
            read_options=pyarrow.csv.ReadOptions(
                use_threads=threads, block_size=BLOCK_BYTES, column_names=list(header) if header is not None else None
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=multiline
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict(columns), include_columns=list(columns), strings_can_be_null=False
            ),
        )

    try:
        table = read(threads=True)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as first:
        try:
            read(threads=False)  # the serial reader tells the row
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            _refuse_csv(path, error, list(columns), header is None)
        raise DataError(f"{path} cannot be read: {first}") from first
    if table.num_rows == 0:
        raise DataError(f"{path} is empty: it holds no data row")
    return table


def _refuse_csv(path: Path, error: Exception, columns: list[str], has_header: bool) -> NoReturn:
    text = str(error)
    if "compressed stream" in text or "zlib" in text:
        raise DataError(f"{path} is a damaged or truncated gzip file: {text}") from error
    if "Empty CSV" in text:
        raise DataError(f"{path} is empty") from error
    if "straddling" in text:
        raise DataError(f"{path} holds a row longer than {BLOCK_BYTES} bytes") from error
    shift = 1 if has_header else 0
    if match := _CSV_WIDTH.search(text):
        width_row, expected, seen = (int(part) for part in match.groups())
        raise DataError(f"{path}, row {width_row - shift} has {seen} columns where {expected} are expected") from error
    if match := _CSV_CELL.search(text):
        column, row, kind, detail = match.groups()
        where = f"{path}, row {int(row) - shift}"
        name = columns[int(column)] if int(column) < len(columns) else f"#{column}"
        if "UTF8" in detail:
            raise DataError(f"{where}, column {name!r} is not UTF-8 text; convert the file to UTF-8") from error
        raise DataError(f"{where}, column {name!r}: {detail.strip()} where a {kind} is expected") from error
    raise DataError(f"{path} cannot be read: {' '.join(text.split())[:300]}") from error


def read_json_lines(path: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Read the named fields of a file of one JSON object a line, columnar; a field that is absent becomes null.

    Raises:
        DataError: a line that is not JSON or holds another type, wrong encoding, damaged gzip, no line at all.
    """
    try:
        table = pyarrow.json.read_json(
            _open(path),
            read_options=pyarrow.json.ReadOptions(block_size=JSON_BLOCK_BYTES),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pa.schema(list(columns.items())), unexpected_field_behavior="ignore"
            ),
        )
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        if "Empty JSON" in str(error):
            raise DataError(f"{path} is empty") from error
        _refuse_json(path, error, columns)
    if table.num_rows == 0:
        raise DataError(f"{path} is empty: it holds no line")
    return table


def _refuse_json(path: Path, error: Exception, columns: Mapping[str, pa.DataType]) -> NoReturn:
    for row, line in lines(path):
        if not line.strip():
            continue
        value = parse_json_object(path, row, line)
        for name, kind in columns.items():
            cell = value.get(name)
            if cell is None:
                continue
            wanted: tuple[type, ...] = (str,) if pa.types.is_string(kind) else (int, float)
            if pa.types.is_integer(kind):
                wanted = (int,)
            if not isinstance(cell, wanted) or isinstance(cell, bool):
                raise DataError(f"{path}, row {row}, field {name!r}: {cell!r} where a {kind} is expected") from error
    raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error


def parse_json_object(path: Path, row: int, line: str) -> dict[str, Any]:
    """One line as a JSON object.

    Raises:
        DataError: it is not; the message names file and row.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, row {row} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {row} is not a JSON object but {type(value).__name__}")
    return value


def read_token_lines(path: Path) -> tuple[pa.Array, pa.Array]:
    """Split every line on white space, columnar.

    Returns:
        (the line number of each kept line (L,) int64, list<string> (L,) of its tokens); blank lines are skipped.

    Raises:
        DataError: wrong encoding, damaged gzip, a line over `BLOCK_BYTES`, no line at all.
    """
    column = "line"
    try:
        table = pyarrow.csv.read_csv(
            _open(path),
            read_options=pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, column_names=[column]),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\x1f", quote_char=False, ignore_empty_lines=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={column: pa.large_string()}, strings_can_be_null=False
            ),
        )
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        for _ in lines(path):  # names the line where the encoding or the gzip is at fault
            pass
        _refuse_csv(path, error, [column], has_header=False)
    text = pc.utf8_trim_whitespace(table[column].combine_chunks())
    numbers = pa.array(range(1, len(text) + 1), pa.int64())
    kept = pc.not_equal(text, "")
    text, numbers = text.filter(kept), numbers.filter(kept)
    if len(text) == 0:
        raise DataError(f"{path} is empty")
    return numbers, pc.utf8_split_whitespace(text)
