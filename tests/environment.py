"""A SNAPML_HOME for the tests, set before Django reads its settings (pyproject.toml loads this as
the first pytest plugin).
"""

import atexit
import os
import shutil
import tempfile

HOME = tempfile.mkdtemp(prefix="snapml-test-")
os.environ["SNAPML_HOME"] = HOME
os.environ["SNAPML_BUILTIN_MODEL"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are tiny, and two test processes share two cores: more threads would only spin
os.environ["OMP_NUM_THREADS"] = "1"
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
# Each process uses its own Redis database, as pytest-django gives each a PostgreSQL one
if WORKER and os.environ.get("REDIS_URL"):
    os.environ["REDIS_URL"] = (
        f"{os.environ['REDIS_URL'].rpartition('/')[0]}/{WORKER.removeprefix('gw')}"
    )
