"""Prompt sets for comparing versions, drawn from held-out data or pasted."""

from __future__ import annotations

from typing import Any

from adapters.models import PromptSet
from training.datasets.models import DatasetVersion
from training.datasets.preview import sample_eval_prompts
from training.datasets.rows import ROLES
from training.errors import UserError, to_one_line
from training.people.models import User
from training.people.permissions import check_changeable
from training.text_input import InvalidInput, check_text, parse_json

MAX_ROWS = 500
MAX_CHARACTERS = 400_000


def draw_prompts(user: User, data: DatasetVersion, count: int, *, title: str = "") -> PromptSet:
    """Draw held-out (or test) rows of a dataset version at even intervals. Drawing the same rows
    again returns the existing set.

    Raises:
        UserError: an invalid count, or data without held-out rows.
    """
    if not 1 <= count <= MAX_ROWS:
        raise UserError(f"A prompt set has 1 to {MAX_ROWS} rows.", field="count")
    rows = sample_eval_prompts(data, count)
    if not rows:
        raise UserError(f"{data} has no held-out rows. Paste prompts instead.", field="data")
    name = f"{title}{data}, {len(rows)} {rows[0]['split']} rows"[:120]
    existing: PromptSet | None = PromptSet.objects.filter(owner=user, data=data, name=name).first()
    prompt_rows = [{"messages": row["messages"], "expected": row["expected"]} for row in rows]
    return existing or PromptSet.objects.create(
        owner=user, team=data.dataset.team, name=name, data=data, rows=prompt_rows
    )


def paste_prompts(user: User, text: str, name: str) -> PromptSet:
    """One prompt per line: plain text, or JSON with `messages` or `prompt`, and optionally
    `expected`.

    Raises:
        UserError: a line that cannot be parsed, with its number; too many lines.
    """
    check_text(text, "text")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"The prompts exceed {MAX_CHARACTERS:,} characters.", field="text")
    rows = [
        parse_line(line, line_number)
        for line_number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not 1 <= len(rows) <= MAX_ROWS:
        raise UserError(f"A prompt set has 1 to {MAX_ROWS} rows; got {len(rows):,}.", field="text")
    title = to_one_line(name)[:120] or f"{len(rows)} pasted prompts"
    return PromptSet.objects.create(owner=user, team=user.get_sharing_team(), name=title, rows=rows)


def delete_prompts(user: User, prompts: PromptSet) -> None:
    """Delete a prompt set with its jobs, replies and votes. Raises NotAllowed if the
    user may not.
    """
    check_changeable(user, prompts)
    prompts.delete()


def parse_line(line: str, line_number: int) -> dict[str, Any]:
    """Raises UserError: what is wrong with the line, and its number."""
    if not line.lstrip().startswith("{"):
        return {"messages": [{"role": "user", "content": line.strip()}], "expected": ""}
    try:
        entry = parse_json(line, f"Line {line_number}")
    except InvalidInput as error:
        raise UserError(f"Line {line_number}: {error.message}", field="text") from error
    messages = entry.get("messages") or [{"role": "user", "content": entry.get("prompt")}]
    expected = entry.get("expected", "")
    is_valid = isinstance(messages, list) and all(
        isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str)
        for one in messages
    )
    if not is_valid or not isinstance(expected, str):
        raise UserError(
            f'Line {line_number} needs "prompt" (text) or "messages" (each with role and content); '
            '"expected" must be text.',
            field="text",
        )
    return {
        "messages": [{"role": one["role"], "content": one["content"]} for one in messages],
        "expected": expected,
    }
