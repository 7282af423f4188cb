"""A model hub on localhost with the part of the Hub's API that a push needs. It records what it
receives.
"""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(BaseHTTPRequestHandler):
    """The server has `files` by path, `tokens` received, and `status` to answer with."""

    def read_body(self):
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def send_json(self, payload, status=200):
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.read_body()
        self.send_json({})

    def do_POST(self):
        server, body = self.server, self.read_body()
        server.tokens.add(self.headers["Authorization"])
        base_url = f"http://127.0.0.1:{server.server_port}"
        if server.status != 200:
            return self.send_json({"error": "no"}, server.status)
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self.send_json({"url": f"{base_url}/alice/lights"})
        if "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.send_json({"files": modes})
        if self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            return self.send_json(
                {
                    "objects": [
                        one | {"actions": {"upload": {"href": f"{base_url}/large/{one['oid']}"}}}
                        for one in objects
                    ]
                }
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
                    assert hashlib.sha256(server.large[value["oid"]]).hexdigest() == value["oid"]
            return self.send_json(
                {"commitOid": "c0ffee", "commitUrl": f"{base_url}/alice/lights/commit/c0ffee"}
            )
        return self.send_json({})

    def log_message(self, *_):
        pass


@contextmanager
def run_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.large, server.created, server.tokens, server.status = (
        {},
        {},
        [],
        set(),
        200,
    )
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
