"""Comparing versions: URL parameters, replies, scores, differences, weights and blind votes."""

import asyncio

import httpx
import pytest

from adapters.evaluation import prompt_sets, replies, votes, weight_analysis
from adapters.evaluation.answer_table import build_table_rows, diff_text
from adapters.lanes import ANSWERS, PROGRAMS
from adapters.models import AdapterVersion, PromptSet, Reply, Vote
from adapters.serving import inference_client
from tests.registry import register_version
from tests.user_errors import raises_user_error
from training.jobs.models import Job
from training.jobs.runner import run_lane
from training.jobs.services import find_jobs_about

pytestmark = pytest.mark.django_db


@pytest.fixture
def pair(run):
    return [
        register_version(run, number=number, provenance={"settings": {"rank": number, "alpha": 8}})
        for number in (1, 2)
    ]


@pytest.fixture
def prompts(alice, pair):
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}], "expected": f"it is {n}"}
        for n in range(12)
    ]
    return PromptSet.objects.create(owner=alice, team=pair[0].team, name="Twelve", rows=rows)


@pytest.fixture
def echo(settings, monkeypatch):
    """An inference server that answers `it is N` as version 1 and `it was N` as all others, with a
    log probability of -0.5 for every token.
    """
    requests = []

    def answer(request):
        import json

        body = json.loads(request.content)
        requests.append(body)
        if "prompt_logprobs" in body:
            scored = [None, *({"5": {"logprob": -0.5}} for _ in range(7))]
            payload = {
                "choices": [{"message": {"content": ""}}],
                "usage": {"prompt_tokens": 8, "completion_tokens": 1},
            }
            return httpx.Response(200, json={**payload, "prompt_logprobs": scored})
        number = body["messages"][-1]["content"].split()[1]
        text = f"it {'is' if '-v1-' in body['model'] else 'was'} {number}"
        usage = {"prompt_tokens": 5, "completion_tokens": 3}
        payload = {
            "choices": [{"message": {"content": text}}],
            "usage": usage,
            "snapml": {"tokens_per_second": 30.0},
        }
        return httpx.Response(200, json=payload)

    settings.INFERENCE_URL = "http://inference"
    transport, client = httpx.MockTransport(answer), httpx.AsyncClient
    monkeypatch.setattr(
        inference_client.httpx, "AsyncClient", lambda **_: client(transport=transport)
    )
    return requests


def collect_replies(alice, prompts, pair):
    for version in (*pair, None):
        replies.request_replies(alice, prompts, replies.Responder(pair[0].base_model, version))
    while Job.objects.filter(state="waiting").exists():
        run_lane(ANSWERS)


def test_every_column_gets_one_scored_reply_per_row(alice, prompts, pair, echo):
    collect_replies(alice, prompts, pair)
    assert Reply.objects.count() == 36
    first = Reply.objects.get(version=pair[0], row=3)
    assert (first.text, first.scores["exact"], first.seconds) == (
        "it is 3",
        1.0,
        pytest.approx(0.1),
    )
    assert first.scores["perplexity"] == pytest.approx(2.718281828**0.5)
    assert Reply.objects.get(version=pair[1], row=3).scores["exact"] == 0.0
    before = len(echo)
    collect_replies(alice, prompts, pair)
    assert len(echo) == before  # no new requests


def test_a_reply_is_scored_without_the_thoughts_on_either_side(monkeypatch):
    async def answer(body):
        message = {"content": "it is 3", "reasoning_content": "three"}
        usage = {"prompt_tokens": 5, "completion_tokens": 9}
        return {"choices": [{"message": message}], "usage": usage}

    monkeypatch.setattr(replies, "request_with_retry", answer)
    row = {"messages": [], "expected": "<think>\nmaybe\n</think>\n\nit is 3"}
    reply = asyncio.run(replies.generate_reply(row, {}))
    assert (reply.text, reply.scores["exact"]) == ("it is 3", 1.0)


def test_a_slow_row_does_not_delay_the_others(monkeypatch):
    others = asyncio.Event()
    started_rows = []

    async def answer(row, _target_fields):
        started_rows.append(row)
        if row == 0:
            await asyncio.wait_for(others.wait(), 10)
        elif len(started_rows) == 20:
            others.set()
        return str(row)

    monkeypatch.setattr(replies, "try_generate_reply", answer)
    results = list(replies.generate_concurrently({index: index for index in range(20)}, {}))
    assert sorted(results) == [(index, str(index)) for index in range(20)]
    assert results[-1] == (0, "0")


def test_an_interrupted_job_continues_with_the_missing_rows(alice, prompts, pair, echo):
    collect_replies(alice, prompts, pair)
    Reply.objects.filter(version=pair[0], row__in=(2, 7)).delete()
    find_jobs_about(pair[0]).update(state="failed")
    before = len(echo)
    replies.request_replies(alice, prompts, replies.Responder(pair[0].base_model, pair[0]))
    run_lane(ANSWERS)
    assert len(echo) == before + 4
    assert Reply.objects.filter(version=pair[0]).count() == 12


def test_an_error_of_the_inference_server_fails_the_job(
    alice, prompts, pair, settings, monkeypatch
):
    settings.INFERENCE_URL = "http://inference"
    reject = httpx.MockTransport(
        lambda _request: httpx.Response(400, json={"error": {"message": "too long"}})
    )
    client = httpx.AsyncClient
    monkeypatch.setattr(inference_client.httpx, "AsyncClient", lambda **_: client(transport=reject))
    job = replies.request_replies(alice, prompts, replies.Responder(pair[0].base_model, pair[0]))
    run_lane(ANSWERS)
    job.refresh_from_db()
    assert job.state == "failed"
    assert "too long" in job.error


def test_the_page_shows_verdict_differences_and_figures_for_its_url(
    as_alice, alice, prompts, pair, echo
):
    collect_replies(alice, prompts, pair)
    address = (
        f"/adapters/compare?v={pair[0].pk}&v={pair[1].pk}&prompts={prompts.pk}&order=disagreement"
    )
    page = as_alice.get(address).content.decode()
    assert "Lights v1 beats Lights v2 on exact match, 100% vs. 0% on 12 rows" in page
    assert "<mark>was</mark>" in page
    assert page.count("data-same") >= 1
    assert "Tokens per second (inference)" in page
    assert "<b>By disagreement</b>" in page
    comparison = as_alice.get(
        f"/api/v1/comparisons?v={pair[0].pk}&v={pair[1].pk}&prompts={prompts.pk}"
    ).json()
    assert comparison["differences"]["rank"] == [1, 2]
    assert "alpha" not in comparison["differences"]
    assert comparison["verdicts"][0]["winner"] == "Lights v1"


def test_without_curves_the_tables_keep_their_colors_and_expand(as_alice, pair):
    address = f"/adapters/compare?v={pair[0].pk}&v={pair[1].pk}"
    page = as_alice.get(address).content.decode()
    assert "js/differences.js" in page and "js/compare.js" in page
    AdapterVersion.objects.update(run=None)  # as imported ones have none
    page = as_alice.get(address).content.decode()
    assert "js/differences.js" in page and "js/compare.js" not in page


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("v={0}", "Choose 2 to 6"),
        ("v={0}&v={0}", "Choose 2 to 6"),
        ("v=x&v=y", "got 1"),
        ("v={0}&v=999", "not found"),
    ],
)
def test_too_few_or_unknown_versions_are_an_error(as_alice, pair, query, message):
    answer = as_alice.get(f"/adapters/compare?{query.format(pair[0].pk)}")
    assert answer.status_code in (400, 404)
    assert message in answer.content.decode()


def test_users_without_access_cannot_compare_generate_or_vote(as_mallory, prompts, pair):
    query = f"v={pair[0].pk}&v={pair[1].pk}&prompts={prompts.pk}"
    assert as_mallory.get(f"/adapters/compare?{query}").status_code == 404
    assert as_mallory.get(f"/adapters/compare/answers?{query}").status_code == 404
    versions = {"v": [pair[0].pk, pair[1].pk], "prompts": prompts.pk}
    assert as_mallory.post("/adapters/compare/generate", versions).status_code == 404
    assert as_mallory.post("/adapters/compare/weights", versions).status_code == 404
    query_of_vote = f"prompts={prompts.pk}&first={pair[0].pk}&second={pair[1].pk}"
    assert as_mallory.get(f"/adapters/vote?{query_of_vote}").status_code == 404
    assert not Job.objects.exists()


def test_prompts_are_drawn_once_and_errors_in_pasted_ones_name_the_line(alice, data):
    prompts = prompt_sets.draw_prompts(alice, data, 40)
    assert prompt_sets.draw_prompts(alice, data, 40) == prompts
    assert all(row["expected"] for row in prompts.rows)
    pasted = prompt_sets.paste_prompts(alice, 'hello\n\n{"prompt": "a", "expected": "b"}\n', "Mine")
    assert pasted.rows[0] == {"messages": [{"role": "user", "content": "hello"}], "expected": ""}
    assert pasted.rows[1]["expected"] == "b"
    for text, fact in (('a\n{"prompt": 3}', "Line 2"), ("{nope", "Line 1"), ("", "500 rows")):
        with raises_user_error(field="text", naming=(fact,)):
            prompt_sets.paste_prompts(alice, text, "")
    with raises_user_error(field="count", naming=(500,)):
        prompt_sets.draw_prompts(alice, data, 0)


def test_rows_are_ordered_by_disagreement_or_by_the_worst_of_a_column():
    class FakeReply:
        def __init__(self, text, exact):
            self.text, self.scores = text, {"exact": exact}

    rows = [{"messages": [], "expected": "x"}] * 3
    columns = [
        {0: FakeReply("a", 1), 1: FakeReply("a", 0), 2: FakeReply("a", 1)},
        {0: FakeReply("a", 1), 1: FakeReply("a", 1), 2: FakeReply("b", 0)},
    ]
    assert [line.row for line in build_table_rows(rows, columns, "row")] == [0, 1, 2]
    assert build_table_rows(rows, columns, "disagreement")[0].row == 2
    assert build_table_rows(rows, columns, "worst-0")[0].row == 1
    assert build_table_rows(rows, columns, "worst-1")[0].row == 2
    assert [line.row for line in build_table_rows(rows, columns, "worst-99")] == [0, 1, 2]


def test_differing_words_are_flagged_and_the_text_stays_complete():
    pieces = diff_text("turn the hall lamp off", "turn the kitchen lamp off")
    assert "".join(text for text, _ in pieces) == "turn the hall lamp off"
    assert [text for text, differs in pieces if differs] == ["hall"]
    assert diff_text("same", "same") == [("same", False)]
    assert diff_text("", "x") == []


def test_a_vote_is_blind_counts_for_the_right_version_and_can_be_changed(
    as_alice, alice, people, prompts, pair, echo
):
    collect_replies(alice, prompts, pair)
    vote_pair = votes.get_next_pair(alice, prompts, *pair)
    page = as_alice.get(
        f"/adapters/vote?prompts={prompts.pk}&first={pair[1].pk}&second={pair[0].pk}"
    ).content.decode()
    assert "Lights v1" not in page
    assert "Lights v2" not in page
    form = {"prompts": prompts.pk, "first": pair[0].pk, "second": pair[1].pk, "row": vote_pair.row}
    choice = "left" if "is" in vote_pair.left.split() else "right"  # version 1 says `is`
    as_alice.post("/adapters/vote/cast", {**form, "choice": choice})
    assert Vote.objects.get().choice == "first"
    as_alice.post("/adapters/vote/cast", {**form, "choice": "tie"})
    assert Vote.objects.get().choice == "tie"
    assert votes.get_next_pair(alice, prompts, *pair).row != vote_pair.row
    assert as_alice.post("/adapters/vote/cast", {**form, "choice": "both"}).status_code == 400
    assert (
        as_alice.post("/adapters/vote/cast", {**form, "row": 99, "choice": "tie"}).status_code
        == 400
    )
    votes.cast_vote(people["bob"], prompts, tuple(pair), vote_pair.row, "tie")
    rate = votes.get_win_rate(*pair)
    assert (rate.votes, rate.voters, rate.ties, rate.rate) == (2, 2, 2, 0.5)


def test_sides_are_shuffled_and_stay_the_same_after_a_reload(alice, people, prompts, pair, echo):
    collect_replies(alice, prompts, pair)
    sides = [votes.stable_random(alice, prompts, *pair, row) % 2 for row in range(12)]
    assert 0 < sum(sides) < 12
    assert votes.get_next_pair(alice, prompts, *pair) == votes.get_next_pair(alice, prompts, *pair)


def test_a_weight_analysis_runs_once_and_is_stored(as_alice, pair, monkeypatch):
    calls = []
    monkeypatch.setattr(
        weight_analysis,
        "run_program",
        lambda *args, **_limits: calls.append(args) or {"relative_change": {}},
    )
    data = {"v": [pair[1].pk, pair[0].pk]}
    assert as_alice.post("/adapters/compare/weights", data).json()["state"] == "waiting"
    run_lane(PROGRAMS)
    payload = as_alice.post("/adapters/compare/weights", {"v": [pair[0].pk, pair[1].pk]}).json()
    assert payload["state"] == "done"
    assert payload["result"] == {"relative_change": {}, "overlaps": []}
    assert len(calls) == 1


def test_the_number_of_queries_does_not_grow_with_the_rows(
    as_alice, alice, prompts, pair, echo, django_assert_max_num_queries
):
    collect_replies(alice, prompts, pair)
    with django_assert_max_num_queries(24):
        as_alice.get(f"/adapters/compare?v={pair[0].pk}&v={pair[1].pk}&prompts={prompts.pk}")


def test_an_unanswerable_row_does_not_stop_the_others(alice, prompts, pair, settings, monkeypatch):
    settings.INFERENCE_URL = "http://inference"

    def answer(request):
        if b"say 3" in request.content:
            return httpx.Response(
                400, json={"error": {"message": "This model's context holds 256 tokens."}}
            )
        payload = {
            "choices": [{"message": {"content": "it is"}}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 3},
        }
        return httpx.Response(200, json=payload)

    client = httpx.AsyncClient
    monkeypatch.setattr(
        inference_client.httpx,
        "AsyncClient",
        lambda **_: client(transport=httpx.MockTransport(answer)),
    )
    job = replies.request_replies(alice, prompts, replies.Responder(pair[0].base_model, pair[0]))
    run_lane(ANSWERS)
    job.refresh_from_db()
    assert (job.state, job.result["rows"], job.result["failed_rows"]) == ("done", 11, 1)
    assert "context holds 256" in job.result["failure_reason"]
    assert Reply.objects.count() == 11


def test_polling_does_not_restart_a_failed_analysis_but_opening_the_page_does(as_alice, pair):
    data = {"v": [pair[0].pk, pair[1].pk]}
    as_alice.post("/adapters/compare/weights", data)
    Job.objects.update(state="failed", error="It failed.")
    assert as_alice.post("/adapters/compare/weights", data).json()["error"] == "It failed."
    assert (
        as_alice.post("/adapters/compare/weights", {**data, "again": "1"}).json()["state"]
        == "waiting"
    )


def test_all_held_out_rows_are_drawn_if_there_are_few(alice, data):
    from training.datasets.preview import sample_eval_prompts

    assert len(sample_eval_prompts(data, 40)) == data.eval_rows


def test_a_prompt_set_is_deleted_with_its_replies_and_jobs(as_alice, alice, run):
    pair = [register_version(run), register_version(run, number=2)]
    prompts = prompt_sets.paste_prompts(alice, "turn on the lamp", "Lamps")
    Reply.objects.create(prompts=prompts, row=0, base_model=run.base_model, text="yes")
    replies.request_replies(alice, prompts, replies.Responder(run.base_model))
    page = as_alice.get(
        f"/adapters/compare?v={pair[0].pk}&v={pair[1].pk}&prompts={prompts.pk}"
    ).content.decode()
    assert "Delete prompt set" in page
    answer = as_alice.post(
        f"/adapters/compare/prompts/{prompts.pk}/delete", {"v": [one.pk for one in pair]}
    )
    assert answer.url == f"/adapters/compare?v={pair[0].pk}&v={pair[1].pk}"
    assert not PromptSet.objects.exists()
    assert not Reply.objects.exists()
    assert not Job.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_deleting_a_prompt_set_ends_its_running_job(alice, run, settings, monkeypatch):
    settings.INFERENCE_URL = "http://inference"
    prompts = prompt_sets.paste_prompts(alice, "turn on the lamp\nturn it off", "Lamps")

    def generate_concurrently(rows, target_fields):
        prompt_sets.delete_prompts(alice, prompts)
        yield 0, Reply(text="yes")

    monkeypatch.setattr(replies, "generate_concurrently", generate_concurrently)
    replies.request_replies(alice, prompts, replies.Responder(run.base_model))
    run_lane(ANSWERS)
    assert not Reply.objects.exists()
    assert not Job.objects.exists()
