"""A chat template that loops or grows is stopped, wherever it is rendered."""

import resource
import threading
import time

import psutil
import pytest

from tests import tiny
from tests.user_errors import raises_user_error
from training.engine.data import render_limit
from training.engine.data.conversations import encode_row, encode_rows
from training.engine.data.errors import DataError
from training.engine.data.render_limit import RenderLimitExceeded, limit_render, limit_time

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
GROWTH = (
    "{% set ns = namespace(text='x' * 1000) %}{% for a in range(999) %}"
    "{% set ns.text = ns.text ~ 'y' * 4000000 %}{% endfor %}{{ ns.text | length }}"
)
ALLOCATION = "{{ ('x' * 8000000000) | length }}"
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture
def short_limits(monkeypatch):
    monkeypatch.setattr(render_limit, "MAX_SECONDS", 0.6)
    monkeypatch.setattr(render_limit, "MAX_GROWTH_BYTES", 200 * 2**20)
    monkeypatch.setattr(render_limit, "WATCH_SECONDS", 0.05)


@pytest.mark.parametrize(
    "template", [LOOP, GROWTH, ALLOCATION], ids=["loop", "growth", "allocation"]
)
def test_a_template_that_loops_or_grows_is_an_error_of_the_model(short_limits, template):
    tokenizer = tiny.make_tokenizer(template)
    started = time.monotonic()
    with raises_user_error(DataError, code="template_too_slow", field="model"):
        encode_row(tokenizer, ROW, max_length=99)
    assert time.monotonic() - started < 5


def test_rows_cannot_be_left_out_for_a_slow_template(short_limits):
    rows = encode_rows(
        tiny.make_tokenizer(LOOP),
        [ROW] * 1000,
        max_length=99,
        train_on_prompt=False,
        skip_invalid_rows=True,
    )
    with raises_user_error(DataError, code="template_too_slow"):
        list(rows)


def test_the_next_template_of_the_thread_is_rendered(short_limits):
    for template in (LOOP, None, LOOP, None):
        tokenizer = tiny.make_tokenizer(template or tiny.TEMPLATE)
        if template:
            with pytest.raises(DataError):
                encode_row(tokenizer, ROW, max_length=99)
        else:
            assert encode_row(tokenizer, ROW, max_length=99).trained_tokens


def test_only_the_thread_that_takes_too_long_is_stopped(short_limits):
    outcomes = {}

    def spin(name, seconds):
        try:
            with limit_render():
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    pass
            outcomes[name] = "done"
        except RenderLimitExceeded:
            outcomes[name] = "stopped"

    threads = [
        threading.Thread(target=spin, args=arguments)
        for arguments in (("short", 0.1), ("long", 20), ("other", 0.2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert outcomes == {"short": "done", "long": "stopped", "other": "done"}


def test_a_limit_that_expires_around_many_short_renders_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(render_limit, "WATCH_SECONDS", 0.001)
    expired = 0
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            with limit_time(0.005):
                while True:
                    with limit_render():
                        sum(range(200))
        except RenderLimitExceeded:
            expired += 1
        assert not render_limit.watchdog._find_limits(threading.get_ident())
    assert expired > 50
    monkeypatch.setattr(render_limit, "WATCH_SECONDS", 0.05)
    time.sleep(0.2)  # no exception arrives outside of a limit
    assert not render_limit.watchdog.limits
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_template_never_takes_much_memory_and_lifts_its_limit(short_limits):
    before = psutil.Process().memory_info().rss
    for template in (GROWTH, ALLOCATION):
        with pytest.raises(DataError):
            encode_row(tiny.make_tokenizer(template), ROW, max_length=99)
    assert psutil.Process().memory_info().rss - before < 500 * 2**20
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("expression", ["1 / 0", "'x' * (2 ** 70)", "none.a.b"])
def test_an_error_of_a_template_is_an_error_of_the_row(expression):
    with raises_user_error(DataError, code="template_error"):
        encode_row(tiny.make_tokenizer(f"{{{{ {expression} }}}}"), ROW, max_length=99)
