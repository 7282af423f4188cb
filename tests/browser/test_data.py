"""Data in the browser: every format is uploaded, mapped, cleaned, shown as tokens and swept over;
other users see nothing.
"""

import gzip
import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from playwright.sync_api import expect

from tests import tiny
from tests.browser.instances import sign_in, stop_runs
from tests.browser.launch_page import open_manual_form, wait_for_summary
from tests.browser.upload_page import check_and_save, upload_file

pytestmark = pytest.mark.browser
RECORD_NOTIFICATIONS = """
window.notified = JSON.parse(sessionStorage.getItem("notified") ?? "[]");
window.Notification = class {
    static permission = "granted";
    static requestPermission = async () => "granted";
    constructor(title) {
        window.notified.push(title);
        sessionStorage.setItem("notified", JSON.stringify(window.notified));
    }
};
"""
PAIRS = [(f"turn on lamp {i}", f"lamp {i} is on") for i in range(12)]
MALLORY = """
import django
django.setup()
from training.people.models import User
User.objects.create_user("mallory", password="tulip-river-42")
"""


def to_parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def to_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "messages.jsonl": b"".join(tiny.encode_jsonl(tiny.ROWS)),
    "sharegpt.json": json.dumps(
        [
            {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]}
            for a, b in PAIRS
        ]
    ).encode(),
    "alpaca.jsonl.gz": gzip.compress(
        to_jsonl([{"instruction": a, "input": "", "output": b} for a, b in PAIRS])
    ),
    "pairs.csv": b"question,answer\n" + b"".join(f"{a},{b}\n".encode() for a, b in PAIRS),
    "pairs.tsv": b"prompt\tcompletion\n" + b"".join(f"{a}\t{b}\n".encode() for a, b in PAIRS),
    "pairs.parquet": to_parquet([{"prompt": a, "completion": b} for a, b in PAIRS]),
    "story.txt": "\n\n".join(f"{a}. {b}." for a, b in PAIRS).encode(),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_each_format_is_detected_and_saved(page, instance, name):
    upload_file(page, instance, name, FILES[name])
    expect(page.locator(".turn").first).to_contain_text("lamp")
    check_and_save(page)
    expect(page.get_by_text("training rows")).to_be_visible()


def test_a_file_with_faulty_rows_is_mapped_cleaned_and_launched(page, instance):
    content = (
        b"id,Frage,Antwort\n"
        + b"".join(f"{i},{a},{b}\n".encode() for i, (a, b) in enumerate(PAIRS))
        + b"9,short\n10,,nothing asked\n"
    )
    upload_file(page, instance, "fragen.csv", content)
    expect(page.get_by_text("This mapping is a guess.")).to_be_visible()
    page.get_by_label("Prompt").select_option("Frage")
    page.get_by_label("Completion").select_option("Antwort")
    expect(page.locator(".turn.user").first).to_contain_text("turn on lamp 0")
    page.get_by_role("button", name=re.compile("Check file")).click()
    expect(page.get_by_text("line 14: has 2 fields; the header has 3")).to_be_visible(
        timeout=30_000
    )
    expect(page.get_by_text("line 15: `Frage` is empty")).to_be_visible()
    page.get_by_label("Skip 2 invalid rows").check()
    page.get_by_role("button", name="Save as a dataset").click()
    page.get_by_role("link", name="New run with this").click(timeout=30_000)
    page.get_by_label("Max length").fill("80", timeout=120_000)
    expect(page.locator("#lock-max_length")).to_be_checked()
    expect(page.locator("#summary")).to_contain_text("80 tokens; longest row")
    wait_for_summary(page)
    page.get_by_role("button", name="Start run").click()
    page.wait_for_url(re.compile(r"/runs/\d+$"))
    stop_runs(instance)


def test_the_token_view_shows_trained_masked_and_truncated_tokens(page, instance):
    page.goto(instance.address + "/data/1")
    expect(page.locator(".tokens .t").first).to_be_visible(timeout=60_000)
    expect(page.locator(".tokens .m").first).to_contain_text("<|im_start|>user")
    expect(page.get_by_text("Uses the model's chat template.")).to_be_visible()
    expect(page.locator("[data-histogram] .main-svg").first).to_be_visible()
    page.get_by_label("Train on prompt").check()
    expect(page.locator(".tokens .t").first).to_contain_text("user", timeout=60_000)


def test_a_sweep_is_previewed_launched_and_compared(page, instance):
    open_manual_form(page, instance, "?data=1")
    page.locator("#model").select_option(label="tiny-llama")
    page.get_by_text("Advanced").click()
    for name, value in {
        "rank": "2, 4",
        "alpha": "8",
        "max_steps": "6",
        "max_length": "80",
        "max_tokens_per_batch": "160",
        "eval_steps": "3",
    }.items():
        page.locator(f"[name={name}]").fill(value)
    page.get_by_role("button", name="Start 2 runs").click(timeout=60_000)
    page.wait_for_url(re.compile(r"/sweeps/\d+$"))
    expect(page.locator(".state.finished")).to_have_count(2, timeout=120_000)
    expect(page.get_by_text("Best so far")).to_be_visible()
    for box in page.locator("input[name=run]").all():
        box.check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", name="Compare 2 runs")).to_be_visible()
    expect(page.locator("[data-chart] .scatterlayer .trace").first).to_be_attached(timeout=30_000)
    expect(page.locator("[data-settings] tr:visible")).to_have_count(2)
    page.locator("[data-axis]").select_option("total_tokens")
    assert "axis=total_tokens" in page.url


def test_a_user_outside_the_team_sees_nothing(page, chromium, instance):
    instance.run_python(MALLORY)
    context = chromium.new_context()
    other = context.new_page()
    sign_in(other, instance, "mallory")
    for path, text in (
        ("/", "From data to a better model"),
        ("/data", "No datasets yet"),
        ("/adapters", "adapter"),
    ):
        other.goto(instance.address + path)
        expect(other.get_by_text(text).first).to_be_visible()
        expect(other.get_by_text("Lights")).to_have_count(0)
    for path in ("/runs/1", "/data/1", "/data/uploads/1", "/data/versions/1/trained"):
        assert other.goto(instance.address + path).status == 404
    context.close()


def test_an_upload_over_the_limit_is_rejected_before_sending(page, instance):
    page.goto(instance.address + "/data/new")
    page.evaluate(
        "document.getElementById('new-data').dataset.limit = 10; "
        "document.getElementById('new-data').dataset.limitText = '10 bytes'"
    )
    page.reload()
    page.evaluate("Object.defineProperty(File.prototype, 'size', { get: () => 5e9 })")
    page.get_by_label("File", exact=True).set_input_files(
        {"name": "a.jsonl", "mimeType": "text/plain", "buffer": b"{}"}
    )
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_role("alert")).to_contain_text("The maximum is 2 GiB")


def test_a_file_can_be_dropped_on_the_page(page, instance):
    page.goto(instance.address + "/data/new")
    dropped = page.evaluate_handle(
        "() => { const data = new DataTransfer(); data.items.add(new File(['question,answer\\nlamp "
        "1,on\\nlamp 2,off\\n'], 'lamps.csv')); return data; }"
    )
    page.dispatch_event("[data-drop]", "drop", {"dataTransfer": dropped})
    page.wait_for_url(re.compile(r"/data/uploads/\d+$"))
    expect(page.locator(".turn.user").first).to_contain_text("lamp 1")


def test_an_ended_run_is_notified_once(page, instance):
    page.context.grant_permissions(["notifications"], origin=instance.address)
    page.add_init_script(RECORD_NOTIFICATIONS)
    page.goto(instance.address + "/account")
    page.get_by_role("button", name="Notify me in this browser when a run ends").click()
    expect(page.get_by_role("button", name="Stop notifications in this browser")).to_be_visible()
    settings = {"max_steps": 2, "max_length": 80, "max_tokens_per_batch": 160}
    body = {"model": 1, "data": 1, "name": "Notify", "settings": settings, "accept_warnings": True}
    run = instance.call_api("POST", "/runs", body)["id"]
    instance.wait_for(
        lambda: instance.call_api("GET", f"/runs/{run}")["state"]["state"] == "finished"
    )
    page.wait_for_function("() => window.notified.includes('Finished: Notify')", timeout=90_000)
    page.reload()
    page.wait_for_timeout(1500)
    assert page.evaluate("window.notified").count("Finished: Notify") == 1
