"""`python -m adapters.inference PORT`: answers on 127.0.0.1. INFERENCE_TOKEN is the word that callers must know."""

import os
import sys

import uvicorn

from adapters.inference.server import make_app
from adapters.inference.speaker import Speaker

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    speaker = Speaker()
    speaker.start()
    uvicorn.run(
        make_app(speaker, os.environ["INFERENCE_TOKEN"]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
    )
