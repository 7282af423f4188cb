"""Sets of prompts that versions are compared on: drawn from data that nobody trained on, or pasted.
It knows no torch.
"""

from __future__ import annotations

import json
from typing import Any

from adapters.models import PromptSet
from training.datasets.models import DatasetVersion
from training.datasets.preview import held_out_prompts
from training.datasets.rows import ROLES
from training.errors import UserError, one_line
from training.people.models import User
from training.people.visible import may_change

MOST_ROWS = 500
MOST_CHARACTERS = 400_000


def draw_prompts(user: User, data: DatasetVersion, count: int, *, title: str = "") -> PromptSet:
    """The held-out (or test) rows of a version of data, spread evenly; the same set if it has been
    drawn before.

    Raises:
        UserError: a count that cannot be, or data with no such rows.
    """
    if not 1 <= count <= MOST_ROWS:
        raise UserError(f"A set of prompts has 1 to {MOST_ROWS} rows.", field="count")
    rows = held_out_prompts(data, count)
    if not rows:
        raise UserError(f"{data} holds no rows back; paste prompts instead.", field="data")
    name = f"{title}{data}, {len(rows)} {rows[0]['split']} rows"[:120]
    known: PromptSet | None = PromptSet.objects.filter(owner=user, data=data, name=name).first()
    kept = [{"messages": row["messages"], "expected": row["expected"]} for row in rows]
    return known or PromptSet.objects.create(
        owner=user, team=data.dataset.team, name=name, data=data, rows=kept
    )


def paste_prompts(user: User, text: str, name: str) -> PromptSet:
    """One prompt a line: plain text, or JSON with `messages` or `prompt`, and `expected` if there
    is an answer to compare with.

    Raises:
        UserError: a line that cannot be read, by its number; too many.
    """
    text = text.replace("\0", "")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"The prompts have more than {MOST_CHARACTERS:,} characters.", field="text")
    rows = [
        read_line(line, place)
        for place, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not 1 <= len(rows) <= MOST_ROWS:
        raise UserError(
            f"A set of prompts has 1 to {MOST_ROWS} rows; there are {len(rows):,}.", field="text"
        )
    title = one_line(name)[:120] or f"{len(rows)} pasted prompts"
    return PromptSet.objects.create(owner=user, team=user.first_team(), name=title, rows=rows)


def delete_prompts(user: User, prompts: PromptSet) -> None:
    """Delete a set with the jobs, replies and votes on it. Raises NotAllowed: not theirs."""
    may_change(user, prompts)
    prompts.delete()


def read_line(line: str, place: int) -> dict[str, Any]:
    """Raises UserError: what is wrong with it, and where."""
    if not line.lstrip().startswith("{"):
        return {"messages": [{"role": "user", "content": line.strip()}], "expected": ""}
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Line {place} begins as JSON and is none: {error}.", field="text"
        ) from error
    messages = told.get("messages") or [{"role": "user", "content": told.get("prompt")}]
    expected = told.get("expected", "")
    whole = isinstance(messages, list) and all(
        isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str)
        for one in messages
    )
    if not whole or not isinstance(expected, str):
        raise UserError(
            f'Line {place} needs "prompt" (a text) or "messages" (each with role and content); '
            '"expected" is a text, too.',
            field="text",
        )
    return {
        "messages": [{"role": one["role"], "content": one["content"]} for one in messages],
        "expected": expected,
    }
