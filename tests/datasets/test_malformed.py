"""Fuzz tests: every record of arbitrary bytes is a row or a reported problem, and no other error
leaves the reader.
"""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.datasets.column_mapping import (
    ROW_FORMAT_PARTS,
    ROW_FORMATS,
    ColumnMapping,
)
from training.datasets.errors import BadFile, BadRow
from training.datasets.formats import detect_format
from training.datasets.mapping_guess import guess_mapping
from training.datasets.records import iter_records
from training.datasets.row_builders import to_row
from training.datasets.rows import Row

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
names = st.sampled_from(
    [
        "messages",
        "prompt",
        "completion",
        "conversations",
        "text",
        "tools",
        "split",
        "instruction",
        "output",
        "other",
    ]
)
rows = st.dictionaries(names, values, max_size=5)
damage = st.tuples(st.floats(0, 1), st.binary(max_size=6))
endings = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("malformed") / "file"


def check_reading(path, content, name):
    """Read the content: every record is a row or a BadRow with a message, or the file is a BadFile.
    Anything else fails.
    """
    path.write_bytes(content)
    try:
        form = detect_format(path, name)
        records_read = list(iter_records(path, form, max_bytes=10**7))
    except BadFile as error:
        assert error.message
        return []
    sample = [value for _, value in records_read if isinstance(value, dict)]
    mapped = guess_mapping(sample)
    for number, value in records_read:
        assert number >= 1
        if isinstance(value, BadRow):
            assert value.message
            assert len(value.message) < 400
        elif mapped.columns:
            check_row(value, mapped)
    return records_read


def check_row(value, mapped):
    try:
        row = to_row(value, mapped)
    except BadRow as bad:
        assert bad.message
        assert len(bad.group) < 400
    else:
        assert isinstance(row, Row)
        json.loads(row.to_json()).keys()
        row.to_json().encode()


slow_ok = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@slow_ok
@given(content=st.binary(max_size=400), name=endings)
def test_any_bytes(path, content, name):
    check_reading(path, content, name)


@slow_ok
@given(
    content=st.lists(rows, max_size=6),
    hit=damage,
    name=endings,
    zipped=st.booleans(),
    array=st.booleans(),
)
def test_rows_that_were_damaged(path, content, hit, name, zipped, array):
    text = json.dumps(content) if array else "".join(json.dumps(row) + "\n" for row in content)
    raw = bytearray(text.encode())
    offset = int(hit[0] * len(raw))
    raw[offset : offset + len(hit[1])] = hit[1]
    check_reading(
        path,
        gzip.compress(bytes(raw))[: -1 if offset % 2 else None] if zipped else bytes(raw),
        name,
    )


@slow_ok
@given(record=rows, form=st.sampled_from(sorted(ROW_FORMATS)), split=st.sampled_from(["", "split"]))
def test_any_record_under_any_mapping(record, form, split):
    check_row(
        record, ColumnMapping(form, {part: part for part, _ in ROW_FORMAT_PARTS[form]}, split)
    )


@slow_ok
@given(text=st.text(max_size=200), name=st.sampled_from(["a.csv", "a.tsv", "a.txt"]))
def test_any_text(path, text, name):
    check_reading(path, text.encode("utf-8", "surrogatepass"), name)
