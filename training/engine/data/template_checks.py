"""Check that a chat template keeps what a row says. Many templates drop a role, the text beside a
tool call, or the tools without an error, and the model would learn an answer to something else.

A text that is found in the rendered row is kept. Where a text may be found by chance, the row is
rendered again with a sentinel in each of them. What is found neither way is given another value
alone: if nothing changes, the template drops it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from training.engine.data.errors import DataError, TemplateTooSlow

Render = Callable[[dict[str, Any]], str]
CHANGE = "-changed"  # appended to a value to see whether the template uses it


def check_template_keeps_row(
    row: dict[str, Any], text: str, render: Render, *, trained_indices: Collection[int] = ()
) -> None:
    """`text` is the rendered row. `trained_indices` are the messages that are trained. Of these the
    beginning is checked as well, because templates cut `<think>` out of it.

    Raises:
        DataError: the template drops a message, a tool call, its arguments, or the tools.
    """
    messages = row["messages"]

    def is_dropped(**changes: Any) -> bool:
        try:
            return render(row | changes) == text
        except TemplateTooSlow:
            raise
        except DataError:  # so the template does read the value
            return False

    def is_change_dropped(index: int, **changes: Any) -> bool:
        changed = [*messages]
        changed[index] = messages[index] | changes
        return is_dropped(messages=changed)

    sentinel_text = render_sentinels(row, render) if any(map(may_be_dropped, messages)) else ""
    for index, message in enumerate(messages):
        is_dropped_here = partial(is_change_dropped, index)
        check_calls(message, index, text, sentinel_text, is_dropped_here)
        check_content(
            message, index, text, sentinel_text, is_dropped_here, is_answer=index in trained_indices
        )
    if row.get("tools") and is_dropped(tools=None):
        raise DataError(
            "The model's chat template drops the tools. Use a model whose template supports tools, "
            "or describe them in the system message.",
            field="tools",
            code="template_without_tools",
        )


def check_content(
    message: dict[str, Any],
    index: int,
    text: str,
    sentinel_text: str,
    is_change_dropped: Callable[..., bool],
    *,
    is_answer: bool,
) -> None:
    """`text` is the rendered row, and `sentinel_text` the one with sentinels. An answer is kept
    from its first character on.

    Raises:
        DataError: the template drops the content of the message.
    """
    content = message.get("content") or ""
    if not content.strip():
        return
    is_in_text = content.strip() in text
    is_rendered = make_sentinel(index) in sentinel_text or (
        is_in_text and not may_be_dropped(message)
    )
    is_dropped = not is_rendered and is_change_dropped(content=content + CHANGE)
    if is_answer and not is_in_text:
        is_dropped = is_dropped or is_change_dropped(content=CHANGE + content)
    if is_dropped:
        raise DataError(
            f"The model's chat template drops the content of message {index + 1} "
            f"({message['role']}) or its beginning. Use a model whose template supports it, or "
            "move the text into another message.",
            field="messages",
            code="template_drops_message",
        )


def may_be_dropped(message: dict[str, Any]) -> bool:
    """Whether templates drop such messages, so that a short text may be found by chance."""
    return message["role"] in ("system", "tool") or "tool_calls" in message


def make_sentinel(*position: int) -> str:
    """A text that is found only if the template shows the value at this position."""
    return "-".join([CHANGE, *map(str, position)]) + "."


def render_sentinels(row: dict[str, Any], render: Render) -> str:
    """The row, rendered with a sentinel in each content and call. Empty if the template rejects
    it.
    """
    messages = []
    for index, message in enumerate(row["messages"]):
        with_sentinels = {**message}
        if (message.get("content") or "").strip():
            with_sentinels["content"] = message["content"] + make_sentinel(index)
        if "tool_calls" in message:
            with_sentinels["tool_calls"] = [
                add_sentinel(call, make_sentinel(index, number))
                for number, call in enumerate(message["tool_calls"])
            ]
        messages.append(with_sentinels)
    try:
        return render(row | {"messages": messages})
    except TemplateTooSlow:
        raise
    except DataError:
        return ""


def add_sentinel(call: dict[str, Any], sentinel: str) -> dict[str, Any]:
    """The call with one more argument."""
    function = call["function"]
    arguments = {**(function.get("arguments") or {}), sentinel: sentinel}
    return call | {"function": function | {"arguments": arguments}}


def check_calls(
    message: dict[str, Any],
    index: int,
    text: str,
    sentinel_text: str,
    is_change_dropped: Callable[..., bool],
) -> None:
    """`text` is the rendered row, and `sentinel_text` the one with sentinels.

    Raises:
        DataError: the template drops a tool call of the message, or its arguments.
    """
    calls = message.get("tool_calls", [])
    for number, call in enumerate(calls):
        changed = [*calls]
        changed[number] = add_sentinel(call, CHANGE)
        name = call["function"]["name"]
        is_rendered = name in text and make_sentinel(index, number) in sentinel_text
        if not is_rendered and (name not in text or is_change_dropped(tool_calls=changed)):
            raise DataError(
                f"The model's chat template drops the tool call `{name[:80]}` (message "
                f"{index + 1}) or its arguments. Use a model whose template supports tools, or "
                "write the call as text of the assistant.",
                field="messages",
                code="template_without_tools",
            )
