"""What a file holds is read, or the page says what is not used and what cannot be read."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.browser.upload_page import upload_file

pytestmark = pytest.mark.browser
ROWS = [
    {"question": f"what is {i} and {i}?", "answer": f"{2 * i}", "stars": i % 5} for i in range(12)
]
UNREADABLE = {
    "unquoted keys.jsonl": (b"{a: 1}\n{a: 2}\n", "Line 1: not JSON"),
    "a broken wrapper.json": (b'{"data": [{"a": 1,}, {"a": 2}]}', "Line 1: not JSON"),
    "numbers.json": (b"[1, 2, 3]", "expected a JSON object"),
    "empty objects.jsonl": (b"{}\n{}\n", "no row has a value"),
    "a damaged archive.zip": (b"PK\x03\x04 and no more", "The zip file is damaged"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_rejected_with_its_error(page, instance, name):
    content, message = UNREADABLE[name]
    page.goto(instance.address + "/data/new")
    page.get_by_label("File", exact=True).set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    )
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect(page).to_have_url(re.compile("/data/new$"))
    page.console_errors.clear()  # the browser notes the response with status 400


def test_a_column_that_is_not_used_can_be_used(page, instance):
    rows = [
        {**row, "history": [["hello", "hi"]] if index % 3 else []} for index, row in enumerate(ROWS)
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    upload_file(page, instance, "sums.jsonl", content)
    expect(page.get_by_text("history is not used; 8 of the first 12 rows have one")).to_be_visible()
    expect(page.get_by_text("This mapping is a guess.")).to_be_visible()
    page.get_by_role("button", name=re.compile("Check file")).click()
    expect(page.get_by_text("stars is not used; 12 of 12 rows have one")).to_be_visible()
    page.get_by_role("button", name="Use it as earlier turns?").click()
    expect(page.get_by_label("History")).to_have_value("history")
    expect(page.locator(".turn.assistant", has_text="hi").first).to_be_visible()
    expect(page.get_by_text("history is not used")).to_have_count(0)
    page.get_by_role("button", name=re.compile("Check file")).click()
    page.get_by_role("button", name="Save as a dataset").click()
    expect(page.get_by_text("View training data")).to_be_visible()


def test_a_masked_answer_and_reasoning_are_shown(page, instance):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}?"},
                {"role": "assistant", "content": "wait", "weight": 0},
                {"role": "user", "content": "go on"},
                {"role": "assistant", "content": f"it is {i}", "thinking": "I count."},
            ]
        }
        for i in range(3)
    ]
    upload_file(page, instance, "masked.jsonl", "\n".join(map(json.dumps, rows)).encode())
    expect(page.get_by_text("assistant, not trained").first).to_be_visible()
    expect(page.locator(".turn.reasoning").first).to_contain_text("I count.")
