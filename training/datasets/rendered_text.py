"""Text that was rendered with a chat template: recognizes the marks of well-known templates, and
turns the text back into messages, so that the model's own template can render them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.datasets.errors import BadRow
from training.datasets.rows import ROLE_ALIASES


@dataclass(frozen=True)
class RenderedTemplate:
    """The marks of a chat template. `opening` begins a turn; its group 1 names the role."""

    name: str
    opening: re.Pattern[str]
    endings: tuple[str, ...]


TEMPLATES = (
    RenderedTemplate("Human and Assistant", re.compile(r"(?:\A|\n\n)(Human|Assistant):\s?"), ()),
    RenderedTemplate(
        "ChatML", re.compile(r"<\|im_start\|>(\w+)(?:<\|im_sep\|>|\r?\n)"), ("<|im_end|>",)
    ),
    RenderedTemplate(
        "Llama 3",
        re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>(?:\r?\n){0,2}"),
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ),
    RenderedTemplate(
        "Llama 4",
        re.compile(r"<\|header_start\|>(\w+)<\|header_end\|>(?:\r?\n){0,2}"),
        ("<|eot|>",),
    ),
    RenderedTemplate("Gemma", re.compile(r"<start_of_turn>(\w+)\n"), ("<end_of_turn>", "<eos>")),
    RenderedTemplate("Gemma 4", re.compile(r"<\|turn>(\w+)\n"), ("<turn|>", "<eos>")),
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
TEMPLATE_ROLES = ROLE_ALIASES | {
    "[inst]": "user",
    "[/inst]": "assistant",
    "ipython": "tool",
    "environment": "tool",
}
UNMARKED_SYSTEM = ("DeepSeek",)
TOOL_MARKS = re.compile(
    r"\[/?(?:TOOL_RESULTS|TOOL_CALLS|AVAILABLE_TOOLS|SYSTEM_PROMPT)\]|<\|observation\|>"
    r"|<\uff5ctool[^\uff5c]*\uff5c>"
)
BEGINNINGS = re.compile(
    r"(?:<\|begin_of_text\|>|<bos>|<s>|<\uff5cbegin\u2581of\u2581sentence\uff5c>|<BOS_TOKEN>|\s)*"
)
# End tokens that training scripts append to a rendered text
ENDINGS = re.compile(
    r"(?:\s|<\|(?:end_of_text|endoftext|eot_id|eot|im_end|end|return)\|>|</s>|<eos>|<end_of_turn>"
    r"|<\uff5cend\u2581of\u2581sentence\uff5c>|<\|END_OF_TURN_TOKEN\|>)*"
)
# What templates write before the system message; they would write it again
DEFAULT_HEADERS = re.compile(
    r"\A\s*(?:(?:Environment: ipython\n)?Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n*"
    r"|## Metadata\n.*?## Custom Instructions\n*)",
    re.DOTALL,
)
SYSTEM_BLOCK = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*", re.DOTALL)
# Texts that a tokenizer may read as special tokens
SPECIAL_TOKENS = re.compile(
    r"<\|[A-Za-z_][\w ]{0,40}\|>|<\uff5c[^\uff5c\s]{1,40}\uff5c>|</?s>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>|\[/?INST\]|<\|turn>|<turn\|>"
)

# Headings of speakers in texts that no chat template wrote: Guanaco's, Vicuna's, Alpaca's
SPEAKER_HEADINGS = re.compile(
    r"(?:(?<=\s)|(?<=###)|\A)(USER|ASSISTANT|Human|Assistant|User|Instruction|Response)"
    r"(?: \(\w+\))?:(?=\s)"
)
LINE_HEADINGS = re.compile(r"^[<\[*#]*\s?([A-Za-z]\w{0,20})[>\]*]*:", re.MULTILINE)
CODE_KEYWORDS = frozenset(("else", "try", "finally", "except", "default", "http", "https"))


def find_headings(texts: Sequence[str]) -> list[str]:
    """Two or more headings that the texts have in common, as dialogues and questions with answers
    do; an empty list if there are none. A turn may be a text of its own.
    """
    speakers = {name for text in texts for name in SPEAKER_HEADINGS.findall(text)}
    if len(speakers) > 1:
        return sorted(speakers)
    counts = Counter(name for text in texts for name in set(LINE_HEADINGS.findall(text)))
    common = sorted(
        name
        for name, count in counts.items()
        if 2 * count >= len(texts) and name.lower() not in CODE_KEYWORDS
    )
    return common if len(common) > 1 else []


def find_template(text: str) -> RenderedTemplate | None:
    """The well-known template that the text was rendered with, if any. The text begins with a turn
    or, for templates that render it without marks, with the system message.
    """
    start = BEGINNINGS.match(text)
    for template in TEMPLATES:
        first = template.opening.search(text)
        if first is None or not start:
            continue
        has_system_text = template.name in UNMARKED_SYSTEM
        if (first.start() <= start.end() or has_system_text) and any(
            get_turn_role(match) == "assistant" for match in template.opening.finditer(text)
        ):
            return template
    return None


def get_turn_role(match: re.Match[str]) -> str:
    role = match[1].lower()
    return TEMPLATE_ROLES.get(role, role)


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
            content, _, rest = content.partition(ending)
            if not (ENDINGS.fullmatch(rest) or BEGINNINGS.fullmatch(rest)):
                raise BadRow(f"`{field}` has text after {ending} that belongs to no turn")
        if "[/INST]" in text:
            content = content.removesuffix("<s>").strip(" \n")
        role = get_turn_role(opening)
        system = SYSTEM_BLOCK.match(content) if role == "user" and not messages else None
        if system:
            messages.append({"role": "system", "content": system[1]})
            content = content[system.end() :]
        if tool_token := TOOL_MARKS.search(content):
            raise BadRow(
                f"`{field}` holds {tool_token[0]}, which cannot be read back into messages"
            )
        if role == "system" and not messages:
            content = DEFAULT_HEADERS.sub("", content)
            if not content.strip():
                continue
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()  # a generation prompt
    return messages
