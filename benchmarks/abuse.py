"""Attack an instance from outside, through HTTP and WebSockets only, and measure what another user
notices.

    python benchmarks/abuse.py [--json]

A new instance with a tiny model is started like `manage.py up` starts it. One user, `flood`,
attacks; another one, `other`, works. Memory is that of the web server's process: `idle_mb` before
the first attack, and by attack how far it grew. A process counts as running while it uses CPU time.
Every loop is bounded.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import hostile_files, print_report
from benchmarks.abused_site import (
    SEED_RUNS,
    SETUP,
    Client,
    measure_seconds,
    sign_in,
    train_and_deploy,
    watch_web,
)
from benchmarks.web_sockets import open_socket, send_message
from tests import tiny
from tests.running_site import RunningSite

MIB = 2**20
FLOOD_UPLOADS, FLOOD_REQUESTS, OTHER_REQUESTS, MAX_ANSWER_SECONDS = 30, 40, 12, 10.0
ACTIVE_STATES = ("starting", "running", "stopping")
QUOTA_GIB, MAX_QUEUED, FLOOD_COMPARISONS = 1, 100, 80
# Chat templates that never end, allocate 16 GB at once, or take minutes in one operation
TEMPLATES = {
    "looping": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "growing": "{{ ('x' * (messages | length * 16000000000)) | length }}",
    "stuck": "{{ (messages | length + 8) ** ((messages | length + 2) ** 19) }}",
}


def upload_rows(client: Client, name: str) -> httpx.Response:
    rows = "\n".join(json.dumps({"prompt": f"{name} {n}", "completion": "b"}) for n in range(200))
    return client.send("POST", "/api/v1/datasets/uploads", data={"rows": rows, "name": name})


def upload_file(client: Client, name: str, content: bytes) -> httpx.Response:
    return client.send("POST", "/api/v1/datasets/uploads", files={"file": (name, content)})


def flood_uploads(site: RunningSite, flood: Client, other: Client) -> dict[str, Any]:
    """Pasted rows and Parquet files that unpack to 100 MB, all at once."""
    parquet = hostile_files.build_small_parquet()
    with watch_web(site) as figures, ThreadPoolExecutor(FLOOD_UPLOADS) as pool:
        uploads = [
            pool.submit(upload_rows, flood, f"flood {number}")
            if number % 2
            else pool.submit(upload_file, flood, "flood.parquet", parquet)
            for number in range(FLOOD_UPLOADS)
        ]
        time.sleep(1)
        waited = measure_seconds(lambda: upload_rows(other, "other").raise_for_status())
        codes = Counter(upload.result().status_code for upload in uploads)
    return {
        "processes_at_once": int(figures["processes"]),
        "uploads_growth_mb": figures["growth_mb"],
        "upload_answers": dict(codes),
        "other_upload_s": waited,
    }


def send_hostile_files(site: RunningSite, flood: Client) -> dict[str, Any]:
    """Files that are small to send and large to read. None may be accepted."""
    zip_file = hostile_files.build_zip_of_many_entries(2_000_000)
    header = hostile_files.build_large_header(150_000)
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "lora_alpha": 16}
    adapter = [
        ("file", ("adapter_model.safetensors", header)),
        ("file", ("adapter_config.json", json.dumps(config).encode())),
    ]
    form = {"base": "1", "name": "hostile"}
    yaml_lines = ",".join(f"a{number}: [1, 2]" for number in range(3_600))
    with watch_web(site) as figures:
        answers = [
            flood.send("POST", "/api/v1/adapters/import", data=form, files=adapter),
            flood.send(
                "POST", "/api/v1/adapters/import", data=form, files={"file": ("a.zip", zip_file)}
            ),
            upload_file(flood, "a.zip", zip_file),
            flood.send(
                "POST", "/api/v1/people/me/webhooks", content=hostile_files.build_nested_json()
            ),
            flood.send("POST", "/v1/chat/completions", content=hostile_files.build_nested_json()),
        ]
    codes = [answer.status_code for answer in answers]
    assert all(400 <= code < 500 for code in codes), codes
    return {"files_growth_mb": figures["growth_mb"]} | measure_yaml(site, flood, yaml_lines)


def measure_yaml(site: RunningSite, flood: Client, lines: str) -> dict[str, Any]:
    """Seconds in which the health page is answered while a YAML file is read."""
    session, worst = sign_in(site, "flood"), 0.0
    with ThreadPoolExecutor(8) as pool:
        uploads = [
            pool.submit(post_page, site, session, "/runs/new/file", f"settings: {{{lines}}}")
            for _ in range(8)
        ]
        while not all(upload.done() for upload in uploads):
            worst = max(worst, measure_seconds(lambda: httpx.get(site.address + "/health")))
            time.sleep(0.1)
    assert {upload.result().status_code for upload in uploads} <= {200, 400, 429}
    return {"health_beside_yaml_s": worst}


def post_page(site: RunningSite, session: httpx.Cookies, path: str, text: str) -> httpx.Response:
    with httpx.Client(base_url=site.address, cookies=session, timeout=60) as browser:
        page = browser.get("/runs/new").text
        token = page.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]
        return browser.post(
            path,
            data={"csrfmiddlewaretoken": token},
            files={"file": ("run.yaml", text.encode())},
            headers={"Referer": site.address},
        )


def upload_slowly(site: RunningSite, token: str, other: Client) -> dict[str, Any]:
    """Four uploads that send nothing after their headers, and one of another user."""
    head = (
        "POST /api/v1/datasets/uploads HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99000000\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()
    connections = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(4)]
    for connection in connections:
        connection.sendall(head)
    content = b"".join(b'{"prompt": "a %d", "completion": "b"}\n' % n for n in range(50_000))
    waited = measure_seconds(lambda: upload_file(other, "o.jsonl", content).raise_for_status())
    for connection in connections:
        connection.close()
    return {"other_upload_beside_slow_ones_s": waited}


def fill_disk(flood: Client) -> dict[str, Any]:
    """Upload 20 MB again and again. The quota is QUOTA_GIB."""
    row = b'{"prompt": "' + b"a" * 4000 + b'", "completion": "b"}\n'
    for number in range(60):
        if upload_file(flood, f"{number}.jsonl", row * 5000).status_code == 409:
            return {"disk_uploads_before_refusal": number}
    raise AssertionError("The disk quota does not hold.")


def leave_downloads_unread(site: RunningSite, token: str, version: int) -> dict[str, Any]:
    head = (
        f"GET /api/v1/adapters/{version}/download HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {token}\r\n\r\n"
    ).encode()
    with watch_web(site) as figures:
        connections = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(2)]
        for connection in connections:
            connection.sendall(head)
        time.sleep(8)
    for connection in connections:
        connection.close()
    return {"downloads_growth_mb": figures["growth_mb"]}


def subscribe_without_reading(site: RunningSite, session: str, run: int) -> dict[str, Any]:
    """Ten sockets that subscribe to a run again and again and never read."""
    with watch_web(site) as figures:
        connections = [open_socket(site.port, session, buffer_bytes=4096) for _ in range(10)]
        message = {"type": "sub", "run": run, "cursor": 0, "points": 2000}
        for _ in range(40):
            for connection in connections:
                try:
                    send_message(connection, message)
                except OSError:
                    pass  # the server has closed it
            time.sleep(0.2)
    for connection in connections:
        connection.close()
    return {"sockets_growth_mb": figures["growth_mb"]}


def flood_answers(flood: Client, other: Client) -> dict[str, Any]:
    """Another user asks while one user keeps FLOOD_REQUESTS requests open, once long ones and once
    ones for a single token.
    """
    body = {"model": "lights", "messages": [{"role": "user", "content": "turn on the lamp"}]}
    answered, longest, codes = OTHER_REQUESTS, 0.0, Counter[int]()
    for max_tokens in (200, 1):
        is_done = threading.Event()

        def keep_asking(tokens: int = max_tokens, done: threading.Event = is_done) -> None:
            while not done.is_set():
                answer = flood.send(
                    "POST", "/v1/chat/completions", json=body | {"max_tokens": tokens}
                )
                codes[answer.status_code] += 1

        with ThreadPoolExecutor(FLOOD_REQUESTS) as pool:
            threads = [pool.submit(keep_asking) for _ in range(FLOOD_REQUESTS)]
            time.sleep(3)
            in_time = 0
            for _ in range(OTHER_REQUESTS):
                start = time.monotonic()
                answer = other.send("POST", "/v1/chat/completions", json=body | {"max_tokens": 20})
                seconds = time.monotonic() - start
                longest = max(longest, seconds)
                in_time += answer.status_code == 200 and seconds < MAX_ANSWER_SECONDS
            is_done.set()
        for thread in threads:
            thread.result()
        answered = min(answered, in_time)
    assert codes[200] > OTHER_REQUESTS, "the flood was not answered"
    return {
        "others_answered": answered,
        "other_longest_answer_s": longest,
        "flood_answers": dict(codes),
    }


def flood_comparisons(flood: Client, owner: Client, versions: list[int]) -> dict[str, Any]:
    """Seconds that an export of another user takes beside many comparisons of one user."""
    prompts = [
        flood.send("POST", "/api/v1/comparisons/prompts", json={"text": f"turn on lamp {n}"})
        for n in range(FLOOD_COMPARISONS)
    ]
    for prompt in prompts:
        body = {"versions": versions, "prompts": prompt.json()["id"]}
        flood.send("POST", "/api/v1/comparisons/replies", json=body)
    path = f"/api/v1/adapters/{versions[0]}/gguf?quantization=q8_0"
    owner.send("POST", path.partition("?")[0], json={"quantization": "q8_0"}).raise_for_status()

    def wait_for_export() -> None:
        deadline = time.monotonic() + 300
        while owner.send("GET", path).json()["state"] not in ("done", "failed"):
            assert time.monotonic() < deadline, "the export did not end"
            time.sleep(0.2)

    return {"export_beside_comparisons_s": measure_seconds(wait_for_export)}


def measure_template_recovery(
    flood: Client, other: Client, versions: dict[str, int]
) -> dict[str, Any]:
    """Seconds until another user's request is answered, after a request for a model with each of
    TEMPLATES.
    """
    body = {"who": "base", "messages": [{"role": "user", "content": "hi"}]}
    question = {"model": "lights", "messages": body["messages"], "max_tokens": 5}

    def ask_until_answered() -> None:
        deadline = time.monotonic() + 100
        while other.send("POST", "/v1/chat/completions", json=question).status_code != 200:
            assert time.monotonic() < deadline, "the inference server did not recover"
            time.sleep(0.5)

    figures = {}
    for name, version in versions.items():
        path = f"/api/v1/adapters/{version}/try"
        with ThreadPoolExecutor(1) as pool:
            attack = pool.submit(flood.send, "POST", path, json=body)
            time.sleep(0.5)
            figures[f"{name}_template_s"] = measure_seconds(ask_until_answered)
            attack.result()
    return figures | {"template_recovery_s": max(figures.values())}


def measure_stop(flood: Client, base: int) -> dict[str, Any]:
    """Seconds until a run with a chat template that never ends is stopped."""
    body = {"model": base, "data": 1, "settings": {"max_steps": 2}, "accept_warnings": True}
    run = flood.send("POST", "/api/v1/runs", json=body).raise_for_status()
    path = f"/api/v1/runs/{run.json()['id']}"
    time.sleep(10)

    def stop() -> None:
        flood.send("POST", f"{path}/stop", json={}).raise_for_status()
        deadline = time.monotonic() + 200
        while flood.send("GET", path).json()["state"]["state"] in ACTIVE_STATES:
            assert time.monotonic() < deadline, "the run did not stop"
            time.sleep(0.2)

    return {"stop_s": measure_seconds(stop)}


def fill_queue(flood: Client) -> dict[str, Any]:
    body = {"model": 1, "data": 1, "settings": {"max_steps": 2}, "accept_warnings": True}
    codes = Counter(
        flood.send("POST", "/api/v1/runs", json=body).status_code for _ in range(MAX_QUEUED + 20)
    )
    return {"queue_answers": dict(codes)}


def measure_broken_adapter(flood: Client, version: int) -> dict[str, Any]:
    """Seconds of the first and the third request for an adapter that cannot be loaded."""
    body = {"who": "adapter", "messages": [{"role": "user", "content": "hi"}]}
    path = f"/api/v1/adapters/{version}/try"
    seconds = [measure_seconds(lambda: flood.send("POST", path, json=body)) for _ in range(3)]
    return {"broken_adapter_first_s": seconds[0], "broken_adapter_third_s": seconds[2]}


def flood_with_pings(site: RunningSite, session: str) -> dict[str, Any]:
    """A socket that sends 100 MB of pings and reads nothing."""
    frame = bytes([0x89, 0x80 | 125]) + bytes(4) + b"x" * 125
    with watch_web(site) as figures:
        connection = open_socket(site.port, session, buffer_bytes=4096)
        connection.settimeout(30)
        try:
            for _ in range(100 * MIB // (500 * len(frame))):
                connection.sendall(500 * frame)
        except OSError:
            pass  # the server has closed it
        connection.close()
    return {"pings_growth_mb": figures["growth_mb"]}


def run_benchmark(site: RunningSite, models: list[Path]) -> dict[str, Any]:
    setup = json.loads(site.run_python(SETUP, *models))
    alice, flood, other = (Client(site, token) for token in setup["tokens"])
    run, version = train_and_deploy(site, alice)
    session = str(sign_in(site, "alice")["snapml_session"])
    templates = {name: template_version for name, _, template_version in setup["templates"]}
    bases = {name: base for name, base, _ in setup["templates"]}
    figures: dict[str, Any] = {
        "idle_mb": psutil.Process(site.find_pid("web")).memory_info().rss / 1e6
    }
    figures |= flood_uploads(site, flood, other)
    figures |= send_hostile_files(site, flood)
    figures |= upload_slowly(site, setup["tokens"][1], other)
    figures |= leave_downloads_unread(site, setup["tokens"][1], setup["large"])
    figures |= subscribe_without_reading(site, session, run)
    figures |= flood_with_pings(site, session)
    figures |= flood_answers(flood, other)
    figures |= measure_broken_adapter(flood, setup["large"])
    figures |= measure_template_recovery(flood, other, templates)
    figures |= flood_comparisons(flood, alice, [version])
    figures |= fill_disk(flood)
    figures |= measure_stop(alice, bases["stuck"])
    figures |= fill_queue(other)
    figures["web_growth_mb"] = max(v for name, v in figures.items() if name.endswith("growth_mb"))
    site.run_python(SEED_RUNS)
    body = {"model": 1, "data": 1, "settings": {"max_steps": 2}, "accept_warnings": True}
    seconds = [
        measure_seconds(lambda: alice.send("POST", "/api/v1/runs", json=body)) for _ in range(5)
    ]
    return figures | {"launch_ms_10000": 1000 * max(seconds)}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="snapml-abuse-") as folder:
        home = Path(folder)
        model = tiny.make_model(home / "tiny-llama")
        models = [tiny.make_model(home / name, template=text) for name, text in TEMPLATES.items()]
        with RunningSite(home / "var", model, SNAPML_DISK_QUOTA_GIB=str(QUOTA_GIB)) as site:
            print_report(run_benchmark(site, models))


if __name__ == "__main__":
    main()
