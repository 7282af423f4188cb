"""Ask versions the prompts of a set through the inference program, score what they say, and keep
it: asked once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx

from adapters.evaluation.scores import scores_of
from adapters.lanes import ANSWERS
from adapters.models import AdapterVersion, PromptSet, Reply
from adapters.serving import inference_client
from training.catalog.models import BaseModel
from training.errors import UserError
from training.jobs.kinds import JobKind
from training.jobs.models import Job
from training.jobs.runner import get_subject, save_progress
from training.jobs.services import enqueue
from training.people.models import User

KIND = "answers"
AT_ONCE = 8
# Of a reply; fewer where prompt and reply would not fit the model's context
MOST_TOKENS, FEWER_TOKENS = (
    256,
    64,
)
TRIES, PAUSE_SECONDS = 40, 3.0  # while the inference program is busy or starts again: two minutes


class Refusal(UserError):
    """This row cannot be answered: longer than the context, say, or a conversation that the
    template does not take.
    """


@dataclass(frozen=True)
class Column:
    """Who answers: a version, or its base alone."""

    base: BaseModel
    version: AdapterVersion | None = None

    @property
    def key(self) -> str:
        return f"v{self.version.pk}" if self.version else f"b{self.base.pk}"

    @property
    def name(self) -> str:
        return str(self.version or self.base.name)


def ask(user: User, prompts: PromptSet, column: Column) -> Job:
    """Begin to ask, or tell of the asking that is under way or done."""
    subjects = [prompts, column.base, *([column.version] if column.version else [])]
    return enqueue(user, KIND, f"{prompts.pk}:{column.key}", subjects=subjects)


def run_answers(job: Job) -> dict[str, Any]:
    """Ask the rows that have no reply yet."""
    prompts, base = get_subject(job, PromptSet), get_subject(job, BaseModel)
    assert prompts is not None and base is not None
    column = Column(base, get_subject(job, AdapterVersion, "base_model"))
    told = (
        inference_client.addressed(column.version)
        if column.version
        else inference_client.addressed_base(column.base)
    )
    replies = Reply.objects.filter(prompts=prompts, version=column.version, base_model=column.base)
    done = set(replies.values_list("row", flat=True))
    left = [place for place in range(len(prompts.rows)) if place not in done]
    refused: list[str] = []
    progress = {"message": "asking", "done": len(done), "total": len(prompts.rows)}
    save_progress(job, progress)
    for place, reply in as_they_come({place: prompts.rows[place] for place in left}, told):
        if isinstance(reply, Reply):
            reply.prompts, reply.row, reply.version, reply.base_model = (
                prompts,
                place,
                column.version,
                column.base,
            )
            Reply.objects.bulk_create([reply], ignore_conflicts=True)
        else:
            refused.append(reply)
        done.add(place)
        save_progress(job, {"done": len(done)})
    if refused and len(refused) == len(left):
        raise UserError(refused[0])
    return {
        "rows": len(done) - len(refused),
        "refused": len(refused),
        "why": refused[0] if refused else "",
    }


def as_they_come(
    rows: dict[int, dict[str, Any]], told: dict[str, Any]
) -> Iterator[tuple[int, Reply | str]]:
    """Each row's place and reply, or why there is none, as soon as it is there; none of the AT_ONCE
    waits for another.
    """
    left = iter(rows.items())
    under_way: dict[asyncio.Task[Reply | str], int] = {}
    with asyncio.Runner() as runner:
        while True:
            for place, row in islice(left, AT_ONCE - len(under_way)):
                under_way[runner.get_loop().create_task(ask_one(row, told))] = place
            if not under_way:
                return
            ready, _ = runner.run(asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED))
            for task in ready:
                yield under_way.pop(task), task.result()


async def ask_one(row: dict[str, Any], told: dict[str, Any]) -> Reply | str:
    """A greedy reply with its scores; or why this row cannot be answered, which is no reason not to
    ask the others.
    """
    try:
        return await answered(row, told)
    except Refusal as refusal:
        return refusal.message


async def answered(row: dict[str, Any], told: dict[str, Any]) -> Reply:
    question = {**told, "messages": row["messages"], "temperature": 0}
    try:
        answer = await patiently({**question, "max_tokens": MOST_TOKENS})
    except Refusal:
        answer = await patiently({**question, "max_tokens": FEWER_TOKENS})
    text, used = str(answer["choices"][0]["message"]["content"]).replace("\0", ""), answer["usage"]
    scores = scores_of(text, row["expected"])
    if row["expected"].strip():
        perplexity = await perplexity_of(row, told, used["prompt_tokens"])
        scores |= {} if perplexity is None else {"perplexity": perplexity}
    rate = answer.get("snapml", {}).get("tokens_per_second") or 0.0
    seconds = used["completion_tokens"] / rate if rate else 0.0
    return Reply(text=text, scores=scores, tokens=used["completion_tokens"], seconds=seconds)


async def perplexity_of(
    row: dict[str, Any], told: dict[str, Any], prompt_tokens: int
) -> float | None:
    """exp of the mean cross entropy (nats) of the expected answer's tokens after the prompt; None
    if the server tells none.
    """
    whole = [*row["messages"], {"role": "assistant", "content": row["expected"]}]
    asked = {
        **told,
        "messages": whole,
        "max_tokens": 1,
        "prompt_logprobs": 0,
        "add_generation_prompt": False,
    }
    answer = await patiently(asked)
    entries = [entry for entry in (answer.get("prompt_logprobs") or [])[prompt_tokens:] if entry]
    chances = [next(iter(entry.values()))["logprob"] for entry in entries]
    return math.exp(min(700.0, -sum(chances) / len(chances))) if chances else None


async def patiently(body: dict[str, Any]) -> dict[str, Any]:
    """The answer, after as many tries as it takes while the inference program is busy or starts.

    Raises:
        UserError: it refused, or was busy for two minutes.
    """
    words = ""
    for _ in range(TRIES):
        try:
            async with inference_client.asked("/v1/chat/completions", body) as response:
                await response.aread()
            if response.status_code == httpx.codes.OK:
                told: dict[str, Any] = response.json()
                return told
            words = inference_client.reason(response)
            if response.status_code == httpx.codes.BAD_REQUEST:
                raise Refusal(words)
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                raise UserError(words)
        except inference_client.Down as down:
            words = down.message
        await asyncio.sleep(PAUSE_SECONDS)
    raise UserError(words)


ANSWERS_JOB = JobKind(
    KIND, run_answers, lane=ANSWERS, subjects=(PromptSet, AdapterVersion, BaseModel)
)
