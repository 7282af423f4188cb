"""Every column of a file is used, or listed before anything is saved."""

import json

import pytest

from tests.datasets.files import detect_and_check
from training.datasets.column_mapping import ColumnMapping
from training.datasets.mapping_guess import guess_mapping
from training.datasets.row_builders import to_row

PAIR = {"prompt": "name a river", "completion": "Rhine"}


def read_messages(record):
    return to_row(record, guess_mapping([record])).messages


def test_alpaca_history_becomes_earlier_turns():
    record = {
        "instruction": "and in France?",
        "input": "",
        "output": "Loire",
        "history": [["name a river", "Rhine"]],
    }
    contents = [message["content"] for message in read_messages(record)]
    assert contents == ["name a river", "Rhine", "and in France?", "Loire"]


def test_dollys_context_joins_the_prompt():
    record = {
        "instruction": "Which river?",
        "context": "The Rhine floods.",
        "response": "the Rhine",
        "category": "closed_qa",
    }
    assert "The Rhine floods." in read_messages(record)[0]["content"]


@pytest.mark.parametrize(
    ("choices", "answer", "trained"),
    [
        (["Rhine", "Alps"], 1, "B"),
        ({"label": ["1", "2"], "text": ["Rhine", "Alps"]}, "1", "1"),
        ([{"label": "x", "text": "Rhine"}, {"label": "y", "text": "Alps"}], "Rhine", "Rhine"),
    ],
)
def test_choices_join_the_prompt(choices, answer, trained):
    messages = read_messages({"question": "A river?", "choices": choices, "answer": answer})
    assert "Rhine" in messages[0]["content"] and "Alps" in messages[0]["content"]
    assert messages[1]["content"] == trained


def test_conversational_prompts_and_completions_are_one_conversation():
    record = {
        "prompt": [
            {"role": "user", "content": "name a river"},
            {"role": "assistant", "content": "Rhine"},
            {"role": "user", "content": "another"},
        ],
        "completion": [{"role": "assistant", "content": "Loire"}],
    }
    messages = read_messages(record)
    assert [m["content"] for m in messages] == ["name a river", "Rhine", "another", "Loire"]
    assert [m.get("weight", 1) for m in messages if m["role"] == "assistant"] == [0, 1]


@pytest.mark.parametrize("order", [("chosen", "rejected"), ("rejected", "chosen")])
@pytest.mark.parametrize("as_messages", [True, False])
def test_preference_data_is_never_trained_without_asking(order, as_messages):
    def wrap(text):
        if not as_messages:
            return text
        return [
            {"role": "user", "content": "name a river"},
            {"role": "assistant", "content": text},
        ]

    texts = {"chosen": "Rhine", "rejected": "Alps"}
    record = {name: wrap(texts[name]) for name in order} | (
        {} if as_messages else {"prompt": "name a river"}
    )
    mapping = guess_mapping([record])
    assert mapping.row_format == "preference" and not mapping.is_certain
    assert [m["content"] for m in to_row(record, mapping).messages] == ["name a river", "Rhine"]


@pytest.mark.parametrize(
    "columns",
    [
        {"label": False},
        {"kto_tag": "true"},
        {"rating": 1},
        {"rejected_response": "Alps"},
        {"role": "user"},
        {"x" * 300: "river"},
    ],
)
def test_columns_that_may_change_the_meaning_make_the_guess_uncertain(columns):
    assert guess_mapping([PAIR]).is_certain
    assert not guess_mapping([{**PAIR, **columns}]).is_certain


def test_the_prompt_of_preference_rows_is_kept():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a river"}]
    record = {
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": "Rhine"}],
        "rejected": [{"role": "assistant", "content": "Alps"}],
    }
    assert [m["content"] for m in read_messages(record)] == ["Be brief.", "a river", "Rhine"]
    dialog = "\n\nHuman: a river\n\nAssistant: "
    texts = {"chosen": dialog + "Rhine", "rejected": dialog + "Alps"}
    messages = read_messages(texts)
    assert [(m["role"], m["content"]) for m in messages] == [
        ("user", "a river"),
        ("assistant", "Rhine"),
    ]


def test_parts_that_messages_leave_no_room_for_are_listed():
    record = {
        "prompt": [{"role": "System", "content": "Be kind."}, {"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "ho"}],
        "system": "Be rude.",
        "context": "a storm",
    }
    mapping = guess_mapping([record])
    columns = {**mapping.columns, "context": "context"}
    row = to_row(record, ColumnMapping("pairs", columns))
    assert row.unused == {"system", "context"}
    assert row.messages[0]["content"] == "Be kind."


def test_a_completion_that_is_json_of_messages_stays_text():
    text = json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    record = {"prompt": "write a chat as JSON", "completion": text}
    assert [m["content"] for m in read_messages(record)] == ["write a chat as JSON", text]


@pytest.mark.parametrize(("answer", "trained"), [("1", "B"), (1.0, "B"), ("Alps", "Alps")])
def test_an_answer_as_text_is_an_index_of_the_choices_too(answer, trained):
    record = {"question": "A river?", "choices": "['Rhine' 'Alps']", "answer": answer}
    assert read_messages(record)[1]["content"] == trained


def test_a_column_of_sentences_that_is_left_out_makes_the_guess_uncertain():
    notes = {"notes": "only if the water is high"}
    assert not guess_mapping([{**PAIR, **notes}]).is_certain
    assert guess_mapping([{**PAIR, "id": 7, "source": "https://example.org/a"}]).is_certain


def test_unused_columns_are_counted_with_the_part_that_they_may_fill(tmp_path):
    rows = [{**PAIR, "prompt": f"name river {i}"} for i in range(4)]
    rows[0] |= {"history": [["a", "b"]], "stars": 5}
    rows[1] |= {"stars": 4}
    rows[2] |= {"history": [], "stars": None}
    report = detect_and_check(tmp_path, "\n".join(map(json.dumps, rows)).encode(), "a.jsonl")
    assert report["unused"] == [
        {"name": "stars", "count": 2, "part": ""},
        {"name": "history", "count": 1, "part": "history"},
    ]


@pytest.mark.parametrize("parent", ["0", "-1", "None", ""])
def test_the_parent_of_a_first_turn_may_be_zero_or_a_word_for_none(tmp_path, parent):
    rows = f"id,parent_id,prompt,completion\n1,{parent},name a river,Rhine\n2,1,another,Loire\n"
    report = detect_and_check(tmp_path, rows.encode(), "a.csv")
    assert (report["rows"], report["problems"]["count"]) == (1, 0)


def test_rows_linked_by_parent_ids_become_conversations(tmp_path):
    rows = (
        "id,parent_id,prompt,completion\n"
        "1,,name a river,Rhine\n"
        "2,1.0,another,Loire\n"
        "3,1,and one more,Seine\n"
        "4,9,lost,row\n"
        "5,6,a,b\n"
        "6,5,c,d\n"
    )
    report = detect_and_check(tmp_path, rows.encode(), "chain.csv")
    assert report["rows"] == 2
    staged = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [
        [(m["content"], m.get("weight", 1)) for m in row["messages"] if m["role"] == "assistant"]
        for row in staged
    ] == [[("Rhine", 1), ("Loire", 1)], [("Rhine", 0), ("Seine", 1)]]
    problems = report["problems"]["messages"]
    assert [problem.split(":")[0] for problem in problems] == ["line 5", "line 6", "line 7"]
    assert "`9`" in problems[0] and "cycle" in problems[1]


def test_an_alpaca_row_without_an_instruction_has_its_input_as_the_prompt():
    record = {"instruction": "", "input": "name a river", "output": "Rhine"}
    assert read_messages(record)[0]["content"] == "name a river"


def test_a_system_message_may_be_a_list_of_text_parts():
    record = {
        "system": [{"text": "be kind"}],
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    }
    assert read_messages(record)[0] == {"role": "system", "content": "be kind"}


ASK, GOOD, BAD = (
    {"role": "user", "content": "name a river"},
    {"role": "assistant", "content": "Rhine"},
    {"role": "assistant", "content": "Alps"},
)


@pytest.mark.parametrize(
    "record",
    [
        {"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {
            "conversations": [{"from": "human", "value": "name a river"}],
            "chosen": {"from": "gpt", "value": "Rhine"},
            "rejected": {"from": "gpt", "value": "Alps"},
        },
        {"instruction": "name a", "input": "river", "chosen": "Rhine", "rejected": "Alps"},
    ],
    ids=["OpenAI", "ShareGPT", "Alpaca"],
)
def test_every_form_of_preference_data_is_asked_about_and_read(record):
    mapping = guess_mapping([record])
    assert (mapping.row_format, mapping.is_certain) == ("preference", False)
    row = to_row(record, mapping)
    assert row.messages[-1]["content"] == "Rhine" and not row.unused
    assert row.messages[0]["content"].split() == ["name", "a", "river"]


def test_other_keys_of_openais_preference_input_are_listed():
    record = {
        "input": {"messages": [ASK], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    }
    assert to_row(record, guess_mapping([record])).unused == {"input.parallel_tool_calls"}


def make_dialog(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


@pytest.mark.parametrize(
    "details",
    [
        {"score_chosen": 8.0, "score_rejected": 5.0},
        {"chosen_score": 8.0, "rejected_score": 5.0},
        {"chosen-model": "large", "rejected-model": "small"},
        {"messages": make_dialog("hi", "ho", "name a river", "Rhine")},
    ],
    ids=lambda details: next(iter(details)),
)
def test_details_of_preference_data_are_not_taken_for_the_answers(details):
    record = {
        "prompt": "name a river",
        "chosen": make_dialog("hi", "ho", "name a river", "Rhine"),
        "rejected": make_dialog("hi", "ho", "name a river", "Alps"),
    }
    row = to_row(record | details, guess_mapping([record | details]))
    contents = [message["content"] for message in row.messages]
    assert contents == ["hi", "ho", "name a river", "Rhine"]
    assert [m.get("weight", 1) for m in row.messages if m["role"] == "assistant"] == [0, 1]
    assert row.unused == set(details)


def test_the_tools_of_alpaca_rows_are_used():
    record = {"instruction": "light", "output": "done", "tools": [{"name": "lamp"}]}
    assert to_row(record, guess_mapping([record])).tools[0]["function"]["name"] == "lamp"


@pytest.mark.parametrize("key", ["role", "from"])
def test_a_prompt_that_is_a_json_object_stays_text(key):
    prompt = json.dumps({key: "bob@example.com", "text": "see you at noon"})
    record = {"prompt": prompt, "completion": "noon"}
    assert read_messages(record)[0]["content"] == prompt


def test_geminis_contents_are_read():
    record = {
        "systemInstruction": {"parts": [{"text": "be kind"}]},
        "contents": [
            {"role": "user", "parts": [{"text": "hi"}]},
            {"role": "model", "parts": [{"text": "ho"}]},
        ],
    }
    assert [m["role"] + ": " + m["content"] for m in read_messages(record)] == [
        "system: be kind",
        "user: hi",
        "assistant: ho",
    ]
