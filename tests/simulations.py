"""Memory estimators of the test models. Building one takes seconds, so each is cached for all
tests, processes and later sessions until the engine or one of its libraries changes.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from training.engine.config import RunConfig
from training.engine.files import write_atomically

ROOT = Path(__file__).parent.parent
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def compute_digest():
    """A digest of everything besides the request that an estimator depends on."""
    hasher = hashlib.sha256(json.dumps([version(name) for name in LIBRARIES]).encode())
    for path in sorted((ROOT / "training" / "engine").rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


FOLDER = ROOT / ".pytest_cache" / "simulations" / compute_digest()


def simulate_request(request):
    """Handle a request to the simulation program in this process. Cache files have the names and
    the format of SNAPML_HOME/memory_estimators, so a running instance can share the folder.
    """
    from training.engine.simulation.forecast import handle_request
    from training.runs.forecast.memory_estimators import compute_cache_key

    config = RunConfig.from_dict(request["settings"])
    path = FOLDER / f"{compute_cache_key(Path(request['model']), config, request['device'])}.json"
    if not path.is_file():
        response = handle_request(json.dumps(request))
        if response.get("is_transient"):
            return response
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(response))
    return json.loads(path.read_text())
