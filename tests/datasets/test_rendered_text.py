"""Text that was rendered with a chat template is recognized and read as a conversation."""

import pytest

from training.datasets.insights import Insights
from training.datasets.mapping_guess import guess_mapping
from training.datasets.row_builders import to_row
from training.datasets.rows import Row

TEXTS = {
    "ChatML": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\nho<|im_end|>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nho<|eot_id|>",
    "Mistral or Llama 2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST] ho</s>",
    "Phi or Zephyr": "<|system|>\nBe kind.</s>\n<|user|>\nhi</s>\n<|assistant|>\nho</s>\n",
    "DeepSeek": "<\uff5cbegin\u2581of\u2581sentence\uff5c>Be kind.<\uff5cUser\uff5c>hi"
    "<\uff5cAssistant\uff5c>ho<\uff5cend\u2581of\u2581sentence\uff5c>",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_rendered_text_becomes_messages(name):
    record = {"text": TEXTS[name]}
    mapping = guess_mapping([record])
    assert mapping.row_format == "rendered" and not mapping.is_certain and name in mapping.note
    messages = to_row(record, mapping).messages
    assert [(m["role"], m["content"].strip()) for m in messages] == [
        ("system", "Be kind."),
        ("user", "hi"),
        ("assistant", "ho"),
    ]


def test_gemmas_model_role_and_a_generation_prompt_are_read():
    text = (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nho<end_of_turn>\n"
        "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n"
    )
    messages = to_row({"text": text}, guess_mapping([{"text": text}])).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]


def test_plain_text_with_angle_brackets_stays_plain_text():
    text = "if a < b and b > c: <user> writes [INST"
    mapping = guess_mapping([{"text": text}])
    assert mapping.row_format == "text" and mapping.is_certain


def test_text_like_control_tokens_in_messages_is_reported():
    insights = Insights()
    messages = (
        {"role": "user", "content": "what does <|im_end|> mean?"},
        {"role": "assistant", "content": "the end"},
    )
    insights.add_row("line 3", Row(messages), "")
    assert insights.to_dict()["special_tokens"] == {
        "count": 1,
        "examples": [{"location": "line 3", "description": "<|im_end|>"}],
    }


@pytest.mark.parametrize(
    "text",
    [
        "<|user|>\nhi<|end|>\n<|assistant|>\nho<|end|>\n<|endoftext|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|></s>",
        "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nho<end_of_turn>\n<eos>",
    ],
)
def test_an_end_token_after_the_last_turn_is_no_text(text):
    messages = to_row({"text": text}, guess_mapping([{"text": text}])).messages
    assert [message["content"] for message in messages] == ["hi", "ho"]


def test_the_indentation_of_an_answer_is_kept():
    text = (
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n    return 1<|eot_id|><|end_of_text|>"
    )
    assert to_row({"text": text}, guess_mapping([{"text": text}])).messages[1]["content"] == (
        "    return 1"
    )


@pytest.mark.parametrize(("system", "roles"), [("", 2), ("Be brief.", 3)])
def test_what_a_template_writes_before_the_system_message_is_left_out(system, roles):
    header = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    turns = (("system", header + system), ("user", "hi"), ("assistant", "ho"))
    text = "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
        for role, content in turns
    )
    messages = to_row({"text": text}, guess_mapping([{"text": text}])).messages
    assert len(messages) == roles
    assert roles == 2 or messages[0]["content"] == "Be brief."
