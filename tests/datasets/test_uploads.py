"""Uploads become immutable versions: checked, split and deduplicated, with nothing left behind on
failure.
"""

import errno
import json
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from tests import tiny
from tests.user_errors import raises_user_error
from training.datasets import services, uploads
from training.datasets.build import BuildOptions
from training.datasets.examples import EXAMPLES, add_example
from training.datasets.models import Dataset, DatasetVersion, Upload
from training.datasets.preview import get_random_prompt, load_turns
from training.datasets.upload_job import UPLOAD_JOB, create_dataset
from training.datasets.uploads import BadData, receive_files
from training.errors import Conflict, NotAllowed
from training.jobs.models import Job
from training.jobs.recovery import recover_lost_jobs
from training.jobs.runner import run_lane

pytestmark = pytest.mark.django_db


@pytest.fixture
def make_upload(alice, tmp_path):
    """Creates uploads from content; `heldout` is the content of a second file with held-
    out rows.
    """

    def receive(name="lights.jsonl", content=None, heldout=None, **more):
        files = [(tmp_path / "in", name, "")]
        files[0][0].write_bytes(
            b"".join(tiny.encode_jsonl(tiny.ROWS)) if content is None else content
        )
        if heldout is not None:
            files.append((tmp_path / "eval", "eval.jsonl", "eval"))
            files[1][0].write_bytes(heldout)
        return receive_files(alice, files, name="", source=f"upload: {name}", **more)

    return receive


def check_upload(upload):
    uploads.request_job(upload, "check")
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    return upload


def check_again(upload):
    uploads.reset_to_mapping(upload)
    return check_upload(upload)


def save_upload(upload, *, skip_faulty=False, **choices):
    uploads.request_save(upload, BuildOptions(**choices), skip_faulty=skip_faulty)
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    assert upload.state == "done", upload.error
    return upload.versions.latest("number")


def read_lines(version, split):
    return version.split_path(split).read_text().splitlines()


@pytest.mark.own_process
def test_an_upload_is_checked_and_saved_as_a_version(make_upload):
    upload = check_upload(make_upload())
    assert (upload.state, upload.report["rows"], upload.report["problems"]["count"]) == (
        "checked",
        len(tiny.ROWS),
        0,
    )
    version = save_upload(upload)
    assert version.dataset.name == "lights"
    assert version.train_rows + version.eval_rows == len(tiny.ROWS)
    assert len(read_lines(version, "train")) == version.train_rows
    assert json.loads(read_lines(version, "train")[0])["messages"][0] in [
        row["messages"][0] for row in tiny.ROWS
    ]


def test_the_digest_depends_on_the_content_and_the_split_seed(make_upload):
    first, again = (
        save_upload(check_upload(make_upload())),
        save_upload(check_upload(make_upload())),
    )
    other = save_upload(check_upload(make_upload()), seed=7)
    assert first.digest == again.digest != other.digest


def test_the_held_out_share_can_be_set(make_upload):
    version = save_upload(check_upload(make_upload()), eval_share=0.25)
    assert version.eval_rows == 6
    assert not set(read_lines(version, "train")) & set(read_lines(version, "eval"))


def test_rows_of_the_held_out_file_are_removed_from_training(make_upload):
    eval_content = b"".join(tiny.encode_jsonl(tiny.ROWS[:3]))
    version = save_upload(check_upload(make_upload(heldout=eval_content)))
    assert (version.train_rows, version.eval_rows) == (len(tiny.ROWS) - 3, 3)
    assert version.report["dropped"]["cross_split"] == 3
    assert not set(read_lines(version, "train")) & set(read_lines(version, "eval"))


def test_a_column_can_name_the_split(make_upload):
    rows = [
        {**row, "part": "test" if i < 2 else "valid" if i < 5 else "train"}
        for i, row in enumerate(tiny.ROWS)
    ]
    upload = make_upload(content=b"".join(tiny.encode_jsonl(rows)))
    uploads.set_mapping(upload, {**upload.mapping, "split": "part"})
    version = save_upload(check_upload(upload))
    assert (version.test_rows, version.eval_rows) == (2, 3)


def test_duplicates_are_counted_share_a_split_and_can_be_dropped(make_upload):
    content = b"".join(tiny.encode_jsonl(tiny.ROWS * 3))
    upload = check_upload(make_upload(content=content))
    assert upload.report["duplicates"] == 2 * len(tiny.ROWS)
    version = save_upload(upload, eval_share=0.2)
    assert not set(read_lines(version, "train")) & set(read_lines(version, "eval"))
    assert save_upload(check_again(upload), drop_duplicates=True).rows == len(tiny.ROWS)


def test_near_duplicates_and_leaks_are_counted_and_near_duplicates_can_be_dropped(make_upload):
    text = (
        "please would you be so kind as to turn the lamp in the long hall beside the old "
        "kitchen stairs on for me now and then"
    )
    rows = [
        tiny.make_row(
            f"{text} number {'x' * i} today", "done and all is well in this house tonight"
        )
        for i in range(2)
    ] + tiny.ROWS
    upload = check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows))))
    assert upload.report["near_duplicates"] == 1
    assert upload.report["near_duplicate_examples"] == [["line 1", "line 2"]]
    assert save_upload(upload, drop_near_duplicates=True).rows == len(rows) - 1
    rows[1] = {
        **tiny.make_row(rows[0]["messages"][0]["content"], "another answer"),
        "split": "valid",
    }
    leaking = save_upload(check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows)))))
    assert leaking.report["leaks"]["prompts"] == 1


def test_invalid_rows_are_listed_grouped_and_counted_and_can_be_skipped(make_upload, alice):
    bad = [b'{"messages": [{"role": "bot%d", "content": "a"}]}\n' % i for i in range(150)]
    upload = check_upload(
        make_upload(
            content=b"".join([*tiny.encode_jsonl(tiny.ROWS[:4]), b"\n", *bad, b"nonsense\n"])
        )
    )
    problems = upload.report["problems"]
    assert problems["count"] == 151
    assert len(problems["messages"]) == 100
    assert (
        problems["messages"][0]
        == "line 6, message 1: `role` is `bot0`; expected system, user, assistant or tool"
    )
    assert [group["count"] for group in problems["groups"]] == [150, 1]
    with raises_user_error(BadData, code="invalid_rows", naming=("151 of 155",)):
        uploads.request_save(upload, BuildOptions(), skip_faulty=False)
    assert Dataset.objects.count() == 0
    version = save_upload(upload, skip_faulty=True)
    assert (version.rows, version.skipped_rows) == (4, 151)


def test_a_corrected_mapping_is_saved_as_a_new_version(make_upload):
    content = b"Thema,Frage,Antwort\n" + b"".join(
        b"n%d,what is %d,%d it is\n" % (i, i, i) for i in range(9)
    )
    upload = make_upload("fragen.csv", content)
    assert upload.mapping["columns"] == {"prompt": "Thema", "completion": "Frage"}
    first = save_upload(check_upload(upload))
    uploads.reset_to_mapping(upload)
    uploads.set_mapping(
        upload, {"row_format": "pairs", "columns": {"prompt": "Frage", "completion": "Antwort"}}
    )
    second = save_upload(check_upload(upload))
    assert (second.dataset, second.number, first.number) == (first.dataset, 2, 1)
    assert first.digest != second.digest
    assert first.split_path("train").exists()


def test_saving_a_single_row_fails(make_upload):
    upload = check_upload(make_upload(content=tiny.encode_jsonl(tiny.ROWS)[0]))
    uploads.request_save(upload, BuildOptions(), skip_faulty=False)
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    assert upload.state == "failed"
    assert "at least 2 different rows" in upload.error


@pytest.mark.own_process
def test_the_check_of_a_truncated_gzip_file_fails(make_upload):
    import gzip

    upload = check_upload(
        make_upload("x.jsonl.gz", gzip.compress(b"".join(tiny.encode_jsonl(tiny.ROWS)))[:-9])
    )
    assert (upload.state, "truncated or corrupt" in upload.error) == ("failed", True)


def test_a_job_is_enqueued_once_and_saving_needs_a_check(make_upload):
    upload = make_upload()
    uploads.request_job(upload, "check")
    with raises_user_error(Conflict, code="already_enqueued"):
        uploads.request_job(upload, "check")
    run_lane(UPLOAD_JOB.lane)
    run_lane(UPLOAD_JOB.lane)
    with raises_user_error(Conflict, code="not_checked"):
        uploads.request_save(make_upload(), BuildOptions(), skip_faulty=False)


@pytest.mark.parametrize(
    ("choices", "field"), [({"eval_share": 1.5}, "eval_share"), ({"seed": -1}, "seed")]
)
def test_build_options_out_of_range_are_rejected(choices, field):
    with raises_user_error(field=field):
        BuildOptions(**choices)


def test_insights_list_languages_labels_secrets_and_private_addresses(make_upload):
    rows = [
        tiny.make_row(
            f"Is this sentence number {i} a friendly one or is it not, please?",
            "yes" if i % 3 else "no",
        )
        for i in range(40)
    ]
    rows[5] = tiny.make_row("my key is AKIAIOSFODNN7EXAMPLQ, keep it safe", "yes")
    rows[6] = tiny.make_row("write to jane.roe@thefirm.io or to support@thefirm.io about it", "no")
    insights = check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows)))).report[
        "insights"
    ]
    assert insights["languages"][0]["name"] == "en"
    assert [label["label"] for label in insights["labels"]] == ["yes", "no"]
    assert insights["secrets"] == {
        "count": 1,
        "examples": [{"location": "line 6", "description": "AWS Access Key"}],
    }
    assert insights["addresses"]["examples"] == [
        {"location": "line 7", "description": "ja…@thefirm.io"}
    ]
    assert "AKIA" not in json.dumps(insights)


def test_deleting_a_data_set_needs_its_name_and_frees_the_disk(make_upload, alice, people):
    version = save_upload(check_upload(make_upload()))
    folders = [version.split_path("train").parent, version.upload.folder]
    with raises_user_error(field="name", naming=("lights",)):
        services.delete_dataset(alice, version.dataset, "light")
    with pytest.raises(NotAllowed):
        services.delete_dataset(people["bob"], version.dataset, "lights")
    assert services.delete_dataset(alice, version.dataset, "lights") > 0
    assert not any(folder.exists() for folder in folders)
    assert not Upload.objects.exists()


def test_deleting_keeps_files_that_another_data_set_shares(make_upload, alice):
    first, second = (
        save_upload(check_upload(make_upload())),
        save_upload(check_upload(make_upload())),
    )
    services.delete_dataset(alice, first.dataset, "lights")
    assert second.split_path("train").exists()


def test_data_used_by_a_run_cannot_be_deleted(run, alice):
    with raises_user_error(Conflict, code="in_use", naming=("1 run",)):
        services.delete_dataset(alice, run.data.dataset, "Lights")


@pytest.mark.parametrize(
    ("key", "train", "heldout", "test"),
    [("smart_home", 2322, 148, 488), ("shell_commands", 924, 80, 200)],
)
def test_an_example_is_added_only_once(alice, key, train, heldout, test):
    version = add_example(alice, key)
    assert (version.train_rows, version.eval_rows, version.test_rows) == (train, heldout, test)
    assert add_example(alice, key) == version
    assert f"{train:,}" in EXAMPLES[key].description
    assert version.dataset.license


def test_invalid_rows_of_trusted_data_are_rejected(alice):
    with pytest.raises(BadData):
        create_dataset(alice, "Bad", [*tiny.encode_jsonl(tiny.ROWS[:3]), b"nonsense\n"], source="x")
    assert DatasetVersion.objects.count() == 0


def test_a_random_row_was_not_trained_on(data):
    row = get_random_prompt(data)
    trained = [turns[0]["content"] for turns in load_turns(data, "train", 0, 100)]
    assert row["messages"][-1]["content"] not in trained
    assert row["expected"]


def test_plain_text_can_be_saved_as_a_version(make_upload):
    version = save_upload(
        check_upload(
            make_upload(
                "story.txt", b"\n\n".join(b"Once there was a lamp number %d." % i for i in range(8))
            )
        )
    )
    assert json.loads(read_lines(version, "train")[0])["text"].startswith("Once there")
    assert get_random_prompt(version)["expected"]


def test_the_upload_program_gets_no_secrets_in_its_environment(make_upload, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    child_environment = {}
    monkeypatch.setattr(
        "training.jobs.runner.stream_child",
        lambda *a, environment, **k: (
            child_environment.update(environment) or iter([{"error": "x"}])
        ),
    )
    check_upload(make_upload())
    assert not {"DATABASE_URL", "HF_TOKEN", "SECRET_KEY"} & set(child_environment)


def test_the_folder_of_an_upload_is_named_by_its_number_alone(make_upload, settings):
    upload = make_upload("../../etc/passwd.jsonl")
    assert upload.folder == Path(settings.HOME) / "uploads" / str(upload.pk)
    assert sorted(path.name for path in upload.folder.iterdir()) == [
        "0",
        "params.json",
        "sample.json",
    ]


def test_dropping_duplicates_never_removes_held_out_rows(make_upload):
    text = (
        "please would you be so kind as to turn the lamp in the long hall beside the old "
        "kitchen stairs on for me now and then"
    )
    similar_rows = [
        tiny.make_row(
            f"{text} number {'x' * i} today", "done and all is well in this house tonight"
        )
        for i in range(4)
    ]
    eval_content = b"".join(tiny.encode_jsonl([*tiny.ROWS[:3], similar_rows[3]]))
    version = save_upload(
        check_upload(
            make_upload(
                content=b"".join(tiny.encode_jsonl(tiny.ROWS + similar_rows[:3])),
                heldout=eval_content,
            )
        ),
        drop_duplicates=True,
        drop_near_duplicates=True,
    )
    assert version.eval_rows == 4
    assert version.train_rows == len(tiny.ROWS) - 3
    assert version.report["leaks"]["near_duplicates"] == 0


def test_held_out_rows_are_drawn_when_only_one_row_has_no_split(make_upload):
    rows = [{**row, "split": "train"} for row in tiny.ROWS[:-1]] + [tiny.ROWS[-1]]
    assert (
        save_upload(check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows))))).eval_rows
        == 1
    )


def test_prompts_that_differ_in_one_character_are_not_leaks(make_upload):
    rows = [tiny.make_row(f"{i} + 4 =", str(i + 4)) for i in range(20)] + [
        {**tiny.make_row("3 - 4 =", "-1"), "split": "valid"}
    ]
    assert (
        save_upload(check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows))))).report[
            "leaks"
        ]["prompts"]
        == 0
    )


def test_secrets_are_found_in_system_prompts_and_tool_calls_too(make_upload):
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
    secrets = check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows)))).report[
        "insights"
    ]["secrets"]
    assert [example["location"] for example in secrets["examples"]] == [
        f"line {len(rows) - 1}",
        f"line {len(rows)}",
    ]


def test_columns_with_unsupported_names_are_ignored(make_upload):
    rows = [
        {"pro\x00mpt": "a", "q\ud800": "x", "prompt": "b", "completion": f"c{i}"} for i in range(4)
    ]
    rows.append({"prompt": "a", "completion": ["\ud800"]})
    upload = check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows))))
    assert upload.mapping["columns"] == {"prompt": "prompt", "completion": "completion"}
    assert upload.report["problems"]["messages"][0].encode()


def test_the_report_names_the_line_after_which_nothing_was_read(make_upload):
    content = b"prompt,completion\n" + b"a,b\n" * 9 + b'c,"never closed\n' + b"d,e\n" * 50
    upload = check_upload(make_upload("x.csv", content))
    assert upload.report["problems"]["unread_after"] == "line 11"
    with raises_user_error(BadData, code="invalid_rows", naming=("end of the file",)):
        uploads.request_save(upload, BuildOptions(), skip_faulty=False)


def test_an_upload_discarded_during_its_check_is_deleted(make_upload, alice, monkeypatch):
    upload = make_upload()
    uploads.request_job(upload, "check")

    def discard_midway(*_args, **_kwargs):
        services.discard_upload(alice, upload)
        yield {"alive": True}
        raise AssertionError("the messages of the program were read on")

    monkeypatch.setattr("training.jobs.runner.stream_child", discard_midway)
    folder = upload.folder
    run_lane(UPLOAD_JOB.lane)
    assert not Upload.objects.exists()
    assert not folder.exists()


def test_an_error_in_the_worker_fails_the_upload(make_upload, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("training.jobs.runner.stream_child", fail)
    upload = check_upload(make_upload())
    assert (upload.state, upload.error) == ("failed", "The file could not be read (OSError).")


def test_a_busy_data_set_is_not_deleted_and_a_foreign_one_gets_no_version(
    make_upload, alice, people
):
    version = save_upload(check_upload(make_upload()))
    other = make_upload(dataset=version.dataset)
    uploads.request_job(other, "check")
    with raises_user_error(Conflict, code="busy"):
        services.delete_dataset(alice, version.dataset, "lights")
    run_lane(UPLOAD_JOB.lane)
    version.dataset.owner, version.dataset.team = people["mallory"], None
    version.dataset.save()
    other = Upload.objects.get(pk=other.pk)
    with pytest.raises(NotAllowed):
        uploads.request_save(other, BuildOptions(), skip_faulty=False)


def test_an_upload_whose_worker_died_is_checked_again(make_upload):
    upload = make_upload()
    uploads.request_job(upload, "check")
    Upload.objects.update(state="working")
    Job.objects.update(state="running", heartbeat_at=timezone.now() - timedelta(seconds=90))
    recover_lost_jobs()
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    assert upload.state == "checked"


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("default/train/0.parquet", "train"),
        ("d/validation_matched/0.parquet", "eval"),
        ("d/test_mismatched/0.parquet", "test"),
        ("d/val/0.parquet", "eval"),
        ("d/unsupervised/0.parquet", ""),
    ],
)
def test_splits_of_hub_files_are_detected_by_their_prefix(path, split):
    from training.datasets.hub import select_configuration, split_from_path

    assert split_from_path(path) == split
    assert select_configuration([path]) == ([path] if split else [])
