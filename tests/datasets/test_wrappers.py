"""Objects and folders around rows: splits, keys and shared values."""

import io
import json
import zipfile

import pytest

from tests.datasets.files import detect, detect_and_check, read_staged
from training.datasets.errors import BadFile
from training.datasets.rows import find_split


def make_rows(*prompts):
    return [{"prompt": prompt, "completion": f"is {prompt}"} for prompt in prompts]


def check(tmp_path, value):
    return detect_and_check(tmp_path, json.dumps(value).encode(), "a.json")


def read_prompts(folder):
    return [row["messages"][-2]["content"] for row in read_staged(folder)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train_sft", "train"),
        ("my-test.jsonl", "test"),
        ("data_test_0.csv", "test"),
        ("Train", "train"),
        ("trainData.json", "train"),
        ("validation-00000-of-00001.parquet", "eval"),
        ("devices", ""),
        ("values", ""),
        ("testimonials", ""),
        ("train_test_split", ""),
        ("unsupervised", ""),
    ],
)
def test_a_name_names_a_split_by_a_whole_word(name, split):
    assert find_split(name) == split


def test_keys_that_name_splits_are_splits(tmp_path):
    report = check(tmp_path, {"train_sft": make_rows("a"), "test_sft": make_rows("b")})
    assert (report["splits"]["train"], report["splits"]["test"]) == (1, 1)


def test_other_keys_around_rows_become_a_column(tmp_path):
    value = {"good": make_rows("a"), "bad": make_rows("b")}
    assert check(tmp_path, value)["unused"] == [{"name": "key", "count": 2, "part": ""}]
    detected = detect(tmp_path, json.dumps(value).encode(), "a.json")
    assert not detected["mapping"]["is_certain"]


def test_rows_by_a_text_keep_the_text(tmp_path):
    value = {"What is a river?": {"answer": "water"}, "A hill?": {"answer": "ground", "n": 1}}
    check(tmp_path, value)
    assert read_prompts(tmp_path) == ["What is a river?", "A hill?"]


def test_a_row_with_lists_of_lists_is_one_row(tmp_path):
    rows = [make_rows("a")[0] | {"test": [["assert 1"], ["assert 2"]]}, *make_rows("b")]
    text = json.dumps(rows[0], indent=1) + "\n" + json.dumps(rows[1])
    report = detect_and_check(tmp_path, text.encode(), "a.jsonl")
    assert (report["rows"], report["splits"]["test"]) == (2, 0)
    assert read_prompts(tmp_path) == ["a", "b"]


LONG = "x" * 100_000


def test_a_large_object_shares_the_values_before_its_rows(tmp_path):
    rows = make_rows(*(f"{number} {LONG}" for number in range(45)))
    check(tmp_path, {"system": "Be brief.", "data": rows})
    assert next(iter(read_staged(tmp_path)))["messages"][0]["content"] == "Be brief."


def test_a_value_after_the_rows_of_a_large_object_is_a_problem(tmp_path):
    rows = make_rows(*(f"{number} {LONG}" for number in range(45)))
    report = check(tmp_path, {"data": rows, "system": "Be brief."})
    assert report["problems"]["count"] == 1 and "`system`" in report["problems"]["messages"][0]


@pytest.mark.parametrize("value", [{"data": []}, {"train": [], "test": []}])
def test_an_object_without_rows_says_so(tmp_path, value):
    with pytest.raises(BadFile, match="no rows"):
        check(tmp_path, value)


def make_zip(**texts):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name.replace("__", "/") + ".jsonl", text)
    return out.getvalue()


@pytest.mark.parametrize(
    "names",
    [("train_data", "test_data"), ("data__train_0", "data__test_0"), ("Train__a", "Test__a")],
)
def test_files_of_a_zip_have_the_split_that_their_name_or_folder_names(tmp_path, names):
    texts = {
        name: "\n".join(json.dumps(row) for row in make_rows(f"{name} 1", f"{name} 2"))
        for name in names
    }
    files = detect(tmp_path, make_zip(**texts), "a.zip")["files"]
    assert [file["split"] for file in files] == ["train", "test"]


def test_folders_that_only_begin_like_a_split_are_none(tmp_path):
    rows = json.dumps(make_rows("a")[0])
    files = detect(tmp_path, make_zip(devices__a=rows, testimonials__a=rows), "a.zip")["files"]
    assert [file["split"] for file in files] == ["", ""]


def test_the_mapping_of_a_zip_comes_from_its_largest_file(tmp_path):
    data = "\n".join(json.dumps(row) for row in make_rows(*(f"prompt {n}" for n in range(9))))
    content = make_zip(a_meta='{"author": "someone"}', rows=data)
    assert detect(tmp_path, content, "a.zip")["mapping"]["row_format"] == "pairs"
