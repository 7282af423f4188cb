"""Naughty texts, numbers, forms and headers at every endpoint: the OpenAPI description, the pages,
`/v1/`, YAML files, uploads and sockets. No answer has status 500, and the pages that show what was
stored keep working.
"""

import json
from itertools import cycle, islice
from pathlib import Path

import httpx
import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connections
from django.http import QueryDict
from django.urls import get_resolver, reverse
from starlette.testclient import TestClient

from adapters.inference.server import make_app
from adapters.serving import gateway
from snapml_site import asgi
from snapml_site.api import api
from training.datasets.models import Upload
from training.errors import UserError
from training.people.tokens import create_token
from training.runs.forecast.memory_estimators import CannotEstimate
from training.runs.launch.yaml_file import read_yaml, to_launch_request
from training.runs.live.consumers import SIGNED_OUT

pytestmark = pytest.mark.django_db
UNSTORABLE = ["a\0b", "\ud83d", "b\udfff\ud800c"]
STORABLE = [
    "",
    " \t\r\n",
    "\ufeff\u200b\u202egpj.exe",
    "\uffff\U0010ffff\x7f\x85\x1b[31m",
    "\u0130\u00df\ufb03\u0345" * 30,  # longer in other cases and normal forms
    "\U0001f469\u200d\U0001f469\u200d\U0001f467e\u0301",
    "<img src=x onerror=alert(1)>{{ 7 * 7 }}{% url 'x' %}%s%(x)s{0}",
    "';DROP TABLE runs_run;--\\\"`$(id)",
    "../..//etc/passwd",
    "=1+1\r\nSet-Cookie: a=b",
    "\u00b2\u0663\u00bd",  # digits, but not all of them numbers
    "1e999",
    "-inf",
    "nan",
    "0x1F",
    "1" * 5_000,
    "w" * 40_000,
    "[" * 900,
]
NUMBERS = [2**53 + 1, 2**62, 2**31, -(2**31) - 1, -1, 0, 1e308, 5e-324, 0.5, -0.0]
DEEP_LIST, DEEP_OBJECT = "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900
REFUSED = [  # as JSON, since json.dumps cannot write all of them
    *map(json.dumps, UNSTORABLE),
    *("NaN", "-Infinity", "1e999", "-1e999", str(2**63), "-" + "9" * 400, "9" * 5_000),
    *(
        DEEP_LIST,
        DEEP_OBJECT,
        '["\\ud800"]',
        '{"a\\u0000": 1}',
        '{"rank": NaN}',
        '{"rank": [1e999]}',
    ),
]
OTHER_VALUES = [None, True, [], {}, [[]], {"rank": 2**62}, {"rank": "\uffff"}]
MARK = "a text that becomes a literal"
SETTINGS = ("rank", "learning_rate", "target_modules", "method", "seed", "x")


@pytest.fixture
def no_other_services(monkeypatch, no_queue, no_program):
    """No simulations, file detection and name resolution."""

    def refuse(*_args, **_kwargs):
        raise CannotEstimate("not here")

    for name in (
        "training.datasets.uploads.run_detection",
        "training.webhooks.services.resolve_host",
        "training.runs.forecast.memory_estimators.EstimatorProcess.request_estimator",
    ):
        monkeypatch.setattr(name, refuse)


@pytest.fixture
def as_admin(client, people, things, no_other_services):
    client.force_login(people["admin"])
    client.raise_request_exception = False
    return client


class Walk:
    """Sends requests and collects those that were answered with status 500."""

    def __init__(self, client):
        self.client = client
        self.requests, self.failures = 0, []

    def send(self, method, path, *, body=None, query=None, content_type="application/json"):
        self.requests += 1
        response = self.client.generic(
            method.upper(),
            path,
            body if body is not None else b"",
            content_type,
            QUERY_STRING=query or "",
        )
        if response.status_code == 500:
            trace = getattr(response, "exc_info", None)
            self.failures.append((method, path, query, str(body)[:200], trace and repr(trace[1])))
        return response


# --- The API -------------------------------------------------------------------------------------


def resolve(schema, node):
    """The schema without references and optional None."""
    while "$ref" in node or "anyOf" in node or "allOf" in node:
        if "$ref" in node:
            node = schema["components"]["schemas"][node["$ref"].rpartition("/")[2]]
        else:
            node = next(
                one for one in node.get("anyOf") or node["allOf"] if one != {"type": "null"}
            )
    return node


def make_example(schema, node, name, things):
    """A valid value of a property."""
    node = resolve(schema, node)
    if f"{name}_id" in things and node.get("type") == "integer":
        return things[f"{name}_id"]
    if "enum" in node:
        return node["enum"][0]
    if node.get("type") == "object":
        return {
            key: make_example(schema, inner, key, things)
            for key, inner in node.get("properties", {}).items()
            if key in (*node.get("required", ()), "accept_warnings")
        }
    if node.get("type") == "array":
        return [make_example(schema, node["items"], name, things)]
    if node.get("type") in ("integer", "number"):
        return node.get("minimum", 1)
    return {"accept_warnings": True, "who": "adapter", "role": "user"}.get(name, "x")


def list_naughty_values(schema, node, name):
    """Values for a property: naughty ones of its own type, and some of other types."""
    node = resolve(schema, node)
    match node.get("type"):
        case "string":
            return [*STORABLE, None]
        case "integer" | "number":
            return [*NUMBERS, "1e999", None]
        case "boolean":
            return ["x", None]
        case "array":
            inner = list_naughty_values(schema, node["items"], name)
            return [[value] for value in inner] + [[], [[]], None]
        case "object" if "properties" in node:
            return [
                {key: value}
                for key, one in node["properties"].items()
                for value in list_naughty_values(schema, one, key)
            ]
        case _:
            free = [{key: value} for key in SETTINGS for value in (STORABLE[3], 2**62, [], {})]
            return [*free, *({text: 1} for text in STORABLE[:12]), *OTHER_VALUES]


def walk_operation(walk, schema, operation, method, path, things):
    ids = {**things, "base_id": things["model_id"], "data_id": things["version_id"]}
    parameters = operation.get("parameters", [])
    in_path = [one["name"] for one in parameters if one["in"] == "path"]
    url = path.format(**ids)
    content = operation.get("requestBody", {}).get("content", {})
    for name in in_path:
        for text in (*UNSTORABLE[:1], *STORABLE[2:6], "9" * 30, "-1"):
            walk.send(method, path.format(**ids | {name: text}).replace("\0", "%00"))
    for name in (one["name"] for one in parameters if one["in"] == "query"):
        for text in (UNSTORABLE[0], *STORABLE[:16], *map(str, NUMBERS)):
            query = QueryDict(mutable=True)
            query.update({"model": ids["model_id"], "data": ids["data_id"], name: text})
            walk.send(method, url, query=query.urlencode())
    if "application/json" not in content:
        return
    node = resolve(schema, content["application/json"]["schema"])
    example = make_example(schema, node, "", ids)
    literals = REFUSED if node["properties"] else []
    for number, literal in enumerate(literals):
        name = list(node["properties"])[number % len(node["properties"])]
        text = json.dumps(example | {name: MARK}).replace(json.dumps(MARK), literal)
        assert 400 <= walk.send(method, url, body=text).status_code < 500, (url, text[:200])
    for name, inner in node["properties"].items():
        for value in list_naughty_values(schema, inner, name):
            walk.send(method, url, body=json.dumps(example | {name: value}))


def test_no_operation_of_the_api_fails(as_admin, things):
    walk, schema = Walk(as_admin), api.get_openapi_schema()
    operations = [
        (method, path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    before = list_working_pages(as_admin, things)
    # Deletions come last, since the pages are checked before
    for method, path, operation in operations:
        if method != "delete":
            walk_operation(walk, schema, operation, method, path, things)
    assert not walk.failures, walk.failures[:5]
    assert walk.requests > 1000
    assert before - list_working_pages(as_admin, things) == set()
    for method, path, operation in operations:
        if method == "delete":
            walk_operation(walk, schema, operation, method, path, things)
    assert not walk.failures, walk.failures[:5]


# --- The pages -----------------------------------------------------------------------------------


def list_urls(things):
    """Name and URL of every page outside of the API and the admin site."""
    urls = {}
    for pattern in get_resolver().url_patterns:
        for inner in getattr(pattern, "url_patterns", [pattern]):
            if getattr(pattern, "namespace", None) not in ("api", "admin"):
                arguments = {key: things[key] for key in inner.pattern.converters}
                urls[inner.name] = reverse(inner.name, kwargs=arguments)
    return urls


def list_working_pages(client, things):
    return {url for url in list_urls(things).values() if client.get(url).status_code == 200}


@pytest.fixture
def read_fields(monkeypatch):
    """The names of all fields that views ask a form or a query for."""
    names = set()

    def record(method):
        original = getattr(QueryDict, method)

        def read(self, key, *arguments):
            names.add(key)
            return original(self, key, *arguments)

        monkeypatch.setattr(QueryDict, method, read)

    for method in ("get", "getlist", "__getitem__", "__contains__"):
        record(method)
    return names


def walk_form(walk, method, url, valid, texts, read_fields, *, skipped=None, most=None):
    """Send each field of a page some of the texts, while the others are valid. The first request
    finds the fields; later ones may find more. Returns the fields.
    """
    known, waiting = {}, [""]
    while waiting:
        field = waiting.pop()
        for text in islice(texts, 3 if len(known) < 10 else 1):
            read_fields.clear()
            fields = QueryDict(mutable=True)
            fields.update({name: valid.get(name, "1") for name in known} | {field: text})
            send_form(walk, method, url, fields.urlencode())
            found = sorted(read_fields - {"csrfmiddlewaretoken", *known})
            if not known and found == skipped:
                return found
            known |= dict.fromkeys(found)
            waiting += found[:most]
    return sorted(known)


def test_no_page_fails(as_admin, things, read_fields):
    walk, texts = Walk(as_admin), cycle([*STORABLE, UNSTORABLE[0]])
    valid = {
        "model": things["model_id"],
        "base": things["model_id"],
        "data": things["version_id"],
        "version": things["adapter_id"],
        "v": things["adapter_id"],
        "prompts": things["prompts_id"],
        "pool": things["pool_id"],
        "team": things["team_id"],
        "run": things["run_id"],
        "username": "bob",
        "who": "base",
    }
    urls, last = (
        list_urls(things),
        ("delete", "discard", "sign-out", "remove", "revoke", "password"),
    )
    is_last = {name: name.endswith(last) for name in urls}
    before = list_working_pages(as_admin, things)
    for name in sorted(urls, key=is_last.get):
        if is_last[name] and before:
            assert before - list_working_pages(as_admin, things) == set()
            before = set()
        url = urls[name]
        in_query = walk_form(walk, "get", url, valid, texts, read_fields)
        # All parts of the launch page read its settings with the same function
        most = None if name == "run-new" else 15
        # A page without a form answers a POST like a GET
        walk_form(walk, "post", url, valid, texts, read_fields, skipped=in_query, most=most)
        if name in ("run-new", "run-memory"):
            auto = valid | {"mode": "auto"}
            walk_form(walk, "post", url, auto, texts, read_fields, most=15)
    assert not walk.failures, walk.failures[:5]
    assert not before
    assert walk.requests > 1000


def send_form(walk, method, url, fields):
    if method == "get":
        return walk.send(method, url, query=fields)
    return walk.send(method, url, body=fields, content_type="application/x-www-form-urlencoded")


# --- Files ---------------------------------------------------------------------------------------


def write_yaml_texts():
    """Run files with each naughty text as each kind of scalar, at each place."""
    document = "model: tiny-llama\ndata: {name: Lights, version: 1}\nname: x\nsettings: {rank: 4}\n"
    places = ("tiny-llama", "Lights", "version: 1", "name: x", "rank: 4", "{rank: 4}", "rank")
    scalars = [json.dumps(text) for text in (*UNSTORABLE, *STORABLE)]
    scalars += ["0x1F", "010", "0b11", "1_000", "1:30", "1e999", ".nan", "2026-01-01", "9" * 5000]
    scalars += [DEEP_LIST, "- 1", "? [a]", "<<: {a: 1}", "!!binary aGk=", "*x", "~", "\x00", "no"]
    for place in places:
        key, colon, _ = place.rpartition(": ")
        for scalar in scalars:
            yield document.replace(place, f"{key}{colon}{scalar}", 1)


def test_no_yaml_file_fails(as_admin, alice, things):
    walk = Walk(as_admin)
    for text in write_yaml_texts():
        try:
            to_launch_request(alice, read_yaml(text))
        except UserError:
            continue
        file = SimpleUploadedFile("run.yaml", text.encode())
        response = as_admin.post("/runs/new/file", {"file": file})
        assert response.status_code != 500, text[:300]
        walk.requests += 1
    assert walk.requests > 20


ROWS = [
    *("null", "1", "[]", "NaN", '"x"', "{}"),
    *('{"prompt": 1e999, "completion": -Infinity}', '{"prompt": "\\ud800", "completion": "x"}'),
    *('{"prompt": "a\\u0000", "completion": "' + "9" * 5000 + '"}'),
    '{"prompt": "a", "completion": "b", "\\ud800": 1, "\\u0000": 2}',
    '{"prompt": "a", "completion": "c", "deep": ' + "[" * 900 + "]" * 900 + "}",
    *(json.dumps({"prompt": text, "completion": text, text: 1}) for text in STORABLE),
]
FILES = {
    "rows.jsonl": "\n".join(['{"prompt": "a", "completion": "b"}'] * 3 + ROWS).encode(),
    "\ud83d\0\u202e.json".encode("utf-8", "replace").decode(): f"[{','.join(ROWS)}]".encode(),
    "../x.csv": "a\0,\ufeff=1+1,\u202e,,a\0\n1,nan,1e999,0x1F,\x1b\n".encode(),
    "x": b"\xff\xfe\0\xd8" * 99,
    "config.yaml": DEEP_LIST.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_no_upload_of_rows_fails(client, alice, name):
    client.force_login(alice)
    client.raise_request_exception = False
    file = SimpleUploadedFile(name, FILES[name])
    response = client.post("/data/new", {"file": file, "name": name})
    assert response.status_code in (302, 400)
    for upload in Upload.objects.all():
        assert client.get(f"/data/uploads/{upload.pk}").status_code == 200
        assert client.get(f"/api/v1/datasets/uploads/{upload.pk}/preview").status_code in (200, 400)
    assert client.get("/data").status_code == 200


@pytest.mark.parametrize("literal", REFUSED)
def test_no_import_of_an_adapter_fails(as_admin, things, literal):
    config = '{"peft_type": "LORA", "r": 4, "target_modules": ' + literal + "}"
    files = [
        SimpleUploadedFile("adapter_config.json", config.encode()),
        SimpleUploadedFile("adapter_model.safetensors", b"\2\0\0\0\0\0\0\0{}"),
    ]
    fields = {"base": things["model_id"], "name": "x", "file": files}
    for path in ("/adapters/import", "/api/v1/adapters/import"):
        for file in files:
            file.seek(0)
        assert as_admin.post(path, fields).status_code == 400


# --- Malformed forms ------------------------------------------------------------------------------


def write_part(name, value="x", *, headers="", file_name=""):
    file = f'; filename="{file_name}"' if file_name else ""
    disposition = f'Content-Disposition: form-data; name="{name}"{file}'
    return f"--x\r\n{disposition}\r\n{headers}\r\n{value}\r\n"


FORM, URL_ENCODED = "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"
BASE64 = "Content-Transfer-Encoding: base64\r\n"
PARTS = write_part("name") + write_part("file", file_name="a.jsonl")
MALFORMED_FORMS = [
    ("multipart/form-data", PARTS),
    (f"multipart/form-data; boundary={'x' * 300}", PARTS),
    ("multipart/form-data; boundary=\u00ff", PARTS),
    (FORM, PARTS),  # no end
    (FORM, ""),
    (FORM, write_part("file", "a", headers=BASE64, file_name="b") + "--x--"),
    (FORM, write_part("a", headers=f"X: {'y' * 9_000}\r\n") + "--x--"),
    (FORM, write_part("a", headers="Content-Disposition: form-data; name*=z''%00\r\n") + "--x--"),
    (FORM, "".join(write_part(f"a{n}") for n in range(1_001)) + "--x--"),
    (FORM, "".join(write_part("a", file_name=f"{n}") for n in range(101)) + "--x--"),
    (FORM, write_part("a\0", "b\0") + "--x--"),
    (FORM, "--x\r\n\r\n--x--"),
    (URL_ENCODED, "&".join(f"a{n}=1" for n in range(1_001))),
    (URL_ENCODED, "w" * (2**20 + 1)),
    (URL_ENCODED, "%ff%00=%ed%a0%80"),
    ("application/json", PARTS),
    (";=", PARTS),
]


def test_no_operation_of_the_api_fails_on_a_malformed_form(as_admin, things):
    walk, ids = Walk(as_admin), {**things, "base_id": things["model_id"]}
    for path, methods in api.get_openapi_schema()["paths"].items():
        for method in sorted(methods.keys() & {"post", "put", "patch"}):
            for content_type, body in MALFORMED_FORMS:
                walk.send(method, path.format(**ids), body=body, content_type=content_type)
    assert not walk.failures, walk.failures[:5]
    assert walk.requests > 500


def test_no_page_fails_on_a_malformed_form(as_admin, things):
    walk, forms = Walk(as_admin), cycle(MALFORMED_FORMS)
    for url in [*list_urls(things).values(), "/admin/people/team/add/"]:
        # A view that reads the body itself fails on a form that can be read
        for content_type, body in [(FORM, f"{PARTS}--x--"), *islice(forms, 4)]:
            walk.send("post", url, body=body, content_type=content_type)
    assert not walk.failures, walk.failures[:5]
    assert walk.requests > 300


@pytest.mark.parametrize(("content_type", "body"), MALFORMED_FORMS[:3] + MALFORMED_FORMS[5:7])
def test_a_malformed_form_is_refused_by_page_and_api(as_admin, settings, content_type, body):
    for url in ("/sign-in", "/data/new", "/api/v1/datasets/uploads"):
        response = as_admin.generic("POST", url, body, content_type)
        assert response.status_code == 400, url
    assert not list(Path(settings.FILE_UPLOAD_TEMP_DIR).iterdir())


def test_a_form_with_too_many_fields_is_refused_as_too_large(as_admin):
    for content_type, body in (*MALFORMED_FORMS[8:10], *MALFORMED_FORMS[12:14]):
        for url in ("/sign-in", "/api/v1/datasets/uploads"):
            response = as_admin.generic("POST", url, body, content_type)
            assert response.status_code == 413, (url, body[:80])


# --- Headers -------------------------------------------------------------------------------------


CONTENT_TYPES = [
    *(f"{URL_ENCODED}; charset={name}" for name in ("iso-8859-1", "utf-16", "hex", "punycode")),
    *(
        f"{FORM}; charset={name}"
        for name in ("hex", "idna", "undefined", "utf-7", "rot13", "utf_8")
    ),
    *("text/plain; charset=undefined", "application/json; charset=utf-16", 'a; charset="\0"'),
    *("text/plain; charset*=none''x", "a/b; charset*=utf-8''%00", "a/b; charset*0=x; charset*1=y"),
]
COOKIES = [
    '"\\000aaaaaaaa"',
    '"\\377aaaaaaa"',
    "\xff" * 9,
    "a" * 5_000,
    '"\\"',
    "=;",
    "\u00e9",
    "a\0b",
]
HEADERS = ["", "\xff", "a" * 5_000, '"', ",", "Bearer", "http://[", "http://a:b:c", "bytes=9-1"]
HEADER_NAMES = [
    *("authorization", "accept", "origin", "referer", "host", "range", "cookie", "x-csrftoken"),
    *("hx-request", "hx-current-url", "if-none-match", "if-modified-since", "content-length"),
    *("accept-language", "accept-encoding", "x-forwarded-for", "x-forwarded-proto"),
]
URLS = (
    "/sign-in",
    "/runs",
    "/data/new",
    "/nowhere",
    "/api/v1/people/me",
    "/api/v1/datasets/uploads",
)


def list_naughty_headers():
    yield from ({"content-type": value} for value in CONTENT_TYPES)
    for name in ("snapml_session", "snapml_csrf", "messages", "\xff", "a\0"):
        yield from ({"cookie": f"{name}={value}; other=1"} for value in COOKIES)
    for name in HEADER_NAMES:
        yield from ({name: value} for value in HEADERS)


def encode_headers(headers):
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


@pytest.mark.django_db(transaction=True)
async def test_no_header_makes_a_page_or_the_api_fail():
    transport = httpx.ASGITransport(app=asgi.application, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as web:
        for headers in list_naughty_headers():
            for url in URLS:
                for method in ("GET", "POST"):
                    response = await web.request(
                        method, url, content=b"a=1", headers=encode_headers(headers)
                    )
                    assert response.status_code < 500, (method, url, headers)
    await sync_to_async(connections.close_all)()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("content_type", CONTENT_TYPES)
async def test_a_charset_other_than_utf_8_is_refused(content_type):
    transport = httpx.ASGITransport(app=asgi.application)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as web:
        for url in URLS:
            headers = encode_headers({"content-type": content_type})
            response = await web.post(url, content=b"a=1", headers=headers)
            assert response.status_code == 400, url
            assert response.json()["error"]["message"]


@pytest.mark.django_db(transaction=True)
async def test_a_cookie_that_cannot_be_stored_is_dropped_and_others_are_kept(alice, client):
    await sync_to_async(client.force_login)(alice)
    session = f"snapml_session={client.cookies['snapml_session'].value}"
    transport = httpx.ASGITransport(app=asgi.application)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as web:
        for cookies, status in (
            (f'x="\\000"; {session}', 200),
            (f'{session}; y="\\000"', 200),
            ('snapml_session="\\000aaaaaaaa"', 401),
        ):
            response = await web.get("/api/v1/people/me", headers={"cookie": cookies})
            assert response.status_code == status, cookies
    await sync_to_async(connections.close_all)()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("cookie", COOKIES)
async def test_no_cookie_makes_a_socket_fail(cookie):
    headers = {"host": "testserver", "origin": "http://testserver"}
    headers["cookie"] = f"snapml_session={cookie}"
    socket = WebsocketCommunicator(asgi.application, "/ws/live", headers=encode_headers(headers))
    is_connected, _ = await socket.connect()
    assert is_connected
    assert (await socket.receive_output())["code"] == SIGNED_OUT
    await sync_to_async(connections.close_all)()


@pytest.mark.parametrize(
    "origin", ["http://[", "http://[::1", "\xff", "http://a:b", "", "http://[v]"]
)
async def test_no_origin_makes_a_socket_fail(origin):
    headers = encode_headers({"host": "testserver", "origin": origin})
    socket = WebsocketCommunicator(asgi.application, "/ws/live", headers=headers)
    assert not (await socket.connect())[0]


# --- Webhooks ------------------------------------------------------------------------------------


NAUGHTY_URLS = [
    *("https://xn--/", "https://xn--a-0000000/", "http://[", "https://a:b/", "https://a:99999/"),
    *("https://[v1.a]/", "https://a..b/", "https://:80/", "https:///x", "https://%00/", "x", ""),
    *("https://" + "a" * 64 + ".com/", "https://exa\u2100mple.com/", "https://\u0130.com", "a\0"),
]


@pytest.mark.parametrize("url", NAUGHTY_URLS)
def test_no_url_of_a_webhook_fails(client, alice, url, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("training.webhooks.services.socket.getaddrinfo", fail)
    client.force_login(alice)
    client.raise_request_exception = False
    assert client.post("/account/webhooks", {"url": url}).status_code == 400
    body = json.dumps({"url": url})
    response = client.post("/api/v1/people/me/webhooks", body, "application/json")
    assert response.status_code in (400, 422)


# --- /v1/ ----------------------------------------------------------------------------------------


class Answering:
    """A request queue that answers each request at once."""

    count = 0

    def submit_request(self, request):
        request.events.put({"text": "yes"})
        counts = {"prompt_tokens": 1, "completion_tokens": 1, "tokens_per_second": 1.0}
        request.events.put({"done": "stop", **counts})


CHAT = {
    "model": "halve",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "temperature": 1,
    "top_p": 1,
    "seed": 1,
    "stop": ["x"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "n": 1,
    "user": "x",
    "tools": [],
    "tool_choice": "none",
    "metadata": {},
    "snapml": {"base": "/base"},
}
CONTENTS = [
    {"role": "user", "content": value}
    for value in (*STORABLE, *OTHER_VALUES, [{"type": "text", "text": None}], [{"type": {}}])
]


def write_chat_bodies(names):
    """Bodies with naughty values of these fields, each with whether it must be refused."""
    for name in names:
        for literal in REFUSED:
            yield json.dumps(CHAT | {name: MARK}).replace(json.dumps(MARK), literal), True
        for value in (*STORABLE, *NUMBERS, *OTHER_VALUES):
            yield json.dumps(CHAT | {name: value}), False
    for message in CONTENTS:
        yield json.dumps(CHAT | {"messages": [message]}), False


def test_no_request_to_the_inference_server_fails():
    web = TestClient(make_app(Answering(), "secret"), raise_server_exceptions=False)
    for body, is_refused in write_chat_bodies(CHAT):
        for path in ("/v1/chat/completions", "/v1/completions"):
            response = web.post(path, content=body, headers={"Authorization": "Bearer secret"})
            check_response(response, body, is_refused=is_refused)


@pytest.mark.django_db(transaction=True)  # the gateway has its own connection
async def test_no_request_to_the_gateway_fails(alice, things):
    transport = httpx.ASGITransport(app=gateway.application, raise_app_exceptions=False)
    token = await sync_to_async(create_token)(alice, "x")
    headers = {"Authorization": f"Bearer {token[1]}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as web:
        for body, is_refused in write_chat_bodies(["model", "stream_options"]):
            response = await web.post("/v1/completions", content=body, headers=headers)
            check_response(response, body, is_refused=is_refused)
        for text in ("%00", "%ED%A0%80", "%F0%9F%98%80"):
            response = await web.get(f"/v1/models/{text}", headers=headers)
            assert response.status_code == 404
        for value in (b"Bearer \xff\xed\xa0\x80", b"Bearer", b"Basic x"):
            response = await web.get("/v1/models", headers={b"Authorization": value})
            assert response.status_code == 401
    await sync_to_async(connections.close_all)()


def check_response(response, body, *, is_refused):
    assert response.status_code != 500, body[:300]
    if is_refused:
        assert response.status_code == 400, body[:300]
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
