import io
import json

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from tests import tiny
from training.datasets.examples import EXAMPLES, add_example
from training.datasets.intake import BadData, bounded_lines, check_lines, create_dataset
from training.datasets.models import Dataset, DatasetVersion
from training.datasets.preview import first_rows, random_row
from training.errors import UserError


def test_it_works(data):
    assert data.rows == len(tiny.ROWS)
    assert data.train_rows + data.heldout_rows == data.rows
    assert data.heldout_rows == 1
    assert len(data.file("train").read_text().splitlines()) == data.train_rows


def test_no_row_is_in_both_parts_and_the_split_is_the_same_every_time(alice, data):
    again = create_dataset(alice, "Again", tiny.lines(tiny.ROWS), source="x")
    assert again.digest == data.digest
    train, heldout = (set(data.file(split).read_text().splitlines()) for split in ("train", "heldout"))
    assert not train & heldout


def test_every_faulty_line_is_named_with_its_number(alice):
    lines = [*tiny.lines(tiny.ROWS[:3]), b"\n", b'{"messages": []}\n', b"nonsense\n"]
    with pytest.raises(BadData) as caught:
        create_dataset(alice, "Bad", lines, source="x")
    assert caught.value.problems[0].startswith("line 5: `messages`")
    assert caught.value.problems[1].startswith("line 6: not JSON")
    assert Dataset.objects.count() == 0


def test_the_first_hundred_are_shown_and_all_are_counted():
    checked = check_lines([b"x\n"] * 250)
    assert (len(checked.problems), checked.count) == (100, 250)


def test_bad_rows_can_be_left_out(alice):
    version = create_dataset(alice, "Mixed", [*tiny.lines(tiny.ROWS[:5]), b"x\n"], source="x", leave_out=True)
    assert (version.rows, version.left_out) == (5, 1)


def test_too_few_rows_are_refused(alice):
    with pytest.raises(UserError, match="at least 2 are needed"):
        create_dataset(alice, "One", tiny.lines(tiny.ROWS[:1]), source="x")


def test_an_endless_line_takes_bounded_memory():
    class Endless(io.RawIOBase):
        left = 40

        def readline(self, size):
            self.left -= 1
            return b"x" * size if self.left > 0 else b"\n" if self.left == 0 else b""

    lines = list(bounded_lines(Endless()))
    assert len(lines) == 1
    assert "4 MiB" in check_lines(lines).problems[0]


@pytest.mark.parametrize(("key", "train", "heldout", "test"), [("smart_home", 2322, 148, 488), ("shell_commands", 924, 80, 200)])
def test_examples_come_with_one_click_and_only_once(alice, key, train, heldout, test):
    version = add_example(alice, key)
    assert (version.train_rows, version.heldout_rows, version.test_rows) == (train, heldout, test)
    assert add_example(alice, key) == version
    assert f"{train:,}" in EXAMPLES[key].words
    assert version.dataset.licence


def test_a_random_row_was_not_trained_on(data):
    row = random_row(data)
    trained = [messages[0]["content"] for messages in first_rows(data, "train", 0, 100)]
    assert row["messages"][-1]["content"] not in trained
    assert row["expected"]


def post(client, content, **fields):
    upload = SimpleUploadedFile("lights.jsonl", content)
    return client.post("/data/new", {"file": upload, **fields})


def test_an_upload_is_checked_and_stored(as_alice):
    answer = post(as_alice, b"".join(tiny.lines(tiny.ROWS)))
    version = DatasetVersion.objects.get()
    assert answer["Location"] == f"/data/{version.dataset_id}"
    assert version.dataset.name == "lights"
    page = as_alice.get(answer["Location"]).content.decode()
    assert "kitchen" in page


def test_a_faulty_upload_says_which_lines_and_keeps_the_name(as_alice):
    answer = post(as_alice, b'{"prompt": 1, "completion": "x"}\n', name="My lamps")
    page = answer.content.decode()
    assert answer.status_code == 400
    assert "line 1: `prompt` must be text" in page
    assert "My lamps" in page


def test_an_upload_over_the_limit_breaks_off_and_leaves_nothing(as_alice, settings, tmp_path):
    settings.DATASET_MAX_BYTES = 100_000
    settings.FILE_UPLOAD_TEMP_DIR = str(tmp_path)
    answer = post(as_alice, b"x" * 400_000)
    assert answer.status_code == 413
    assert "nothing of it was kept" in answer.content.decode()
    assert list(tmp_path.iterdir()) == []
    assert Dataset.objects.count() == 0


def test_markup_in_rows_and_names_is_shown_as_text(as_alice):
    rows = [tiny.row(f"<script>alert({i})</script>", "<b>x</b>") for i in range(3)]
    answer = post(as_alice, b"".join(tiny.lines(rows)), name="<img src=x>")
    page = as_alice.get(answer["Location"]).content.decode()
    assert "<script>alert" not in page
    assert "<img src=x>" not in page
    assert "&lt;script&gt;" in page


def test_a_byte_order_mark_is_no_fault(as_alice):
    answer = post(as_alice, b"\xef\xbb\xbf" + b"".join(tiny.lines(tiny.ROWS[:3])))
    assert answer.status_code == 302


def test_json_of_rows_is_what_was_uploaded(data):
    first = json.loads(data.file("train").read_text().splitlines()[0])
    assert first["messages"][0] in [row["messages"][0] for row in tiny.ROWS]
