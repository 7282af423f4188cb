"""A complete SnapML instance for a test: home, database, tiny model, and `manage.py up` with its
three processes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent

SETUP_CODE = """
import json, sys, django
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from pathlib import Path
from tests import tiny
from training.catalog.metadata import read_model_metadata
from training.catalog.models import BaseModel
from training.datasets.upload_job import create_dataset
from training.people.models import Team, User
from training.people.tokens import create_token
alice = User.objects.create_superuser("alice", password="tulip-river-42")
model = sys.argv[1]
if model:
    facts = {"source": "folder", "location": model, "metadata": read_model_metadata(Path(model))}
    BaseModel.objects.create(name="tiny-llama", state="ready", **facts)
    create_dataset(alice, "Lights", tiny.encode_jsonl(tiny.ROWS), source="test")
print(create_token(alice, "test")[1])
"""

READ_RUN_CODE = """
import json, sys, django
django.setup()
from adapters.models import AdapterVersion
from training.gpus.models import Allocation
from training.runs.metrics.curves import read_curves
from training.runs.models import Run
from training.runs.live.messages import event_to_json, read_events_after
run = Run.objects.get(pk=sys.argv[1])
events = [event_to_json(e) for e in read_events_after(run.pk, 0, 10_000_000)]
adapter = AdapterVersion.objects.get(run=run)
print(json.dumps({
    "seqs": [e["seq"] for e in events], "last_seq": run.last_seq, "attempts": run.attempt,
    "losses": {e["step"]: float(e["loss"]).hex() for e in events if e["kind"] == "step"},
    "points": read_curves(run.pk, ["loss"]).points,
    "allocations": [
        [a.started_at.timestamp(), a.released_at and a.released_at.timestamp()]
        for a in Allocation.objects.order_by("started_at")
    ],
    "sha256": adapter.files["adapter_model.safetensors"]["sha256"],
}))
"""


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RunningSite:
    """`with RunningSite(home, model) as site:` creates the user alice with a token and starts all
    processes. The exit stops them in order.
    """

    def __init__(self, home, model="", **environment):
        self.home, self.model, self.port = Path(home), str(model), find_free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        inherited = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "REDIS_URL")}
        self.env = inherited | {
            "SNAPML_HOME": str(home),
            "DJANGO_SETTINGS_MODULE": "snapml_site.settings",
            "SNAPML_BUILTIN_MODEL": "0",
            **environment,
        }

    def __enter__(self):
        self.token = self.run_python(SETUP_CODE, self.model).strip()
        self.log = (self.home / "up.log").open("w")
        command = [sys.executable, "manage.py", "up", "--port", str(self.port)]
        self.up = subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=self.log, stderr=self.log
        )
        self.wait_for(lambda: "SnapML is at" in self.read_log(), 60)
        return self

    def __exit__(self, *_):
        self.up.send_signal(signal.SIGINT)
        try:
            self.up.wait(120)
        finally:
            self.log.close()

    def read_log(self):
        return (self.home / "up.log").read_text()

    def run_python(self, code, *arguments):
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def call_api(self, method, path, body=None):
        import httpx

        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.request(
            method, f"{self.address}/api/v1{path}", json=body, headers=headers, timeout=20
        ).json()

    def find_pid(self, name):
        """The process id of web, worker or inference, or of the engine of a run (`engine:ID`)."""
        if name.startswith("engine"):
            path = self.home / "runs" / name.split(":")[1] / "engine.json"
            return json.loads(path.read_text())["pid"] if path.exists() else None
        command_part = {
            "web": "snapml_site.web_server",
            "worker": "worker",
            "inference": "adapters.inference",
        }[name]
        for child in psutil.Process(self.up.pid).children():
            try:
                if command_part in child.cmdline():
                    return child.pid
            except psutil.NoSuchProcess:
                continue
        return None

    def kill_processes(self, *names):
        for name in names:
            pid = self.find_pid(name)
            if pid and psutil.pid_exists(pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    @contextmanager
    def without_restarts(self):
        """Killed processes stay dead inside this block: `up` would restart them within 3 s."""
        self.up.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.up.send_signal(signal.SIGCONT)

    def read_run(self, run_id):
        return json.loads(self.run_python(READ_RUN_CODE, run_id))

    def wait_for(self, ready, seconds=120):
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.up.poll() is None, self.read_log()
            assert time.monotonic() < deadline, "timed out\n" + self.read_log()[-3000:]
            time.sleep(0.1)
