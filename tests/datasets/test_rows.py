import json

import pytest

from training.datasets.rows import MAX_LINE_BYTES, BadRow, parse_line


def line(value):
    return json.dumps(value).encode()


def test_messages_and_pairs_are_read():
    assert parse_line(line({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})).messages[
        1
    ] == {
        "role": "assistant",
        "content": "b",
    }
    pair = parse_line(line({"prompt": "a", "completion": "b"}))
    assert [message["role"] for message in pair.messages] == ["user", "assistant"]


def test_a_named_split_is_kept():
    assert parse_line(line({"prompt": "a", "completion": "b", "split": "valid"})).split == "heldout"


ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{nope}", "not JSON: Expecting property name enclosed in double quotes at character 2"),
        (b"[1]", "expected a JSON object"),
        (b'"\xff"', "byte 2 is not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "the key `prompt` stands there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (line({"text": "a"}), "expected `messages`, or `prompt` and `completion`; found 'text'"),
        (line({}), "found no keys"),
        (line({"messages": []}), "at least one message"),
        (line({"messages": "hi"}), "`messages` must be a list"),
        (line({"messages": [3]}), "message 1 must be an object"),
        (
            line({"messages": [{"role": "bot", "content": "a"}]}),
            '`role` is "bot"; expected system, user or assistant',
        ),
        (line({"messages": [{"content": "a"}]}), "`role` is missing"),
        (
            line({"messages": [{"role": "user", "content": None}, ANSWER]}),
            "message 1: `content` is missing; expected text",
        ),
        (line({"messages": [{"role": "user", "content": "a"}]}), "no assistant message"),
        (
            line({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}),
            "assistant is empty",
        ),
        (
            line({"messages": [ANSWER, {"role": "system", "content": "a"}]}),
            "`system` message must come first",
        ),
        (line({"prompt": "a"}), "`completion` must be text"),
        (line({"prompt": "a", "completion": "b", "split": "dev"}), "expected train, valid or test"),
        (line({"prompt": "a\0", "completion": "b"}), "message 1: `content` holds a NUL character"),
        (line({"prompt": "a", "completion": "b", "split": ["train"]}), "expected train, valid or test"),
        (b"{" + b",".join(b'"k%d": 1' % i for i in range(100_000)) + b"}", "expected `messages`"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "half a character"),
        (b"x" * (MAX_LINE_BYTES + 1), "more than 4 MiB"),
    ],
)
def test_a_faulty_line_is_told_with_its_reason(raw, words):
    with pytest.raises(BadRow) as caught:
        parse_line(raw)
    assert words in caught.value.message
