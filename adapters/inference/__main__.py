"""`python -m adapters.inference PORT`: the inference server, on 127.0.0.1.

Callers must send the token in the environment variable INFERENCE_TOKEN.
"""

import os
import sys
import threading
import traceback

import uvicorn

from adapters.inference.request_queue import RequestQueue
from adapters.inference.server import make_app
from training.engine.fast_imports import fast_imports


def start_scheduler(request_queue: RequestQueue) -> None:
    """Start the scheduler's thread. It imports torch only when the first request arrives."""
    threading.Thread(
        target=_run_scheduler, args=(request_queue,), name="scheduler", daemon=True
    ).start()


def _run_scheduler(request_queue: RequestQueue) -> None:
    request_queue.wait_for_request()
    try:
        with fast_imports():
            from adapters.inference.scheduler import BatchScheduler

        BatchScheduler(request_queue).run_forever()
    finally:
        traceback.print_exc()
        os._exit(70)  # a server without its scheduler is useless; `manage.py up` restarts it


if __name__ == "__main__":
    request_queue = RequestQueue()
    start_scheduler(request_queue)
    uvicorn.run(
        make_app(request_queue, os.environ["INFERENCE_TOKEN"]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
    )
