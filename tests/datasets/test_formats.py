"""Every file format is detected from its content and read in bounded memory; a broken file fails
with a message that names the location.
"""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from training.datasets.errors import BadFile, BadRow
from training.datasets.formats import Format, detect_format
from training.datasets.records import iter_records
from training.datasets.rows import MAX_ROW_BYTES

PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "c, d", "completion": "e"}]
LINES = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()


@pytest.fixture
def read(tmp_path):
    def read_records(content, name="data", **changes):
        path = tmp_path / "file"
        path.write_bytes(content)
        file_format = detect_format(path, name)
        file_format = Format(**{**file_format.to_dict(), **changes})
        return file_format, list(iter_records(path, file_format, max_bytes=10**9))

    return read_records


def to_parquet(rows):
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return bytes(out.getvalue())


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        (LINES, "a.jsonl", "jsonl"),
        (LINES, "a", "jsonl"),
        (LINES, "a.json", "jsonl"),
        (b"\xef\xbb\xbf" + LINES, "a.jsonl", "jsonl"),
        (json.dumps(PAIRS).encode(), "a.json", "json"),
        (json.dumps(PAIRS, indent=2).encode(), "a", "json"),
        (b'prompt,completion\na,b\n"c, d",e\n', "a.csv", "csv"),
        (b"prompt;completion\na;b\nc, d;e\n", "a.csv", "csv"),
        (b"prompt\tcompletion\na\tb\nc, d\te\n", "a.tsv", "csv"),
        (to_parquet(PAIRS), "a.parquet", "parquet"),
        (to_parquet(PAIRS), "a.bin", "parquet"),
        (gzip.compress(LINES), "a.jsonl.gz", "jsonl"),
        (gzip.compress(b'prompt,completion\na,b\n"c, d",e\n'), "a.csv.gz", "csv"),
    ],
)
def test_the_format_is_detected_and_the_records_are_read(read, content, name, kind):
    file_format, records_read = read(content, name)
    assert file_format.kind == kind
    assert [value for _, value in records_read] == PAIRS


def test_plain_text_is_read_by_paragraph_or_by_line(read):
    content = b"one\ntwo\n\n\nthree\n"
    assert read(content, "a.txt")[1] == [(1, {"text": "one\ntwo"}), (5, {"text": "three"})]
    assert [value["text"] for _, value in read(content, "a.txt", unit="line")[1]] == [
        "one",
        "two",
        "three",
    ]


def test_a_csv_may_have_no_header(read):
    assert read(b"a,b\nc,d\n", "x.csv", header=False)[1][0] == (
        1,
        {"column 1": "a", "column 2": "b"},
    )


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.jsonl", "is empty"),
        (b"  \n \n", "a.jsonl", "is empty"),
        (b"PK\x03\x04zipped", "a.xlsx", "a zip or Excel file"),
        (b"\x80\x04\x95pickled", "a.jsonl", "a Python pickle"),
        (b"abc\0def", "a.txt", "binary (zero byte at position 4)"),
        ("é".encode("latin-1") * 50, "a.txt", "not UTF-8 text"),
        (b"PAR1nonsense", "a.parquet", "corrupt after row 0"),
        (gzip.compress(LINES)[:-9], "a.jsonl.gz", "truncated or corrupt after line"),
        (b"\x1f\x8bnonsense", "a.gz", "gzip file is corrupt"),
        (b"a,a\n1,2\n", "a.csv", "contains the column `a` twice"),
        (gzip.compress(to_parquet(PAIRS)), "a.gz", "gzipped Parquet"),
    ],
)
def test_an_unreadable_file_is_rejected(read, content, name, message):
    with pytest.raises(BadFile, match="(?s)" + message.replace("(", r"\(").replace(")", r"\)")):
        read(content, name)


@pytest.mark.parametrize(
    ("content", "name", "line", "message"),
    [
        (b'{"a": "b"}\n{nope}\n', "a.jsonl", 2, "not JSON: Expecting property name"),
        (b"[1]\n", "a.jsonl", 1, "expected a JSON object"),
        (b'{"a": "b"}\n"\xff"\n', "a.jsonl", 2, "byte 2 is not UTF-8"),
        (b'{"a":' + b"[" * 200_000 + b"\n", "a.jsonl", 1, "nested too deeply"),
        (b'{"a": 1, "a": 2}\n', "a.jsonl", 1, "duplicate key `a`"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "a.jsonl", 1, "unsupported JSON"),
        (b'{"a": "' + b"x" * MAX_ROW_BYTES + b'"}\n', "a.jsonl", 1, "larger than 4 MiB"),
        (b'[{"a": 1},\n{"b": tru}, {"a": 2}, {"a": 3}]', "a.json", 2, "not JSON: Expecting value"),
        (b'[{"a": 1},\n{"a": 2}', "a.json", 2, "incomplete: the closing `]` is missing"),
        (b'[{"a": 1},\n{"a": "lo', "a.json", 2, "Unterminated string"),
        (b'[{"a": 1, "a": 2}]', "a.json", 1, "duplicate key"),
        (b'[{"a": 1} {"a": 2}]', "a.json", 1, "expected one comma between two rows"),
        (b'[{"a": 1}] more', "a.json", 1, "expected a JSON array or object"),
        (b"[" * 200_000, "a.json", 1, "nested too deeply"),
        (b'[{"a": "' + b"x" * (2 * MAX_ROW_BYTES) + b'"}]', "a.json", 1, "larger than 4 MiB"),
        (b"a,b\n1,2,3\n", "a.csv", 2, "has 3 fields; the header has 2"),
        (b'a,b\n1,"2\n3,4\n', "a.csv", 2, "not CSV"),
        (b'a,b\n1,"' + b"x" * (MAX_ROW_BYTES + 10) + b'"\n', "a.csv", 2, "not CSV: field larger"),
        (b"x" * (MAX_ROW_BYTES + 10), "a.txt", 1, "larger than 4 MiB"),
    ],
)
def test_a_broken_record_is_reported_with_its_line(read, content, name, line, message):
    problems = [
        (number, bad.message) for number, bad in read(content, name)[1] if isinstance(bad, BadRow)
    ]
    assert problems[0][0] == line
    assert message in problems[0][1]


def test_rows_after_a_broken_one_are_read(read):
    records_read = read(b'{"a": "1"}\nnope\n{"a": "3"}\n', "a.jsonl")[1]
    assert [number for number, value in records_read if isinstance(value, dict)] == [1, 3]


def test_a_gzip_bomb_ends_at_the_limit(tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(b'{"a": "' + b"x" * 1000 + b'"}\n' * 1 + b" " * 50_000_000))
    with pytest.raises(BadFile, match="exceeds the size limit"):
        list(iter_records(path, detect_format(path, "a.jsonl.gz"), max_bytes=1_000_000))


def test_rows_of_a_big_array_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "big.json"
    path.write_text(
        "[" + ",\n".join(json.dumps({"a": "x" * 1000, "n": i}) for i in range(3000)) + "]"
    )
    records_read = list(iter_records(path, Format("json"), max_bytes=10**9))
    assert [(number, value["n"]) for number, value in records_read] == [
        (i + 1, i) for i in range(3000)
    ]


def test_an_unclosed_quote_is_reported_with_the_lines_it_swallowed(read):
    bad = read(b'a,b\n1,"2\n' + b"3,4\n" * 50, "a.csv")[1][-1][1]
    assert "lines 2 to 52 were not read" in bad.message
    assert bad.is_fatal


def test_a_csv_line_that_is_too_long_is_not_silently_truncated(read):
    line = b"x" * (3 * 2**20) + b"," + b"y" * (3 * 2**20) + b"\n"
    assert [type(value) for _, value in read(b"a,b\n" + line + b"1,2\n", "a.csv")[1]] == [
        BadRow,
        dict,
    ]


def test_an_invalid_byte_in_an_array_spoils_only_its_row(read):
    rows = [b'{"a": "ok"}', b'{"a": "\xe9"}', b'{"a": "fine"}']
    records_read = read(b"[" + b",\n".join(rows) + b"]", "a.json")[1]
    assert [number for number, _ in records_read] == [1, 2, 3]
    assert records_read[2][1] == {"a": "fine"}


def test_json_lines_named_json_are_read_even_if_the_first_line_is_long(read):
    long = json.dumps({"a": "x" * 100_000}).encode()
    assert [number for number, _ in read(long + b"\n" + b'{"a": "y"}\n', "a.json")[1]] == [1, 2]


def test_a_line_that_stalls_csv_sniffer_is_detected_quickly(read):
    records_read = read(b'a,"b",c\na,"b",c\n' + b'"' * 3000 + b"x\na,b,c\n", "a.csv")[1]
    assert records_read[0] == (2, {"a": "a", "b": "b", "c": "c"})


def test_a_small_parquet_file_with_huge_rows_hits_the_limit(tmp_path):
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"a": ["x" * 2**20] * 300}), path, use_dictionary=True, compression="zstd"
    )
    assert path.stat().st_size < 100_000
    with pytest.raises(BadFile, match="exceeds the size limit"):
        list(iter_records(path, Format("parquet"), max_bytes=50 * 2**20))
