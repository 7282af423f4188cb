"""A model hub on loopback that speaks as much of the hub's protocol as a push needs, and remembers
what it was given.
"""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(BaseHTTPRequestHandler):
    """`files` by path, `tokens` seen, `status` to refuse with."""

    def said(self):
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def answer(self, told, status=200):
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.said()
        self.answer({})

    def do_POST(self):
        server, said = self.server, self.said()
        server.tokens.add(self.headers["Authorization"])
        here = f"http://127.0.0.1:{server.server_port}"
        if server.status != 200:
            return self.answer({"error": "no"}, server.status)
        if self.path == "/api/repos/create":
            server.made.append(json.loads(said))
            return self.answer({"url": f"{here}/alice/lights"})
        if "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(said)["files"]
            ]
            return self.answer({"files": modes})
        if self.path.endswith("/objects/batch"):
            asked = json.loads(said)["objects"]
            return self.answer(
                {
                    "objects": [
                        one | {"actions": {"upload": {"href": f"{here}/large/{one['oid']}"}}}
                        for one in asked
                    ]
                }
            )
        if "/commit/" in self.path:
            for line in map(json.loads, said.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
                    assert hashlib.sha256(server.large[value["oid"]]).hexdigest() == value["oid"]
            return self.answer(
                {"commitOid": "c0ffee", "commitUrl": f"{here}/alice/lights/commit/c0ffee"}
            )
        return self.answer({})

    def log_message(self, *_):
        pass


@contextmanager
def running():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.large, server.made, server.tokens, server.status = {}, {}, [], set(), 200
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
