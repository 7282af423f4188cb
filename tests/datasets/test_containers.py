"""Every container of rows is read, and what cannot be read is said when the file is uploaded."""

import gzip
import io
import json
import struct
import zipfile

import pyarrow
import pytest

from tests.datasets.files import detect, detect_and_check, read_staged
from training.datasets.errors import BadFile

ROWS = [{"prompt": f"number {i}", "completion": f"is {i}"} for i in range(6)]
CONVERSATIONS = [
    [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": f"is {i}"}]
    for i in range(6)
]
LINES = [json.dumps(row) for row in ROWS]
CSV = "prompt,completion\n" + "".join(f"number {i},is {i}\n" for i in range(6))
FILES = {
    "objects over several lines.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "a comma after each line.jsonl": ",\n".join(LINES) + ",\n",
    "objects on one line.json": " ".join(LINES),
    "an object around the rows.json": json.dumps({"version": "1", "data": ROWS}),
    "an unknown key around the rows.json": json.dumps({"rivers": ROWS}, indent=1),
    "arrays of messages.json": json.dumps(CONVERSATIONS),
    "an array on each line.jsonl": "\n".join(map(json.dumps, CONVERSATIONS)),
    "a trailing comma.json": "[" + ",".join(LINES) + ",]",
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "columns with an index.json": json.dumps(
        {key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}
    ),
    "JSON in a text file.txt": "\n".join(LINES),
    "indented JSON in a text file.txt": json.dumps(ROWS, indent=2),
    "carriage returns.jsonl": "\r".join(LINES),
    "carriage returns.csv": CSV.replace("\n", "\r"),
    "the separator of Excel.csv": "sep=;\r\n" + CSV.replace(",", ";"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_container_is_read(tmp_path, name):
    report = detect_and_check(tmp_path, FILES[name].encode(), name)
    assert (report["rows"], report["problems"]["count"]) == (6, 0)
    assert [row["messages"][1]["content"] for row in read_staged(tmp_path)] == [
        f"is {i}" for i in range(6)
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "light on", "completion": "ok", "tools": [{"name": "f"}]},
        {"prompt": "lamp", "completion": "glow"},
        {"question": "x?", "answer": "y", "history": [["a", "b"]]},
    ],
)
def test_one_object_is_one_row(tmp_path, row):
    report = detect_and_check(tmp_path, json.dumps(row).encode(), "a.json")
    assert report["rows"] == 1


def test_values_around_the_rows_are_columns_of_every_row(tmp_path):
    content = json.dumps({"system": "Be brief.", "version": 2, "data": ROWS}).encode()
    report = detect_and_check(tmp_path, content, "a.json")
    assert report["unused"] == [{"name": "version", "count": 6, "part": ""}]
    assert {row["messages"][0]["content"] for row in read_staged(tmp_path)} == {"Be brief."}


def test_an_unknown_name_beside_splits_is_reported(tmp_path):
    content = json.dumps({"train": ROWS[:4], "calibration": ROWS[4:]}).encode()
    report = detect_and_check(tmp_path, content, "a.json")
    assert (report["splits"]["train"], report["problems"]["count"]) == (4, 2)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_other_encodings_are_read(tmp_path, encoding, name):
    text = "\n".join(LINES) if name == "a.jsonl" else CSV
    report = detect_and_check(tmp_path, text.replace("is 0", "é世").encode(encoding), name)
    assert report["rows"] == 6
    assert read_staged(tmp_path)[0]["messages"][1]["content"] == "é世"


def test_a_bom_between_joined_files_is_skipped(tmp_path):
    content = b"\xef\xbb\xbf".join(line.encode() + b"\n" for line in LINES)
    assert detect_and_check(tmp_path, content, "a.jsonl")["problems"]["count"] == 0


def test_all_members_of_a_gzip_file_are_read(tmp_path):
    members = [b"", *(line.encode() + b"\n" for line in LINES)]
    content = b"".join(map(gzip.compress, members))
    assert detect_and_check(tmp_path, content, "a.jsonl.gz")["rows"] == 6


@pytest.mark.parametrize("separator", ["", "\n"])
def test_the_keys_around_the_rows_name_their_splits(tmp_path, separator):
    wrapped = {"train": ROWS[:3], "validation": ROWS[3:5], "test": ROWS[5:]}
    content = json.dumps(wrapped, indent=1 if separator else None).encode()
    splits = detect_and_check(tmp_path, content, "a.json")["splits"]
    assert splits == {"train": 3, "eval": 2, "test": 1}


def save_arrow(rows):
    out = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def test_a_zip_of_a_saved_dataset_is_read_in_the_order_of_its_state(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for split, rows in (("train", ROWS[:4]), ("test", ROWS[4:])):
            halves = {
                "data-0.arrow": rows[: len(rows) // 2],
                "data-1.arrow": rows[len(rows) // 2 :],
            }
            for name, part in halves.items():
                archive.writestr(f"saved/{split}/{name}", save_arrow(part))
            archive.writestr(f"saved/{split}/cache-1.arrow", save_arrow(rows))
            state = {"_data_files": [{"filename": name} for name in halves]}
            archive.writestr(f"saved/{split}/state.json", json.dumps(state))
            archive.writestr(f"saved/{split}/dataset_info.json", "{}")
    report = detect_and_check(tmp_path, out.getvalue(), "saved.zip")
    assert report["splits"] == {"train": 4, "eval": 0, "test": 2}
    assert [row["messages"][1]["content"] for row in read_staged(tmp_path)] == [
        f"is {i}" for i in range(6)
    ]


def test_arrow_streams_one_after_another_are_read(tmp_path):
    content = save_arrow(ROWS[:2]) + save_arrow(ROWS[2:])
    assert detect_and_check(tmp_path, content, "a.arrow")["rows"] == 6


def test_an_arrow_file_whose_offsets_leave_its_buffers_is_rejected(tmp_path):
    content = save_arrow([{"prompt": "a", "completion": "c"}, {"prompt": "b", "completion": "d"}])
    offsets = struct.pack("<3i", 0, 1, 2)
    assert offsets in content
    broken = content.replace(offsets, struct.pack("<3i", 0, 1, 2**20))
    with pytest.raises(BadFile):
        detect(tmp_path, broken, "a.arrow")


def test_a_readme_beside_the_data_is_not_trained(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("README.md", "# Rivers")
        archive.writestr("rivers.jsonl", "\n".join(LINES))
    assert detect_and_check(tmp_path, out.getvalue(), "a.zip")["rows"] == 6


@pytest.mark.parametrize(("name", "is_certain"), [("a.txt", True), ("a", True), ("a.yaml", False)])
def test_a_file_of_unknown_kind_is_plain_text_only_after_asking(tmp_path, name, is_certain):
    content = b"rivers are many\n\nlakes are few\n"
    assert detect(tmp_path, content, name)["mapping"]["is_certain"] is is_certain


def test_times_that_python_has_not_are_read_as_text(tmp_path):
    table = pyarrow.table(
        {
            "prompt": ["when?", "and then?"],
            "completion": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
            "day": pyarrow.array([2**30, 1], pyarrow.date32()),
        }
    )
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    assert detect_and_check(tmp_path, out.getvalue(), "a.arrow")["rows"] == 2


def test_the_names_in_a_zip_cannot_leave_the_upload(tmp_path):
    folder = tmp_path / "upload"
    folder.mkdir()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../evil.jsonl", "\n".join(LINES))
    assert detect_and_check(folder, out.getvalue(), "a.zip")["rows"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["upload"]


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_damaged_zip_is_rejected(tmp_path, compression):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("a.jsonl", "\n".join(LINES))
    content = bytearray(out.getvalue())
    start = 30 + len("a.jsonl") + 20
    content[start : start + 25] = bytes(byte ^ 0xFF for byte in content[start : start + 25])
    with pytest.raises(BadFile):
        detect(tmp_path, bytes(content), "a.zip")


def test_a_zip_whose_directory_is_elsewhere_is_rejected(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", "\n".join(LINES))
    content = bytearray(out.getvalue())
    position = content.rfind(b"PK\x05\x06") + 16
    content[position : position + 4] = struct.pack("<I", 2**24)
    with pytest.raises(BadFile):
        detect(tmp_path, bytes(content), "a.zip")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b'{"a": 1\n "b": 2}\n', "a.jsonl", "Line 1: not JSON"),
        (b'{"data": [{"a": }]}', "a.json", "Line 1: not JSON"),
        (b"{}\n{}\n", "a.jsonl", "no row has a value"),
        (b"17\n18\n", "a.jsonl", "expected a JSON"),
        (b"prompt,completion\n", "a.csv", "has no rows"),
        ("größer;Maß\n".encode("utf-16")[:-1], "a.jsonl", "save it as UTF-8"),
    ],
)
def test_a_file_without_a_readable_row_is_rejected_with_its_error(tmp_path, content, name, message):
    with pytest.raises(BadFile) as rejected:
        detect(tmp_path, content, name)
    assert message in rejected.value.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"prompt\tcompletion\r\nname a river\tRhine\r\n"),
        ("a.txt", "prompt\tcompletion\r\nname a river\tRhine\r\n".encode("utf-16")),
        ("a.txt", b'prompt,completion\n"name a river",Rhine\n'),
        ("a.csv", b"SEP=;\nprompt;completion\nname a river;Rhine\n;\n"),
        ("a.csv", b'"sep=;"\nprompt;completion\nname a river;Rhine\n'),
        ("a.csv", b'prompt,completion\rname a river,Rhine\r"a\nb",c\r'),
        ("a.csv", b"\xef\xbb\xbf\xef\xbb\xbfprompt,completion\nname a river,Rhine\n"),
    ],
)
def test_tables_of_excel_are_read(tmp_path, name, content):
    report = detect_and_check(tmp_path, content, name)
    assert report["problems"]["count"] == 0
    contents = [message["content"] for message in next(iter(read_staged(tmp_path)))["messages"]]
    assert contents == ["name a river", "Rhine"]


def test_a_paragraph_keeps_the_indentation_of_its_first_line(tmp_path):
    detect_and_check(tmp_path, b"    def f():\n        return 1\n\nx = 1\n", "a.txt")
    assert [row["text"] for row in read_staged(tmp_path)] == [
        "    def f():\n        return 1",
        "x = 1",
    ]
