"""The live socket: permissions, and event streams without gaps or duplicates."""

import asyncio
import json

import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from django.test import override_settings

from snapml_site.asgi import application
from tests.runs.journals import Journal, step_event
from training.runs.live import consumers, frames, messages
from training.runs.models import Run
from training.runs.worker.ingest import store_events
from training.runs.worker.lease import claim_run

pytestmark = pytest.mark.django_db(transaction=True)
ORIGIN = (b"origin", b"http://localhost")
HOST = (b"host", b"localhost")


def create_session(user):
    session = SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.save()
    return session.session_key


async def connect_socket(user=None, headers=(ORIGIN, HOST)):
    headers = list(headers)
    if user is not None:
        key = await sync_to_async(create_session)(user)
        headers.append((b"cookie", f"snapml_session={key}".encode()))
    socket = WebsocketCommunicator(application, "/ws/live", headers)
    connected, _ = await socket.connect()
    return socket, connected


async def read_close_code(socket):
    message = await socket.receive_output(5)
    while message["type"] != "websocket.close":
        message = await socket.receive_output(5)
    return message["code"]


async def subscribe_run(socket, run, cursor=0):
    await socket.send_json_to({"type": "sub", "run": run.pk, "cursor": cursor, "points": 100})


async def receive_message(socket, run, *, ack=True):
    message = await socket.receive_json_from(5)
    if ack:
        last = message["upto"] if message["type"] == "snap" else message["last"]
        await socket.send_json_to({"type": "ack", "run": run.pk, "seq": last})
    return message


@pytest.fixture
def writer(run):
    """Stores events of a run as its worker does."""
    lease, journal = claim_run(run.pk), Journal()
    record = Run.objects.get(pk=run.pk)

    def write(*events):
        store_events(lease, record, journal.lines(*events), journal.seq)

    return sync_to_async(write)


async def test_a_snapshot_is_followed_by_deltas_without_gaps_or_duplicates(run, alice, writer):
    await writer(step_event(1), step_event(2))
    socket, connected = await connect_socket(alice)
    assert connected
    await subscribe_run(socket, run)
    snap = await receive_message(socket, run)
    assert (snap["type"], snap["upto"], snap["curves"]["points"]) == ("snap", 2, 2)
    seqs = []
    for n in range(3, 23):
        await writer(step_event(n))
        await asyncio.sleep(0.01)
    while len(seqs) < 20:
        delta = await receive_message(socket, run)
        assert delta["first"] == (seqs[-1] if seqs else 2) + 1
        seqs += [event["seq"] for event in delta["events"]]
        assert not seqs or delta["last"] == seqs[-1]
    assert seqs == list(range(3, 23))
    await socket.disconnect()


async def test_events_before_an_ack_arrive_in_one_frame(run, alice, writer):
    socket, _ = await connect_socket(alice)
    await subscribe_run(socket, run)
    await receive_message(socket, run, ack=False)
    for n in range(1, 11):
        await writer(step_event(n))
    assert await socket.receive_nothing(0.3)
    await socket.send_json_to({"type": "ack", "run": run.pk, "seq": 0})
    delta = await receive_message(socket, run)
    assert [event["step"] for event in delta["events"]] == list(range(1, 11))
    await socket.disconnect()


async def test_a_client_that_reconnects_gets_the_missed_events(run, alice, writer):
    await writer(*[step_event(n) for n in range(1, 11)])
    socket, _ = await connect_socket(alice)
    await subscribe_run(socket, run, cursor=4)
    delta = await receive_message(socket, run)
    assert [event["seq"] for event in delta["events"]] == [5, 6, 7, 8, 9, 10]
    await socket.disconnect()


async def test_a_client_that_is_far_behind_or_ahead_gets_a_snapshot(
    run, alice, writer, monkeypatch
):
    monkeypatch.setattr("training.runs.live.messages.RESYNC_THRESHOLD", 5)
    await writer(*[step_event(n) for n in range(1, 11)])
    for cursor in (1, 99):
        socket, _ = await connect_socket(alice)
        await subscribe_run(socket, run, cursor=cursor)
        assert (await receive_message(socket, run))["type"] == "snap"
        await socket.disconnect()


async def test_a_change_of_state_without_events_is_sent(run, alice):
    socket, _ = await connect_socket(alice)
    await subscribe_run(socket, run)
    assert (await receive_message(socket, run))["state"]["label"] == "Queued"
    await sync_to_async(Run.objects.filter(pk=run.pk).update)(
        state="failed", message="No.", revision=9
    )
    message = await receive_message(socket, run)
    assert (message["state"]["label"], message["state"]["message"], message["events"]) == (
        "Failed",
        "No.",
        [],
    )
    await socket.disconnect()


async def test_fifty_dropped_sockets_cause_no_gap_and_no_duplicate(run, alice, writer):
    seqs = []
    total = 10_000

    async def produce():
        for at in range(0, total, 50):
            await writer(*[step_event(n) for n in range(at + 1, at + 51)])
            await asyncio.sleep(0.02)

    task = asyncio.create_task(produce())
    cursor, drops = 1, 0
    await asyncio.sleep(0.05)
    while not seqs or seqs[-1] < total:
        socket, _ = await connect_socket(alice)
        await subscribe_run(socket, run, cursor=cursor)
        frames = 0
        while (frames < 1 or drops >= 50) and (not seqs or seqs[-1] < total):
            delta = await receive_message(socket, run)
            assert delta["type"] == "delta"
            seqs += [event["seq"] for event in delta["events"]]
            cursor = delta["last"]
            frames += 1
        drops += 1
        await socket.disconnect()
    await task
    assert drops >= 50
    assert seqs == list(range(2, total + 1))


async def test_a_team_member_may_subscribe(run, people):
    socket, _ = await connect_socket(people["bob"])
    await subscribe_run(socket, run)
    assert (await receive_message(socket, run))["type"] == "snap"
    await socket.disconnect()


async def test_users_outside_the_team_may_not_subscribe(run, people):
    socket, _ = await connect_socket(people["mallory"])
    await subscribe_run(socket, run)
    assert await read_close_code(socket) == consumers.FORBIDDEN


async def test_without_a_session_the_socket_is_closed_at_once(db):
    socket, _ = await connect_socket()
    assert await read_close_code(socket) == consumers.SIGNED_OUT


async def test_a_user_with_a_one_time_password_gets_no_socket(alice):
    alice.must_change_password = True
    await alice.asave()
    socket, _ = await connect_socket(alice)
    assert await read_close_code(socket) == consumers.SIGNED_OUT


@pytest.mark.parametrize(
    "headers",
    [
        (HOST,),
        ((b"origin", b"http://localhost:8888"), HOST),
        ((b"origin", b"https://localhost"), HOST),
        ((b"origin", b"null"), HOST),
        ((b"origin", b"http://evil.example"), HOST),
        ((b"origin", b"http://evil.example"), (b"host", b"evil.example")),
    ],
)
async def test_another_origin_is_rejected(alice, headers):
    _, connected = await connect_socket(alice, headers)
    assert not connected


@pytest.mark.parametrize("change", ["session", "team", "inactive"])
async def test_losing_access_closes_the_socket(run, people, monkeypatch, change):
    monkeypatch.setattr(consumers, "CHECK_SECONDS", 0.0)
    bob = people["bob"]
    socket, _ = await connect_socket(bob)
    await subscribe_run(socket, run)
    await receive_message(socket, run)
    if change == "session":
        await sync_to_async(SessionStore.get_model_class().objects.all().delete)()
    elif change == "team":
        await sync_to_async(bob.teams.clear)()
    else:
        bob.is_active = False
        await bob.asave()
    expected = consumers.FORBIDDEN if change == "team" else consumers.SIGNED_OUT
    assert await read_close_code(socket) == expected


BAD = [
    "{nope",
    "[]",
    '{"type": "sub"}',
    '{"type": "sub", "run": "1", "cursor": 0}',
    '{"type": "sub", "run": 1, "cursor": -1}',
    '{"type": "sub", "run": 1, "cursor": 1.5}',
    '{"type": "sub", "run": 1, "cursor": NaN}',
    '{"type": "sub", "run": true, "cursor": 0}',
    '{"type": "sub", "run": 1, "cursor": 1e400}',
    "[" * 4000,
]


@pytest.mark.parametrize("text", BAD)
async def test_an_invalid_message_closes_the_socket(alice, text):
    socket, _ = await connect_socket(alice)
    await socket.send_to(text_data=text)
    assert await read_close_code(socket) == consumers.BAD_MESSAGE


async def test_too_long_and_too_many_messages_close_the_socket(alice):
    socket, _ = await connect_socket(alice)
    await socket.send_to(text_data=json.dumps({"type": "x" * 5000}))
    assert await read_close_code(socket) == consumers.LIMIT_EXCEEDED
    socket, _ = await connect_socket(alice)
    for _ in range(12):
        await socket.send_json_to({"type": "unsub", "run": 1})
    assert await read_close_code(socket) == consumers.LIMIT_EXCEEDED


async def test_a_user_has_at_most_twenty_open_sockets(alice):
    sockets = [(await connect_socket(alice))[0] for _ in range(20)]
    extra, _ = await connect_socket(alice)
    assert await read_close_code(extra) == consumers.LIMIT_EXCEEDED
    for socket in sockets:
        await socket.disconnect()
    assert consumers.sockets_per_user[alice.pk] == 0
    again, connected = await connect_socket(alice)
    assert connected
    assert await again.receive_nothing(0.1)
    await again.disconnect()


async def test_a_frame_without_an_ack_closes_the_socket(run, alice, monkeypatch):
    monkeypatch.setattr(consumers, "ACK_SECONDS", 0.0)
    socket, _ = await connect_socket(alice)
    await subscribe_run(socket, run)
    await receive_message(socket, run, ack=False)
    assert await read_close_code(socket) == consumers.TOO_SLOW


async def test_an_internal_error_closes_the_socket_so_that_the_browser_reconnects(
    run, alice, monkeypatch
):
    async def broken(_request):
        raise RuntimeError("the database is not available")

    monkeypatch.setattr(frames, "build_frame", broken)
    socket, _ = await connect_socket(alice)
    await subscribe_run(socket, run)
    assert await read_close_code(socket) == consumers.INTERNAL_ERROR


async def test_deleting_a_run_closes_its_sockets(run, alice):
    socket, _ = await connect_socket(alice)
    await subscribe_run(socket, run)
    await receive_message(socket, run)
    await sync_to_async(Run.objects.filter(pk=run.pk).delete)()
    assert await read_close_code(socket) == consumers.FORBIDDEN


async def test_sockets_of_a_run_share_frames(run, alice, writer, monkeypatch):
    reads = []
    build_delta = messages.build_delta
    monkeypatch.setattr(
        messages, "build_delta", lambda *args: reads.append(args) or build_delta(*args)
    )
    await writer(step_event(1))
    sockets = [(await connect_socket(alice))[0] for _ in range(10)]
    for socket in sockets:
        await subscribe_run(socket, run)
        await receive_message(socket, run)
    await writer(step_event(2))
    deltas = [await receive_message(socket, run) for socket in sockets]
    assert [delta["last"] for delta in deltas] == [2] * 10
    assert len(reads) == 1
    for socket in sockets:
        await socket.disconnect()


async def test_a_frame_that_could_not_be_read_is_read_again(run, alice, monkeypatch):
    build_frame, calls = frames.build_frame, []

    async def fail_once(request):
        calls.append(request)
        if len(calls) == 1:
            raise RuntimeError("the database is not available")
        return await build_frame(request)

    monkeypatch.setattr(frames, "build_frame", fail_once)
    for expected in (consumers.INTERNAL_ERROR, None):
        socket, _ = await connect_socket(alice)
        await subscribe_run(socket, run)
        if expected:
            assert await read_close_code(socket) == expected
        else:
            assert (await receive_message(socket, run))["type"] == "snap"
            await socket.disconnect()


async def test_the_shared_frames_are_limited(run, alice, monkeypatch):
    monkeypatch.setattr(frames, "MAX_CACHED_FRAMES", 2)
    cache, revision = frames.FrameCache(), frames.Revision(0, 0, False)
    for points in range(10, 16):
        await cache.get_frame(frames.FrameRequest(run.pk, 0, points), revision)
    assert len(cache._frames) <= 3
    monkeypatch.setattr(frames, "MAX_CACHED_BYTES", 1)
    await cache.get_frame(frames.FrameRequest(run.pk, 0, 99), revision)
    assert len(cache._frames) == 1
    cache.drop_run(run.pk)
    assert not cache._frames


async def test_the_host_must_be_allowed(alice):
    with override_settings(ALLOWED_HOSTS=["snapml.example"]):
        _, connected = await connect_socket(
            alice, ((b"origin", b"http://snapml.example"), (b"host", b"snapml.example"))
        )
        assert connected
        _, connected = await connect_socket(alice)
        assert not connected


async def test_no_second_frame_of_a_run_is_sent_before_an_ack(run, alice):
    socket, _ = await connect_socket(alice)
    await subscribe_run(socket, run)
    await receive_message(socket, run, ack=False)
    for _ in range(3):
        await socket.send_json_to({"type": "unsub", "run": run.pk})
        await subscribe_run(socket, run)
    assert await socket.receive_nothing(1.5)
    await socket.send_json_to({"type": "ack", "run": run.pk, "seq": 0})
    assert (await receive_message(socket, run))["type"] == "snap"
    await socket.disconnect()


async def test_the_unacknowledged_frames_of_a_socket_are_limited(run, alice, monkeypatch):
    monkeypatch.setattr(consumers, "MAX_UNACKED_BYTES", 1)
    other = await Run.objects.aget(pk=run.pk)
    other.pk = None
    await other.asave()
    socket, _ = await connect_socket(alice)
    await subscribe_run(socket, run)
    await receive_message(socket, run, ack=False)
    await subscribe_run(socket, other)
    assert await socket.receive_nothing(1.5)
    await socket.send_json_to({"type": "ack", "run": run.pk, "seq": 0})
    assert (await receive_message(socket, other))["run"] == other.pk
    await socket.disconnect()
