"""Check that a chat template keeps what a row says. Many templates drop a role, the text beside a
tool call, or the tools without an error, and the model would learn an answer to something else.

A text that is found in the rendered row is kept. For all others, and where a text may be found by
chance, the row is rendered again with another value: if nothing changes, the template drops it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training.engine.data.errors import DataError

Render = Callable[[dict[str, Any]], str]
CHANGE = "-changed"  # appended to a value to see whether the template uses it


def check_template_keeps_row(row: dict[str, Any], text: str, render: Render) -> None:
    """`text` is the rendered row.

    Raises:
        DataError: the template drops a message, a tool call, its arguments, or the tools.
    """

    def is_dropped(**changes: Any) -> bool:
        try:
            return render(row | changes) == text
        except DataError:  # so the template does read the value
            return False

    messages = row["messages"]
    for index, message in enumerate(messages):

        def is_change_dropped(
            index: int = index, message: dict[str, Any] = message, **changes: Any
        ) -> bool:
            changed = [*messages]
            changed[index] = message | changes
            return is_dropped(messages=changed)

        check_calls(message, index, text, is_change_dropped)
        content = message.get("content") or ""
        is_found = content.strip() in text and not is_often_dropped(message)
        if content.strip() and not is_found and is_change_dropped(content=content + CHANGE):
            raise DataError(
                f"The model's chat template drops the content of message {index + 1} "
                f"({message['role']}). Use a model whose template supports it, or move the text "
                "into another message.",
                code="template_drops_message",
            )
    if row.get("tools") and is_dropped(tools=None):
        raise DataError(
            "The model's chat template drops the tools of this row. Use a model whose template "
            "supports tools, or describe them in the system message.",
            code="template_without_tools",
        )


def is_often_dropped(message: dict[str, Any]) -> bool:
    """Whether templates drop such messages, so that a short text may be found by chance."""
    return message["role"] in ("system", "tool") or "tool_calls" in message


def check_calls(
    message: dict[str, Any], index: int, text: str, is_change_dropped: Callable[..., bool]
) -> None:
    """Raises DataError: the template drops a tool call of the message, or its arguments."""
    calls = message.get("tool_calls", [])
    for number, call in enumerate(calls):
        function = call["function"]
        arguments = function.get("arguments") or {}
        changed = [*calls]
        changed[number] = call | {
            "function": function | {"arguments": {**arguments, CHANGE: CHANGE}}
        }
        name = function["name"]
        if name not in text or is_change_dropped(tool_calls=changed):
            raise DataError(
                f"The model's chat template drops the tool call `{name[:80]}` (message "
                f"{index + 1}) or its arguments, so it cannot be trained. Use a model whose "
                "template supports tools, or write the call as text of the assistant.",
                code="template_without_tools",
            )
