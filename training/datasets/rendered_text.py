"""Text that was rendered with a chat template: recognizes the marks of well-known templates, and
turns the text back into messages, so that the model's own template can render them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from training.datasets.errors import BadRow


@dataclass(frozen=True)
class RenderedTemplate:
    """The marks of a chat template. `opening` begins a turn; its group 1 names the role."""

    name: str
    opening: re.Pattern[str]
    endings: tuple[str, ...]


TEMPLATES = (
    RenderedTemplate("ChatML", re.compile(r"<\|im_start\|>(\w+)\n"), ("<|im_end|>",)),
    RenderedTemplate(
        "Llama 3",
        re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*"),
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ),
    RenderedTemplate(
        "Llama 4", re.compile(r"<\|header_start\|>(\w+)<\|header_end\|>\s*"), ("<|eot|>",)
    ),
    RenderedTemplate("Gemma", re.compile(r"<start_of_turn>(\w+)\n"), ("<end_of_turn>", "<eos>")),
    RenderedTemplate("Gemma 4", re.compile(r"<\|turn>(\w+)\n"), ("<turn|>", "<eos>")),
    RenderedTemplate(
        "gpt-oss",
        re.compile(r"<\|start\|>(\w+)(?:<\|channel\|>\w+)?<\|message\|>"),
        ("<|end|>", "<|return|>", "<|call|>"),
    ),
    RenderedTemplate(
        "Granite",
        re.compile(r"<\|start_of_role\|>(\w+)<\|end_of_role\|>"),
        ("<|end_of_text|>",),
    ),
    RenderedTemplate(
        "Command R",
        re.compile(r"<\|START_OF_TURN_TOKEN\|><\|(\w+?)_TOKEN\|>"),
        ("<|END_OF_TURN_TOKEN|>",),
    ),
    RenderedTemplate(
        "Phi or Zephyr",
        re.compile(r"<\|(system|user|assistant)\|>\n?"),
        ("<|end|>", "<|endoftext|>", "</s>"),
    ),
    RenderedTemplate("Mistral or Llama 2", re.compile(r"(\[/?INST\])\s?"), ("</s>",)),
    RenderedTemplate(
        "DeepSeek",
        re.compile("<\uff5c(User|Assistant)\uff5c>"),
        ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
    ),
)
ROLES = {
    "[inst]": "user",
    "[/inst]": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "developer": "system",
    "ipython": "tool",
    "function": "tool",
    "environment": "tool",
}
BEGINNINGS = re.compile(
    r"(?:<\|begin_of_text\|>|<bos>|<s>|<\uff5cbegin\u2581of\u2581sentence\uff5c>|<BOS_TOKEN>|\s)*"
)
SYSTEM_BLOCK = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*", re.DOTALL)
# Texts that a tokenizer may read as control tokens
CONTROL_MARKS = re.compile(
    r"<\|[A-Za-z_][\w ]{0,40}\|>|<\uff5c[^\uff5c\s]{1,40}\uff5c>|</?s>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>|\[/?INST\]|<\|turn>|<turn\|>"
)


def find_template(text: str) -> RenderedTemplate | None:
    """The well-known template that the text was rendered with, if any."""
    if "<" not in text and "[INST]" not in text:
        return None
    return next(
        (
            template
            for template in TEMPLATES
            if "assistant" in {get_role(match) for match in template.opening.finditer(text)}
        ),
        None,
    )


def get_role(match: re.Match[str]) -> str:
    role = match[1].lower()
    return ROLES.get(role, role)


def parse_rendered_text(text: str, field: str) -> list[dict[str, Any]]:
    """The messages of a rendered text. Text before the first turn is the system message.

    Raises:
        BadRow: the text has no turn of an assistant.
    """
    template = find_template(text)
    if template is None:
        raise BadRow(
            f"`{field}` holds no conversation that was rendered with a known chat template"
        )
    openings = list(template.opening.finditer(text))
    beginning = text[BEGINNINGS.match(text).end() : openings[0].start()].strip()  # type: ignore[union-attr]
    messages: list[dict[str, Any]] = []
    if beginning:
        messages.append({"role": "system", "content": beginning})
    ends = [*(match.start() for match in openings[1:]), len(text)]
    for opening, end in zip(openings, ends, strict=True):
        content = text[opening.end() : end]
        for ending in template.endings:
            content = content.split(ending)[0]
        if "[/INST]" in text:
            content = content.removesuffix("<s>").strip()
        role = get_role(opening)
        system = SYSTEM_BLOCK.match(content) if role == "user" and not messages else None
        if system:
            messages.append({"role": "system", "content": system[1]})
            content = content[system.end() :]
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()  # a generation prompt
    return messages
