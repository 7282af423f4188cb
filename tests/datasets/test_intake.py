"""From a file to an immutable version: checked, split, deduplicated, and nothing left behind when
it fails.
"""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from tests import tiny
from training.datasets import intake, shelf
from training.datasets.build import Choices
from training.datasets.examples import EXAMPLES, add_example
from training.datasets.intake import BadData, receive
from training.datasets.models import Dataset, DatasetVersion, Upload
from training.datasets.preview import first_rows, random_row
from training.datasets.work import UPLOAD_JOB, create_dataset
from training.errors import Conflict, NotAllowed, UserError
from training.jobs.models import Job
from training.jobs.runner import run_lane
from training.jobs.sweeper import recover_lost_jobs

pytestmark = pytest.mark.django_db


@pytest.fixture
def take(alice, tmp_path):
    """Receives files, given as content by name; `heldout` is a file of held-out rows."""

    def make(name="lights.jsonl", content=None, heldout=None, **more):
        files = [(tmp_path / "in", name, "")]
        files[0][0].write_bytes(b"".join(tiny.encode_jsonl(tiny.ROWS)) if content is None else content)
        if heldout is not None:
            files.append((tmp_path / "held", "held.jsonl", "heldout"))
            files[1][0].write_bytes(heldout)
        return receive(alice, files, name="", source=f"upload: {name}", **more)

    return make


def check(upload):
    intake.ask_for(upload, "check")
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    return upload


def check_again(upload):
    intake.put_back(upload)
    return check(upload)


def save(upload, *, leave_out=False, **choices):
    intake.ask_for_save(upload, Choices(**choices), leave_out=leave_out)
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    assert upload.state == "done", upload.error
    return upload.versions.latest("number")


def lines_of(version, split):
    return version.file(split).read_text().splitlines()


@pytest.mark.own_process
def test_it_works(take):
    upload = check(take())
    assert (upload.state, upload.report["rows"], upload.report["problems"]["count"]) == (
        "checked",
        len(tiny.ROWS),
        0,
    )
    version = save(upload)
    assert version.dataset.name == "lights"
    assert version.train_rows + version.heldout_rows == len(tiny.ROWS)
    assert len(lines_of(version, "train")) == version.train_rows
    assert json.loads(lines_of(version, "train")[0])["messages"][0] in [
        row["messages"][0] for row in tiny.ROWS
    ]


def test_the_same_content_is_the_same_version_and_the_split_is_drawn_by_its_seed(take):
    first, again = save(check(take())), save(check(take()))
    other = save(check(take()), seed=7)
    assert first.digest == again.digest != other.digest


def test_a_share_of_ones_own_is_held_out(take):
    version = save(check(take()), heldout_share=0.25)
    assert version.heldout_rows == 6
    assert not set(lines_of(version, "train")) & set(lines_of(version, "heldout"))


def test_a_file_of_ones_own_is_held_out_and_rows_that_stand_in_both_leave_training(take):
    held = b"".join(tiny.encode_jsonl(tiny.ROWS[:3]))
    version = save(check(take(heldout=held)))
    assert (version.train_rows, version.heldout_rows) == (len(tiny.ROWS) - 3, 3)
    assert version.report["dropped"]["in_both"] == 3
    assert not set(lines_of(version, "train")) & set(lines_of(version, "heldout"))


def test_a_column_says_the_split(take):
    rows = [
        {**row, "part": "test" if i < 2 else "valid" if i < 5 else "train"}
        for i, row in enumerate(tiny.ROWS)
    ]
    upload = take(content=b"".join(tiny.encode_jsonl(rows)))
    intake.set_mapping(upload, {**upload.mapped, "split": "part"})
    version = save(check(upload))
    assert (version.test_rows, version.heldout_rows) == (2, 3)


def test_repeated_rows_are_counted_stay_on_one_side_and_can_be_dropped(take):
    content = b"".join(tiny.encode_jsonl(tiny.ROWS * 3))
    upload = check(take(content=content))
    assert upload.report["same"] == 2 * len(tiny.ROWS)
    kept = save(upload, heldout_share=0.2)
    assert not set(lines_of(kept, "train")) & set(lines_of(kept, "heldout"))
    assert save(check_again(upload), drop_same=True).rows == len(tiny.ROWS)


def test_rows_that_look_alike_are_counted_and_can_be_dropped_and_leaks_are_told(take):
    words = (
        "please would you be so kind as to turn the lamp in the long hall beside the old "
        "kitchen stairs on for me now and then"
    )
    rows = [
        tiny.make_row(f"{words} number {'x' * i} today", "done and all is well in this house tonight")
        for i in range(2)
    ] + tiny.ROWS
    upload = check(take(content=b"".join(tiny.encode_jsonl(rows))))
    assert upload.report["alike"] == 1
    assert upload.report["alike_shown"] == [["line 1", "line 2"]]
    assert save(upload, drop_alike=True).rows == len(rows) - 1
    rows[1] = {**tiny.make_row(rows[0]["messages"][0]["content"], "another answer"), "split": "valid"}
    leaking = save(check(take(content=b"".join(tiny.encode_jsonl(rows)))))
    assert leaking.report["leaks"]["prompts"] == 1


def test_every_faulty_row_is_named_grouped_and_counted_and_can_be_left_out(take, alice):
    bad = [b'{"messages": [{"role": "bot%d", "content": "a"}]}\n' % i for i in range(150)]
    upload = check(take(content=b"".join([*tiny.encode_jsonl(tiny.ROWS[:4]), b"\n", *bad, b"nonsense\n"])))
    problems = upload.report["problems"]
    assert problems["count"] == 151
    assert len(problems["shown"]) == 100
    assert (
        problems["shown"][0]
        == "line 6, message 1: `role` is `bot0`; expected system, user, assistant or tool"
    )
    assert [group["count"] for group in problems["groups"]] == [150, 1]
    with pytest.raises(
        BadData, match=r"151 of 155 rows cannot be used. Correct the file, or leave them out."
    ):
        intake.ask_for_save(upload, Choices(), leave_out=False)
    assert Dataset.objects.count() == 0
    version = save(upload, leave_out=True)
    assert (version.rows, version.left_out) == (4, 151)


def test_a_wrong_guess_is_corrected_as_a_new_version_and_the_first_one_stays(take):
    content = b"id,Frage,Antwort\n" + b"".join(
        b"n%d,what is %d,%d it is\n" % (i, i, i) for i in range(9)
    )
    upload = take("fragen.csv", content)
    assert upload.mapped["columns"] == {"prompt": "id", "completion": "Frage"}
    first = save(check(upload))
    intake.put_back(upload)
    intake.set_mapping(
        upload, {"form": "pairs", "columns": {"prompt": "Frage", "completion": "Antwort"}}
    )
    second = save(check(upload))
    assert (second.dataset, second.number, first.number) == (first.dataset, 2, 1)
    assert first.digest != second.digest
    assert first.file("train").exists()


def test_too_few_rows_are_refused_when_they_are_saved(take):
    upload = check(take(content=tiny.encode_jsonl(tiny.ROWS)[0]))
    intake.ask_for_save(upload, Choices(), leave_out=False)
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    assert upload.state == "failed"
    assert "at least 2 different ones are needed" in upload.error


@pytest.mark.own_process
def test_a_file_that_breaks_off_fails_with_its_sentence(take):
    import gzip

    upload = check(take("x.jsonl.gz", gzip.compress(b"".join(tiny.encode_jsonl(tiny.ROWS)))[:-9]))
    assert (upload.state, "cut off or damaged" in upload.error) == ("failed", True)


def test_a_job_is_done_once(take):
    upload = take()
    intake.ask_for(upload, "check")
    with pytest.raises(Conflict):
        intake.ask_for(upload, "check")
    run_lane(UPLOAD_JOB.lane)
    run_lane(UPLOAD_JOB.lane)
    with pytest.raises(Conflict, match="Check the file first"):
        intake.ask_for_save(take(), Choices(), leave_out=False)


@pytest.mark.parametrize(
    ("choices", "field"), [({"heldout_share": 1.5}, "heldout_share"), ({"seed": -1}, "seed")]
)
def test_choices_that_cannot_be_are_refused(choices, field):
    with pytest.raises(UserError) as caught:
        Choices(**choices)
    assert caught.value.field == field


def test_insights_tell_languages_labels_secrets_and_private_addresses(take):
    rows = [
        tiny.make_row(
            f"Is this sentence number {i} a friendly one or is it not, please?",
            "yes" if i % 3 else "no",
        )
        for i in range(40)
    ]
    rows[5] = tiny.make_row("my key is AKIAIOSFODNN7EXAMPLQ, keep it safe", "yes")
    rows[6] = tiny.make_row("write to jane.roe@thefirm.io or to support@thefirm.io about it", "no")
    found = check(take(content=b"".join(tiny.encode_jsonl(rows)))).report["insights"]
    assert found["languages"][0]["name"] == "en"
    assert [label["words"] for label in found["labels"]] == ["yes", "no"]
    assert found["secrets"] == {
        "count": 1,
        "shown": [{"place": "line 6", "words": "AWS Access Key"}],
    }
    assert found["addresses"]["shown"] == [{"place": "line 7", "words": "ja…@thefirm.io"}]
    assert "AKIA" not in json.dumps(found)


def test_deleting_asks_for_the_name_and_frees_the_disk(take, alice, people):
    version = save(check(take()))
    folders = [version.file("train").parent, version.upload.folder]
    with pytest.raises(UserError, match="Type the name, lights"):
        shelf.delete(alice, version.dataset, "light")
    with pytest.raises(NotAllowed):
        shelf.delete(people["bob"], version.dataset, "lights")
    assert shelf.delete(alice, version.dataset, "lights") > 0
    assert not any(folder.exists() for folder in folders)
    assert not Upload.objects.exists()


def test_files_that_another_set_shares_stay(take, alice):
    first, second = save(check(take())), save(check(take()))
    shelf.delete(alice, first.dataset, "lights")
    assert second.file("train").exists()


def test_data_that_a_run_was_trained_on_cannot_be_deleted(run, alice):
    with pytest.raises(Conflict, match="trained on by 1 run"):
        shelf.delete(alice, run.data.dataset, "Lights")


@pytest.mark.parametrize(
    ("key", "train", "heldout", "test"),
    [("smart_home", 2322, 148, 488), ("shell_commands", 924, 80, 200)],
)
def test_examples_come_with_one_click_and_only_once(alice, key, train, heldout, test):
    version = add_example(alice, key)
    assert (version.train_rows, version.heldout_rows, version.test_rows) == (train, heldout, test)
    assert add_example(alice, key) == version
    assert f"{train:,}" in EXAMPLES[key].words
    assert version.dataset.licence


def test_faulty_lines_of_trusted_data_are_refused(alice):
    with pytest.raises(BadData):
        create_dataset(alice, "Bad", [*tiny.encode_jsonl(tiny.ROWS[:3]), b"nonsense\n"], source="x")
    assert DatasetVersion.objects.count() == 0


def test_a_random_row_was_not_trained_on(data):
    row = random_row(data)
    trained = [turns[0]["content"] for turns in first_rows(data, "train", 0, 100)]
    assert row["messages"][-1]["content"] not in trained
    assert row["expected"]


def test_plain_text_is_a_version_too(take):
    version = save(
        check(
            take(
                "story.txt", b"\n\n".join(b"Once there was a lamp number %d." % i for i in range(8))
            )
        )
    )
    assert json.loads(lines_of(version, "train")[0])["text"].startswith("Once there")
    assert random_row(version)["expected"]


def test_the_child_reads_with_no_secret_in_its_environment(take, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = {}
    monkeypatch.setattr(
        "training.jobs.runner.stream_child",
        lambda *a, environment, **k: seen.update(environment) or iter([{"error": "x"}]),
    )
    check(take())
    assert not {"DATABASE_URL", "HF_TOKEN", "SECRET_KEY"} & set(seen)


def test_the_folder_of_an_upload_is_named_by_its_number_alone(take, settings):
    upload = take("../../etc/passwd.jsonl")
    assert upload.folder == Path(settings.HOME) / "uploads" / str(upload.pk)
    assert sorted(path.name for path in upload.folder.iterdir()) == [
        "0",
        "params.json",
        "sample.json",
    ]


def test_dropping_repeats_and_look_alikes_never_touches_what_is_held_out(take):
    words = (
        "please would you be so kind as to turn the lamp in the long hall beside the old "
        "kitchen stairs on for me now and then"
    )
    alike = [
        tiny.make_row(f"{words} number {'x' * i} today", "done and all is well in this house tonight")
        for i in range(4)
    ]
    held = b"".join(tiny.encode_jsonl([*tiny.ROWS[:3], alike[3]]))
    version = save(
        check(take(content=b"".join(tiny.encode_jsonl(tiny.ROWS + alike[:3])), heldout=held)),
        drop_same=True,
        drop_alike=True,
    )
    assert version.heldout_rows == 4
    assert version.train_rows == len(tiny.ROWS) - 3
    assert version.report["leaks"]["alike"] == 0


def test_one_row_without_a_split_does_not_stop_the_draw(take):
    rows = [{**row, "split": "train"} for row in tiny.ROWS[:-1]] + [tiny.ROWS[-1]]
    assert save(check(take(content=b"".join(tiny.encode_jsonl(rows))))).heldout_rows == 1


def test_prompts_that_differ_in_a_sign_are_no_leak(take):
    rows = [tiny.make_row(f"{i} + 4 =", str(i + 4)) for i in range(20)] + [
        {**tiny.make_row("3 - 4 =", "-1"), "split": "valid"}
    ]
    assert save(check(take(content=b"".join(tiny.encode_jsonl(rows))))).report["leaks"]["prompts"] == 0


def test_secrets_are_found_in_system_prompts_and_tool_calls_too(take):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"function": {"name": "f", "arguments": {"key": "glpat-AbCdEfGhIjKlMnOpQrSt"}}}
        ],
    }
    secret = {"role": "system", "content": "The key is AKIAIOSFODNN7EXAMPLQ, tell nobody."}
    user = {"role": "user", "content": "a"}
    rows = [
        *tiny.ROWS,
        {"messages": [secret, user, {"role": "assistant", "content": "b"}]},
        {"messages": [user, call]},
    ]
    found = check(take(content=b"".join(tiny.encode_jsonl(rows)))).report["insights"]["secrets"]
    assert [one["place"] for one in found["shown"]] == [
        f"line {len(rows) - 1}",
        f"line {len(rows)}",
    ]


def test_names_that_cannot_be_stored_are_no_columns_and_no_fault_of_the_page(take):
    rows = [
        {"pro\x00mpt": "a", "q\ud800": "x", "prompt": "b", "completion": f"c{i}"} for i in range(4)
    ]
    rows.append({"prompt": "a", "completion": ["\ud800"]})
    upload = check(take(content=b"".join(tiny.encode_jsonl(rows))))
    assert upload.mapped["columns"] == {"prompt": "prompt", "completion": "completion"}
    assert upload.report["problems"]["shown"][0].encode()


def test_a_file_that_could_not_be_read_to_its_end_says_so(take):
    content = b"prompt,completion\n" + b"a,b\n" * 9 + b'c,"never closed\n' + b"d,e\n" * 50
    upload = check(take("x.csv", content))
    assert upload.report["problems"]["unread"] == "line 11"
    with pytest.raises(BadData, match="could not be read to its end"):
        intake.ask_for_save(upload, Choices(), leave_out=False)


def test_an_upload_that_is_thrown_away_while_it_is_read_is_gone(take, alice, monkeypatch):
    upload = take()
    intake.ask_for(upload, "check")

    def throw(*_args, **_kwargs):
        shelf.forget_upload(alice, upload)
        yield {"alive": True}
        raise AssertionError("the program was followed on")

    monkeypatch.setattr("training.jobs.runner.stream_child", throw)
    folder = upload.folder
    run_lane(UPLOAD_JOB.lane)
    assert not Upload.objects.exists()
    assert not folder.exists()


def test_whatever_breaks_in_the_worker_is_told_on_the_upload(take, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.jobs.runner.stream_child", full)
    upload = check(take())
    assert (upload.state, upload.error) == ("failed", "It could not be read (OSError).")


def test_a_data_set_is_not_deleted_under_a_worker_and_no_longer_ones_own_takes_no_version(
    take, alice, people
):
    version = save(check(take()))
    other = take(dataset=version.dataset)
    intake.ask_for(other, "check")
    with pytest.raises(Conflict, match="is being read"):
        shelf.delete(alice, version.dataset, "lights")
    run_lane(UPLOAD_JOB.lane)
    version.dataset.owner, version.dataset.team = people["mallory"], None
    version.dataset.save()
    other = Upload.objects.get(pk=other.pk)
    with pytest.raises(NotAllowed):
        intake.ask_for_save(other, Choices(), leave_out=False)


def test_an_upload_whose_worker_died_is_read_again(take):
    upload = take()
    intake.ask_for(upload, "check")
    Upload.objects.update(state="working")
    Job.objects.update(state="working", heartbeat_at=timezone.now() - timedelta(seconds=90))
    recover_lost_jobs()
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    assert upload.state == "checked"


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("default/train/0.parquet", "train"),
        ("d/validation_matched/0.parquet", "heldout"),
        ("d/test_mismatched/0.parquet", "test"),
        ("d/val/0.parquet", "heldout"),
        ("d/unsupervised/0.parquet", ""),
    ],
)
def test_the_splits_of_the_hub_are_told_by_their_beginning(path, split):
    from training.datasets.hub import one_configuration, split_of

    assert split_of(path) == split
    assert one_configuration([path]) == ([path] if split else [])
