"""A guess that may be wrong is never certain: the user is asked before anything is trained."""

import json

import pytest

from tests.datasets.files import detect
from training.datasets.mapping_guess import guess_mapping

PAIR = {"prompt": "name a river", "completion": "Rhine"}


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Translate to German", "source": "dog", "target": "Hund"},
        {"instruction": "Classify the mood", "text": "good film", "label": "pos"},
        {"source": "en", "text": "hello", "label": "greeting"},
        {"question": "What is the capital?", "country": "France", "answer": "Paris"},
        {"question": "q?", "A": "a", "B": "b", "answer": "A"},
        {"question": "What is 2+2?", "final_answer": 4},
        {"text": "a good film", "sentiment": "positive"},
        {"text": "a good film", "category": "positive"},
    ],
)
def test_a_short_column_that_may_decide_the_answer_is_asked_about(record):
    assert not guess_mapping([record]).is_certain


@pytest.mark.parametrize(
    "column",
    [
        *({name: False} for name in ("is_correct", "passed", "desirable")),
        {"correct": 0},
        {"winner": "b"},
        {"weight": 0},
        {"train": False},
        {"response_bad": "Alps"},
        {"negative": "Alps"},
        {"wrong_answer": "Alps"},
    ],
    ids=lambda column: next(iter(column)),
)
def test_a_column_that_says_that_an_answer_is_bad_is_asked_about(column):
    mapping = guess_mapping([PAIR | column])
    assert not mapping.is_certain and f"`{next(iter(column))}`" in mapping.note


@pytest.mark.parametrize(
    "columns",
    [
        {"id": 7, "url": "https://example.org/a"},
        {"source": "https://example.org/a"},
        {"conversation_hash": "0f3a", "created_at": "2024-01-01", "num_tokens": 9},
        {"Unnamed: 0": 3, "model": "small-1"},
    ],
    ids=str,
)
def test_metadata_is_not_asked_about(columns):
    assert guess_mapping([PAIR | columns]).is_certain


@pytest.mark.parametrize(
    "column",
    [
        {"language": "French"},
        {"instructions": "Answer only in French rhymes."},
        {"documents": ["the Rhine floods"]},
        {"tool_definitions": [{"name": "lamp"}]},
        {"schema": "CREATE TABLE rivers (name TEXT)"},
    ],
    ids=lambda column: next(iter(column)),
)
def test_a_column_that_is_set_in_some_rows_is_asked_about_even_if_it_has_one_value(column):
    rows = [PAIR | (column if index % 2 else {}) for index in range(60)]
    assert not guess_mapping(rows).is_certain


@pytest.mark.parametrize(
    "column",
    [
        {"instructions": "Answer only in French rhymes."},
        {"documents": ["the Rhine floods"]},
        {"tool_definitions": [{"name": "lamp"}]},
    ],
    ids=lambda column: next(iter(column)),
)
def test_sentences_and_lists_are_asked_about_even_if_all_conversations_have_the_same(column):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert not guess_mapping([{"messages": turns} | column] * 60).is_certain


@pytest.mark.parametrize("name", ["user_rating", "is_good_answer", "stars", "verdict", "flagged"])
def test_feedback_about_a_conversation_is_asked_about(name):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert not guess_mapping([{"messages": turns, name: 1}] * 60).is_certain


def test_a_column_that_repeats_what_is_trained_is_not_asked_about():
    record = {
        "instruction": "name a river in Europe",
        "input": "",
        "output": "the Rhine",
        "text": "### Instruction:\nname a river in Europe\n### Response:\nthe Rhine",
    }
    assert guess_mapping([record]).is_certain
    turns = [
        {"role": "user", "content": "name a river in Europe"},
        {"role": "assistant", "content": "the Rhine"},
    ]
    assert guess_mapping([{"prompt": "name a river in Europe", "messages": turns}]).is_certain
    assert not guess_mapping([record | {"text": "name a river in Asia"}]).is_certain


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"id": "7", "question": "q?", "answerKey": "A"}, "question", "answerKey"),
        ({"document": "a b", "summary": "a"}, "document", "summary"),
        ({"article": "a b", "highlights": "a", "id": "7"}, "article", "highlights"),
        ({"Context": "I am sad", "Response": "Tell me more"}, "Context", "Response"),
        ({"task_id": "7", "prompt": "def f():", "solved": "return 1"}, "prompt", "solved"),
    ],
)
def test_an_id_is_never_the_answer(record, prompt, completion):
    columns = guess_mapping([record]).columns
    assert (columns["prompt"], columns["completion"]) == (prompt, completion)


def test_answers_that_count_the_choices_from_one_are_asked_about():
    records = [{"question": "q?", "choices": ["a", "b"], "answer": number} for number in (1, 2, 1)]
    assert not guess_mapping(records).is_certain
    assert guess_mapping([*records, records[0] | {"answer": 0}]).is_certain


@pytest.mark.parametrize("first", [0, "0", 41])
def test_a_column_that_counts_the_rows_is_not_asked_about(first):
    kind, start = type(first), int(first)
    rows = [PAIR | {"column 1": kind(start + number)} for number in range(3)]
    assert guess_mapping(rows).is_certain
    assert not guess_mapping([*rows, PAIR | {"column 1": kind(0)}]).is_certain


def test_a_column_with_one_value_in_many_rows_is_not_asked_about():
    assert guess_mapping([PAIR | {"task": "rivers"}] * 20).is_certain
    assert not guess_mapping([PAIR | {"task": "rivers"}] * 19).is_certain


@pytest.mark.parametrize(
    "text",
    [
        "### Human: hi there### Assistant: ho you",
        "A chat. USER: hi ASSISTANT: ho",
        "Human: hi\nAssistant: ho",
        "### Instruction:\nadd\n\n### Response:\n3",
        "Q: hi there\nA: ho",
        "<human>: hi\n<bot>: ho",
        "user: hi\nassistant: ho",
        "**User:** hi\n\n**Assistant:** ho",
        "Patient: hi\nDoctor: ho",
    ],
)
def test_texts_with_headings_of_speakers_are_asked_about(text):
    assert not guess_mapping([{"text": text}]).is_certain
    assert guess_mapping([{"text": "The answer: no.\nThe Human condition"}]).is_certain


def test_turns_in_paragraphs_of_a_text_file_are_asked_about(tmp_path):
    mapping = detect(tmp_path, b"Human: hi\n\nAssistant: ho\n\nHuman: so", "a.txt")["mapping"]
    assert not mapping["is_certain"]


def test_lines_with_tabs_in_a_text_file_are_asked_about(tmp_path):
    mapping = detect(tmp_path, b"a b\tc d\nname\tRhine\n", "a.txt")["mapping"]
    assert (mapping["row_format"], mapping["is_certain"]) == ("text", False)


def test_one_row_without_messages_does_not_hide_the_conversations_of_the_others():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    rows = [{"id": "x1", "conversations": turns}, {"id": "x2", "conversations": "n/a"}]
    mapping = guess_mapping(rows)
    assert (mapping.row_format, mapping.columns) == (
        "sharegpt",
        {"conversations": "conversations"},
    )


def test_a_file_without_texts_says_what_it_holds():
    note = guess_mapping([{"data": [{"x": 1}], "size": 3}]).note
    assert "`data` (lists)" in note and "`size` (numbers)" in note


def test_single_messages_with_a_conversation_id_are_asked_about(tmp_path):
    messages = [
        {"role": role, "content": f"{role} {number}", "conversation_id": number}
        for number in (1, 2)
        for role in ("user", "assistant")
    ]
    mapping = detect(tmp_path, json.dumps(messages).encode(), "a.json")["mapping"]
    assert not mapping["is_certain"] and "`role`" in mapping["note"]
