"""From a file to an immutable version: checked, split, deduplicated, and nothing left behind when
it fails.
"""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from tests import tiny
from training.datasets import services, uploads
from training.datasets.build import BuildOptions
from training.datasets.examples import EXAMPLES, add_example
from training.datasets.models import Dataset, DatasetVersion, Upload
from training.datasets.preview import get_random_prompt, load_turns
from training.datasets.upload_job import UPLOAD_JOB, create_dataset
from training.datasets.uploads import BadData, receive_files
from training.errors import Conflict, NotAllowed, UserError
from training.jobs.models import Job
from training.jobs.recovery import recover_lost_jobs
from training.jobs.runner import run_lane

pytestmark = pytest.mark.django_db


@pytest.fixture
def make_upload(alice, tmp_path):
    """Receives files, given as content by name; `heldout` is a file of held-out rows."""

    def receive(name="lights.jsonl", content=None, heldout=None, **more):
        files = [(tmp_path / "in", name, "")]
        files[0][0].write_bytes(
            b"".join(tiny.encode_jsonl(tiny.ROWS)) if content is None else content
        )
        if heldout is not None:
            files.append((tmp_path / "held", "held.jsonl", "eval"))
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
def test_it_works(make_upload):
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


def test_the_same_content_is_the_same_version_and_the_split_is_drawn_by_its_seed(make_upload):
    first, again = (
        save_upload(check_upload(make_upload())),
        save_upload(check_upload(make_upload())),
    )
    other = save_upload(check_upload(make_upload()), seed=7)
    assert first.digest == again.digest != other.digest


def test_a_share_of_ones_own_is_held_out(make_upload):
    version = save_upload(check_upload(make_upload()), eval_share=0.25)
    assert version.eval_rows == 6
    assert not set(read_lines(version, "train")) & set(read_lines(version, "eval"))


def test_a_file_of_ones_own_is_held_out_and_rows_that_stand_in_both_leave_training(make_upload):
    eval_content = b"".join(tiny.encode_jsonl(tiny.ROWS[:3]))
    version = save_upload(check_upload(make_upload(heldout=eval_content)))
    assert (version.train_rows, version.eval_rows) == (len(tiny.ROWS) - 3, 3)
    assert version.report["dropped"]["in_both"] == 3
    assert not set(read_lines(version, "train")) & set(read_lines(version, "eval"))


def test_a_column_says_the_split(make_upload):
    rows = [
        {**row, "part": "test" if i < 2 else "valid" if i < 5 else "train"}
        for i, row in enumerate(tiny.ROWS)
    ]
    upload = make_upload(content=b"".join(tiny.encode_jsonl(rows)))
    uploads.set_mapping(upload, {**upload.mapping, "split": "part"})
    version = save_upload(check_upload(upload))
    assert (version.test_rows, version.eval_rows) == (2, 3)


def test_repeated_rows_are_counted_stay_on_one_side_and_can_be_dropped(make_upload):
    content = b"".join(tiny.encode_jsonl(tiny.ROWS * 3))
    upload = check_upload(make_upload(content=content))
    assert upload.report["same"] == 2 * len(tiny.ROWS)
    version = save_upload(upload, eval_share=0.2)
    assert not set(read_lines(version, "train")) & set(read_lines(version, "eval"))
    assert save_upload(check_again(upload), drop_duplicates=True).rows == len(tiny.ROWS)


def test_rows_that_look_alike_are_counted_and_can_be_dropped_and_leaks_are_told(make_upload):
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
    assert upload.report["alike"] == 1
    assert upload.report["alike_shown"] == [["line 1", "line 2"]]
    assert save_upload(upload, drop_near_duplicates=True).rows == len(rows) - 1
    rows[1] = {
        **tiny.make_row(rows[0]["messages"][0]["content"], "another answer"),
        "split": "valid",
    }
    leaking = save_upload(check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows)))))
    assert leaking.report["leaks"]["prompts"] == 1


def test_every_faulty_row_is_named_grouped_and_counted_and_can_be_left_out(make_upload, alice):
    bad = [b'{"messages": [{"role": "bot%d", "content": "a"}]}\n' % i for i in range(150)]
    upload = check_upload(
        make_upload(
            content=b"".join([*tiny.encode_jsonl(tiny.ROWS[:4]), b"\n", *bad, b"nonsense\n"])
        )
    )
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
        uploads.request_save(upload, BuildOptions(), skip_faulty=False)
    assert Dataset.objects.count() == 0
    version = save_upload(upload, skip_faulty=True)
    assert (version.rows, version.skipped_rows) == (4, 151)


def test_a_wrong_guess_is_corrected_as_a_new_version_and_the_first_one_stays(make_upload):
    content = b"id,Frage,Antwort\n" + b"".join(
        b"n%d,what is %d,%d it is\n" % (i, i, i) for i in range(9)
    )
    upload = make_upload("fragen.csv", content)
    assert upload.mapping["columns"] == {"prompt": "id", "completion": "Frage"}
    first = save_upload(check_upload(upload))
    uploads.reset_to_mapping(upload)
    uploads.set_mapping(
        upload, {"row_format": "pairs", "columns": {"prompt": "Frage", "completion": "Antwort"}}
    )
    second = save_upload(check_upload(upload))
    assert (second.dataset, second.number, first.number) == (first.dataset, 2, 1)
    assert first.digest != second.digest
    assert first.split_path("train").exists()


def test_too_few_rows_are_refused_when_they_are_saved(make_upload):
    upload = check_upload(make_upload(content=tiny.encode_jsonl(tiny.ROWS)[0]))
    uploads.request_save(upload, BuildOptions(), skip_faulty=False)
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    assert upload.state == "failed"
    assert "at least 2 different ones are needed" in upload.error


@pytest.mark.own_process
def test_a_file_that_breaks_off_fails_with_its_sentence(make_upload):
    import gzip

    upload = check_upload(
        make_upload("x.jsonl.gz", gzip.compress(b"".join(tiny.encode_jsonl(tiny.ROWS)))[:-9])
    )
    assert (upload.state, "cut off or damaged" in upload.error) == ("failed", True)


def test_a_job_is_done_once(make_upload):
    upload = make_upload()
    uploads.request_job(upload, "check")
    with pytest.raises(Conflict):
        uploads.request_job(upload, "check")
    run_lane(UPLOAD_JOB.lane)
    run_lane(UPLOAD_JOB.lane)
    with pytest.raises(Conflict, match="Check the file first"):
        uploads.request_save(make_upload(), BuildOptions(), skip_faulty=False)


@pytest.mark.parametrize(
    ("choices", "field"), [({"eval_share": 1.5}, "eval_share"), ({"seed": -1}, "seed")]
)
def test_choices_that_cannot_be_are_refused(choices, field):
    with pytest.raises(UserError) as caught:
        BuildOptions(**choices)
    assert caught.value.field == field


def test_insights_tell_languages_labels_secrets_and_private_addresses(make_upload):
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
    assert [label["words"] for label in insights["labels"]] == ["yes", "no"]
    assert insights["secrets"] == {
        "count": 1,
        "shown": [{"place": "line 6", "words": "AWS Access Key"}],
    }
    assert insights["addresses"]["shown"] == [{"place": "line 7", "words": "ja…@thefirm.io"}]
    assert "AKIA" not in json.dumps(insights)


def test_deleting_asks_for_the_name_and_frees_the_disk(make_upload, alice, people):
    version = save_upload(check_upload(make_upload()))
    folders = [version.split_path("train").parent, version.upload.folder]
    with pytest.raises(UserError, match="Type the name lights"):
        services.delete_dataset(alice, version.dataset, "light")
    with pytest.raises(NotAllowed):
        services.delete_dataset(people["bob"], version.dataset, "lights")
    assert services.delete_dataset(alice, version.dataset, "lights") > 0
    assert not any(folder.exists() for folder in folders)
    assert not Upload.objects.exists()


def test_files_that_another_set_shares_stay(make_upload, alice):
    first, second = (
        save_upload(check_upload(make_upload())),
        save_upload(check_upload(make_upload())),
    )
    services.delete_dataset(alice, first.dataset, "lights")
    assert second.split_path("train").exists()


def test_data_that_a_run_was_trained_on_cannot_be_deleted(run, alice):
    with pytest.raises(Conflict, match="trained on by 1 run"):
        services.delete_dataset(alice, run.data.dataset, "Lights")


@pytest.mark.parametrize(
    ("key", "train", "heldout", "test"),
    [("smart_home", 2322, 148, 488), ("shell_commands", 924, 80, 200)],
)
def test_examples_come_with_one_click_and_only_once(alice, key, train, heldout, test):
    version = add_example(alice, key)
    assert (version.train_rows, version.eval_rows, version.test_rows) == (train, heldout, test)
    assert add_example(alice, key) == version
    assert f"{train:,}" in EXAMPLES[key].description
    assert version.dataset.license


def test_faulty_lines_of_trusted_data_are_refused(alice):
    with pytest.raises(BadData):
        create_dataset(alice, "Bad", [*tiny.encode_jsonl(tiny.ROWS[:3]), b"nonsense\n"], source="x")
    assert DatasetVersion.objects.count() == 0


def test_a_random_row_was_not_trained_on(data):
    row = get_random_prompt(data)
    trained = [turns[0]["content"] for turns in load_turns(data, "train", 0, 100)]
    assert row["messages"][-1]["content"] not in trained
    assert row["expected"]


def test_plain_text_is_a_version_too(make_upload):
    version = save_upload(
        check_upload(
            make_upload(
                "story.txt", b"\n\n".join(b"Once there was a lamp number %d." % i for i in range(8))
            )
        )
    )
    assert json.loads(read_lines(version, "train")[0])["text"].startswith("Once there")
    assert get_random_prompt(version)["expected"]


def test_the_child_reads_with_no_secret_in_its_environment(make_upload, monkeypatch):
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


def test_dropping_repeats_and_look_alikes_never_touches_what_is_held_out(make_upload):
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
    assert version.report["leaks"]["alike"] == 0


def test_one_row_without_a_split_does_not_stop_the_draw(make_upload):
    rows = [{**row, "split": "train"} for row in tiny.ROWS[:-1]] + [tiny.ROWS[-1]]
    assert (
        save_upload(check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows))))).eval_rows
        == 1
    )


def test_prompts_that_differ_in_a_sign_are_no_leak(make_upload):
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
    assert [one["place"] for one in secrets["shown"]] == [
        f"line {len(rows) - 1}",
        f"line {len(rows)}",
    ]


def test_names_that_cannot_be_stored_are_no_columns_and_no_fault_of_the_page(make_upload):
    rows = [
        {"pro\x00mpt": "a", "q\ud800": "x", "prompt": "b", "completion": f"c{i}"} for i in range(4)
    ]
    rows.append({"prompt": "a", "completion": ["\ud800"]})
    upload = check_upload(make_upload(content=b"".join(tiny.encode_jsonl(rows))))
    assert upload.mapping["columns"] == {"prompt": "prompt", "completion": "completion"}
    assert upload.report["problems"]["shown"][0].encode()


def test_a_file_that_could_not_be_read_to_its_end_says_so(make_upload):
    content = b"prompt,completion\n" + b"a,b\n" * 9 + b'c,"never closed\n' + b"d,e\n" * 50
    upload = check_upload(make_upload("x.csv", content))
    assert upload.report["problems"]["unread"] == "line 11"
    with pytest.raises(BadData, match="could not be read to its end"):
        uploads.request_save(upload, BuildOptions(), skip_faulty=False)


def test_an_upload_that_is_thrown_away_while_it_is_read_is_gone(make_upload, alice, monkeypatch):
    upload = make_upload()
    uploads.request_job(upload, "check")

    def discard_midway(*_args, **_kwargs):
        services.discard_upload(alice, upload)
        yield {"alive": True}
        raise AssertionError("the program was followed on")

    monkeypatch.setattr("training.jobs.runner.stream_child", discard_midway)
    folder = upload.folder
    run_lane(UPLOAD_JOB.lane)
    assert not Upload.objects.exists()
    assert not folder.exists()


def test_whatever_breaks_in_the_worker_is_told_on_the_upload(make_upload, monkeypatch):
    def fail_disk_full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.jobs.runner.stream_child", fail_disk_full)
    upload = check_upload(make_upload())
    assert (upload.state, upload.error) == ("failed", "It could not be read (OSError).")


def test_a_data_set_is_not_deleted_under_a_worker_and_no_longer_ones_own_takes_no_version(
    make_upload, alice, people
):
    version = save_upload(check_upload(make_upload()))
    other = make_upload(dataset=version.dataset)
    uploads.request_job(other, "check")
    with pytest.raises(Conflict, match="is being read"):
        services.delete_dataset(alice, version.dataset, "lights")
    run_lane(UPLOAD_JOB.lane)
    version.dataset.owner, version.dataset.team = people["mallory"], None
    version.dataset.save()
    other = Upload.objects.get(pk=other.pk)
    with pytest.raises(NotAllowed):
        uploads.request_save(other, BuildOptions(), skip_faulty=False)


def test_an_upload_whose_worker_died_is_read_again(make_upload):
    upload = make_upload()
    uploads.request_job(upload, "check")
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
        ("d/validation_matched/0.parquet", "eval"),
        ("d/test_mismatched/0.parquet", "test"),
        ("d/val/0.parquet", "eval"),
        ("d/unsupervised/0.parquet", ""),
    ],
)
def test_the_splits_of_the_hub_are_told_by_their_beginning(path, split):
    from training.datasets.hub import select_configuration, split_from_path

    assert split_from_path(path) == split
    assert select_configuration([path]) == ([path] if split else [])
