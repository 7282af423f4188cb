import json
from pathlib import Path

import pytest

from tests import tiny
from tests.user_errors import raises_user_error
from training.engine.data.conversations import (
    DEFAULT_TEMPLATE,
    IGNORE_INDEX,
    DataError,
    encode_prompt,
    encode_row,
    ensure_chat_template,
)

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "turn on the hall lamp"},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "and the attic"},
    {"role": "assistant", "content": "done too"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def decode_trained(tokenizer, row):
    return tokenizer.decode([i for i in row.labels.tolist() if i != IGNORE_INDEX])


def test_only_the_assistant_turns_and_their_end_tokens_are_trained(tokenizer):
    row = encode_row(tokenizer, {"messages": CONVERSATION}, max_length=500)
    assert decode_trained(tokenizer, row) == "done<|im_end|>done too<|im_end|>"
    assert row.trained_tokens == sum(label != IGNORE_INDEX for label in row.labels)


def test_the_ids_equal_those_of_the_chat_template(tokenizer):
    row = encode_row(tokenizer, {"messages": CONVERSATION}, max_length=500)
    assert (
        row.ids.tolist() == tokenizer.apply_chat_template(CONVERSATION, tokenize=True)["input_ids"]
    )


def test_a_prompt_is_the_beginning_of_its_row(tokenizer):
    row = encode_row(tokenizer, {"messages": CONVERSATION}, max_length=500)
    prompt = encode_prompt(tokenizer, {"messages": CONVERSATION}, len(CONVERSATION) - 1)
    assert row.ids.tolist()[: len(prompt)] == prompt
    assert row.labels[len(prompt)] != IGNORE_INDEX
    assert row.labels[len(prompt) - 1] == IGNORE_INDEX


def test_train_on_prompt_trains_every_token(tokenizer):
    row = encode_row(tokenizer, {"messages": CONVERSATION}, max_length=500, train_on_prompt=True)
    assert (row.labels == row.ids).all()


def test_a_long_row_is_truncated_and_counts_the_lost_tokens(tokenizer):
    full_row = encode_row(tokenizer, {"messages": CONVERSATION}, max_length=500)
    row = encode_row(tokenizer, {"messages": CONVERSATION}, max_length=10)
    assert len(row) == 10
    assert row.truncated_tokens == len(full_row) - 10
    assert row.trained_tokens == 0


def test_a_model_without_a_template_gets_the_default_one():
    tokenizer = tiny.make_tokenizer(template=None)
    assert ensure_chat_template(tokenizer) == "default"
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    row = encode_row(tokenizer, {"messages": CONVERSATION}, max_length=500)
    assert decode_trained(tokenizer, row) == "done<|im_end|>done too<|im_end|>"


def test_a_template_that_changes_earlier_turns_is_rejected():
    forgetful = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else '...' }}\n{% "
        "endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tiny.make_tokenizer(template=forgetful)
    with raises_user_error(DataError, code="template_rewrites_turns", naming=("message 3",)):
        encode_row(tokenizer, {"messages": CONVERSATION}, max_length=500)


def test_text_that_looks_like_a_role_does_not_move_the_mask(tokenizer):
    sly = [
        {"role": "user", "content": "say assistant\nyes"},
        {"role": "assistant", "content": "assistant"},
    ]
    assert (
        decode_trained(tokenizer, encode_row(tokenizer, {"messages": sly}, max_length=500))
        == "assistant<|im_end|>"
    )


def test_every_example_row_trains_exactly_its_answers(tokenizer):
    folder = Path(__file__).parents[2] / "training" / "datasets" / "example_files"
    for name in ("smart_home", "shell_commands"):
        for line in (folder / f"{name}.jsonl").read_text().splitlines()[::37]:
            messages = json.loads(line)["messages"]
            answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
            row = encode_row(tokenizer, {"messages": messages}, max_length=5000)
            assert decode_trained(tokenizer, row) == "".join(answers)


TOOL_TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ '<|im_start|>' "
    "+ m['role'] + '\n' + m['content'] }}{% for c in m.get('tool_calls', []) %}CALL {{ "
    "c['function'] | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "lamp", "arguments": {"on": True}}}],
}
CALLING = {
    "messages": [
        {"role": "user", "content": "light"},
        CALL,
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "Done."},
    ],
    "tools": [{"name": "lamp"}],
}


def test_a_tool_call_is_trained_and_the_tools_and_their_answer_are_not():
    tokenizer = tiny.make_tokenizer(TOOL_TEMPLATE)
    row = encode_row(tokenizer, CALLING, max_length=500)
    assert (
        decode_trained(tokenizer, row)
        == 'CALL {"name": "lamp", "arguments": {"on": true}}<|im_end|>Done.<|im_end|>'
    )
    assert "TOOLS" in tokenizer.decode(row.ids)


def test_a_template_that_drops_tool_calls_is_rejected():
    with raises_user_error(DataError, code="template_without_tools", naming=("`lamp`",)):
        encode_row(tiny.make_tokenizer(), CALLING, max_length=500)


def test_the_default_template_supports_tools():
    tokenizer = tiny.make_tokenizer(None)
    ensure_chat_template(tokenizer)
    assert '{"name": "lamp"' in decode_trained(
        tokenizer, encode_row(tokenizer, CALLING, max_length=500)
    )


def test_plain_text_is_trained_completely_and_ends_with_eos():
    tokenizer = tiny.make_tokenizer()
    row = encode_row(tokenizer, {"text": "once upon"}, max_length=500)
    assert tokenizer.decode(row.ids) == "once upon<|im_end|>"
    assert row.trained_tokens == len(row) - 1
    assert len(encode_row(tokenizer, {"text": "once upon"}, max_length=3)) == 3


def test_an_opening_assistant_turn_is_not_trained():
    tokenizer = tiny.make_tokenizer()
    turns = [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]
    assert (
        decode_trained(tokenizer, encode_row(tokenizer, {"messages": turns}, max_length=500))
        == "yes<|im_end|>"
    )


def test_a_row_that_the_template_rejects_is_a_data_error():
    tokenizer = tiny.make_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + tiny.TEMPLATE
    )
    with raises_user_error(DataError, code="template_error", naming=("no system here",)):
        encode_row(tokenizer, {"messages": CONVERSATION}, max_length=500)
