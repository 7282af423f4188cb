"""What a message carries reaches the model: masks, reasoning, and text that looks like a control
token.
"""

import numpy as np
import pytest

from tests import tiny
from training.engine.data.conversations import (
    IGNORE_INDEX,
    encode_messages,
    encode_prompt,
    encode_row,
    encode_rows,
    encode_text,
    load_tokenizer,
    render_messages,
)
from training.engine.data.errors import DataError

QUESTION = {"role": "user", "content": "how warm is it?"}
ANSWER = {"role": "assistant", "content": "21 degrees"}
THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.KEY %}<think>{{ m.KEY }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def decode_trained(tokenizer, row, **options):
    encoded = encode_row(tokenizer, row, max_length=999, **options)
    return tokenizer.decode(encoded.ids[encoded.labels != IGNORE_INDEX])


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_a_masked_answer_is_not_trained(tokenizer, train_on_prompt):
    masked = {"role": "assistant", "content": "ask later", "weight": 0}
    row = {"messages": [QUESTION, masked, QUESTION, ANSWER]}
    trained = decode_trained(tokenizer, row, train_on_prompt=train_on_prompt)
    assert "21 degrees" in trained and "ask later" not in trained
    assert ("how warm" in trained) is train_on_prompt
    assert "ask later" in render_messages(tokenizer, row)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_trained_under_the_key_of_the_template(tokenizer, key):
    tokenizer.chat_template = THINKING_TEMPLATE.replace("KEY", key)
    row = {"messages": [QUESTION, {**ANSWER, "reasoning_content": "the sensor says"}]}
    assert "<think>the sensor says</think>21 degrees" in decode_trained(tokenizer, row)


def test_a_template_that_drops_the_reasoning_is_refused(tokenizer):
    row = {"messages": [QUESTION, {**ANSWER, "reasoning_content": "the sensor says"}]}
    with pytest.raises(DataError) as refused:
        encode_row(tokenizer, row, max_length=999)
    assert refused.value.code == "template_without_reasoning"


def test_rows_that_the_template_rejects_can_be_left_out(tokenizer):
    rejected = {"messages": [QUESTION, {**ANSWER, "reasoning_content": "the sensor says"}]}
    rows = [{"messages": [QUESTION, ANSWER]}, rejected]
    options = {"max_length": 99, "train_on_prompt": False}
    encoded = list(encode_rows(tokenizer, rows, skip_invalid_rows=True, **options))
    assert encoded[0].trained_tokens and encoded[1] is None
    with pytest.raises(DataError, match=r"^row 2: "):
        list(encode_rows(tokenizer, rows, **options))


def test_a_run_lists_the_rows_that_it_left_out(tiny_run, engine_here):
    rejected = {"messages": [QUESTION, {**ANSWER, "reasoning_content": "the sensor says"}]}
    folder = tiny_run(rows=[rejected, *tiny.ROWS], max_steps=2, skip_invalid_rows=True)
    assert engine_here([str(folder)]) == 0
    (start,) = (event for event in tiny.read_events(folder) if event["kind"] == "start")
    assert start["excluded_row_count"] == 1 and start["rows"] == len(tiny.ROWS) - 4
    assert (start["excluded_rows"], start["excluded_eval_rows"]) == ("1", "")


def test_excluded_rows_are_not_trained(tiny_run, engine_here):
    folder = tiny_run(max_steps=2, excluded_rows="1-2, 5", excluded_eval_rows="1")
    assert engine_here([str(folder)]) == 0
    (start,) = (event for event in tiny.read_events(folder) if event["kind"] == "start")
    assert (start["excluded_row_count"], start["excluded_rows"]) == (3, "1-2, 5")
    assert (start["rows"], start["excluded_eval_rows"]) == (len(tiny.ROWS) - 7, "1")


def test_text_like_a_control_token_is_plain_text(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    content = "what does <|im_end|> mean?"
    row = {"messages": [{"role": "user", "content": content}, ANSWER]}
    encoded = encode_row(tokenizer, row, max_length=999)
    assert int((encoded.ids == end).sum()) == 2  # one for each message
    assert tokenizer.decode(encoded.ids) == render_messages(tokenizer, row)
    assert decode_trained(tokenizer, row) == "21 degrees<|im_end|>"
    prompt = encode_prompt(tokenizer, row, 1)
    assert np.array_equal(prompt, encoded.ids[: len(prompt)])


def test_names_of_arguments_and_private_characters_are_plain_text(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    )
    call = {"function": {"name": "f", "arguments": {"<|im_end|>": 1}}}
    content = "icons \U000f0000\U000f0041"
    row = {"messages": [{"role": "assistant", "content": content, "tool_calls": [call]}]}
    ids = encode_messages(tokenizer, row)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert content in tokenizer.decode(ids)


def test_text_that_was_rendered_gets_no_second_end_token(tokenizer):
    rendered = render_messages(tokenizer, {"messages": tiny.ROWS[0]["messages"]})
    assert tokenizer.decode(encode_text(tokenizer, rendered)) == rendered
    assert encode_text(tokenizer, "plain")[-1] == tokenizer.eos_token_id
