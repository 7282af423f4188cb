"""Actions on the page that uploads data."""

import re

from playwright.sync_api import expect


def upload_file(page, instance, name, content):
    page.goto(instance.address + "/data/new")
    page.get_by_label("File", exact=True).set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    )
    page.get_by_role("button", name="Upload").click()
    page.wait_for_url(re.compile(r"/data/uploads/\d+$"))


def check_and_save(page):
    page.get_by_role("button", name=re.compile("Check file")).click()
    page.get_by_role("button", name="Save as a dataset").click(timeout=30_000)
    expect(page.get_by_text("View training data")).to_be_visible(timeout=30_000)
