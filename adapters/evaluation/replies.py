"""Generate the replies of versions to a prompt set with the inference server, score and
store them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx

from adapters.evaluation.scores import compute_scores
from adapters.lanes import ANSWERS
from adapters.models import AdapterVersion, PromptSet, Reply
from adapters.serving import inference_client
from training.catalog.models import BaseModel
from training.errors import UserError
from training.jobs.kinds import JobKind
from training.jobs.models import Job
from training.jobs.runner import get_subject, save_progress
from training.jobs.services import enqueue_job
from training.people.models import User
from training.text_input import clean_value

KIND = "answers"
MAX_CONCURRENT = 8
# Tokens of a reply; the fallback is for prompts that leave little room in the context
MAX_TOKENS, FALLBACK_MAX_TOKENS = 256, 64
# Two minutes, while the inference server is busy or restarts
MAX_TRIES, RETRY_SECONDS = 40, 3.0


class RowNotAnswerable(UserError):
    """This row cannot be answered, for example because it exceeds the context or the chat template
    rejects it.
    """


@dataclass(frozen=True)
class Responder:
    """What generates replies: a version, or its base model alone."""

    base: BaseModel
    version: AdapterVersion | None = None

    @property
    def key(self) -> str:
        return f"v{self.version.pk}" if self.version else f"b{self.base.pk}"

    @property
    def name(self) -> str:
        return str(self.version or self.base.name)


def request_replies(user: User, prompts: PromptSet, responder: Responder) -> Job:
    """Start to generate replies, or return the job that is running or done."""
    subjects = [prompts, responder.base, *([responder.version] if responder.version else [])]
    return enqueue_job(user, KIND, f"{prompts.pk}:{responder.key}", subjects=subjects)


def run_replies(job: Job) -> dict[str, Any]:
    """Generate replies to the rows that have none yet."""
    prompts, base = get_subject(job, PromptSet), get_subject(job, BaseModel)
    assert prompts is not None and base is not None
    responder = Responder(base, get_subject(job, AdapterVersion, "base_model"))
    target_fields = (
        inference_client.build_target_fields(responder.version, job.owner)
        if responder.version
        else inference_client.build_base_target_fields(responder.base, job.owner)
    )
    replies = Reply.objects.filter(
        prompts=prompts, version=responder.version, base_model=responder.base
    )
    answered_rows = set(replies.values_list("row", flat=True))
    missing_rows = [
        row_index for row_index in range(len(prompts.rows)) if row_index not in answered_rows
    ]
    errors: list[str] = []
    progress = {"message": "generating", "done": len(answered_rows), "total": len(prompts.rows)}
    save_progress(job, progress)
    for row_index, reply in generate_concurrently(
        {index: prompts.rows[index] for index in missing_rows}, target_fields
    ):
        if isinstance(reply, Reply):
            reply.prompts, reply.row, reply.version, reply.base_model = (
                prompts,
                row_index,
                responder.version,
                responder.base,
            )
            Reply.objects.bulk_create([reply], ignore_conflicts=True)
        else:
            errors.append(reply)
        answered_rows.add(row_index)
        save_progress(job, {"done": len(answered_rows)})
    if errors and len(errors) == len(missing_rows):
        raise UserError(errors[0])
    return {
        "rows": len(answered_rows) - len(errors),
        "failed_rows": len(errors),
        "failure_reason": errors[0] if errors else "",
    }


def generate_concurrently(
    rows: dict[int, dict[str, Any]], target_fields: dict[str, Any]
) -> Iterator[tuple[int, Reply | str]]:
    """Yield each row's index with its reply, or with the reason why there is none, as soon as it is
    ready. MAX_CONCURRENT rows run at a time and do not wait for each other.
    """
    remaining_rows = iter(rows.items())
    pending: dict[asyncio.Task[Reply | str], int] = {}
    with asyncio.Runner() as runner:
        while True:
            for row_index, row in islice(remaining_rows, MAX_CONCURRENT - len(pending)):
                pending[runner.get_loop().create_task(try_generate_reply(row, target_fields))] = (
                    row_index
                )
            if not pending:
                return
            finished, _ = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
            for task in finished:
                yield pending.pop(task), task.result()


async def try_generate_reply(row: dict[str, Any], target_fields: dict[str, Any]) -> Reply | str:
    """A greedy reply with its scores, or the reason why the row cannot be answered. An unanswerable
    row does not stop the others.
    """
    try:
        return await generate_reply(row, target_fields)
    except RowNotAnswerable as error:
        return error.message


async def generate_reply(row: dict[str, Any], target_fields: dict[str, Any]) -> Reply:
    request = {**target_fields, "messages": row["messages"], "temperature": 0}
    try:
        completion = await request_with_retry({**request, "max_tokens": MAX_TOKENS})
    except RowNotAnswerable:
        completion = await request_with_retry({**request, "max_tokens": FALLBACK_MAX_TOKENS})
    message, usage = completion["choices"][0]["message"], completion["usage"]
    text = clean_value(message["content"] or "")
    expected = row["expected"]
    if message.get("reasoning_content"):  # then the reply has no reasoning
        expected = expected.rpartition("</think>")[2].lstrip()
    scores = compute_scores(text, expected)
    if row["expected"].strip():
        perplexity = await compute_perplexity(row, target_fields, usage["prompt_tokens"])
        scores |= {} if perplexity is None else {"perplexity": perplexity}
    rate = completion.get("snapml", {}).get("tokens_per_second") or 0.0
    seconds = usage["completion_tokens"] / rate if rate else 0.0
    return Reply(text=text, scores=scores, tokens=usage["completion_tokens"], seconds=seconds)


async def compute_perplexity(
    row: dict[str, Any], target_fields: dict[str, Any], prompt_tokens: int
) -> float | None:
    """exp of the mean cross entropy (nats) of the expected answer's tokens given the prompt. None
    if the server returns no log probabilities.
    """
    messages = [*row["messages"], {"role": "assistant", "content": row["expected"]}]
    request = {
        **target_fields,
        "messages": messages,
        "max_tokens": 1,
        "prompt_logprobs": 0,
        "add_generation_prompt": False,
    }
    completion = await request_with_retry(request)
    entries = [
        entry for entry in (completion.get("prompt_logprobs") or [])[prompt_tokens:] if entry
    ]
    logprobs = [next(iter(entry.values()))["logprob"] for entry in entries]
    return math.exp(min(700.0, -sum(logprobs) / len(logprobs))) if logprobs else None


async def request_with_retry(body: dict[str, Any]) -> dict[str, Any]:
    """Send a request and retry while the inference server is busy or starting.

    Raises:
        UserError: it rejected the request, or was busy for two minutes.
    """
    message = ""
    for _ in range(MAX_TRIES):
        try:
            async with inference_client.stream_request("/v1/chat/completions", body) as response:
                await response.aread()
            if response.status_code == httpx.codes.OK:
                completion: dict[str, Any] = response.json()
                return completion
            message = inference_client.get_error_message(response)
            if response.status_code == httpx.codes.BAD_REQUEST:
                raise RowNotAnswerable(message)
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                raise UserError(message)
        except inference_client.InferenceUnavailable as unavailable:
            message = unavailable.message
        await asyncio.sleep(RETRY_SECONDS)
    raise UserError(message)


REPLIES_JOB = JobKind(
    KIND, run_replies, lane=ANSWERS, subjects=(PromptSet, AdapterVersion, BaseModel)
)
