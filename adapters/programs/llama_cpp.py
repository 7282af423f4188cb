"""Run a GGUF file in llama.cpp (the PyPI package `xllamacpp`), with token ids in and out.

llama.cpp aborts the process on some broken files, so it always runs in a child process: this module
as a program reads a JSON request from standard input and prints a JSON response. No port is opened:
llama.cpp's server listens on a unix socket in a temporary folder.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.child_process import emit_message, get_model_program_limits, run_child
from training.errors import UserError


class BrokenGGUF(UserError):
    """llama.cpp could not load or run the file. The message has its first error."""


@dataclass(frozen=True)
class Answer:
    ids: list[int]  # including the end-of-sequence token, if it was generated
    text: str


def generate_answers(
    gguf_file: Path, prompts: list[list[int]], max_tokens: int, *, timeout: float = 900.0
) -> list[Answer]:
    """Greedy answers to prompts of token ids."""
    request = {"prompts": prompts, "max_tokens": max_tokens}
    return [
        Answer(**answer) for answer in run_llama(gguf_file, request, timeout=timeout)["answers"]
    ]


def get_top_logprobs(
    gguf_file: Path, ids: list[int], top: int, *, start: int, timeout: float = 900.0
) -> list[dict[int, float]]:
    """The `top` most likely next tokens and their log-probabilities, after each prefix of `ids`
    with at least `start` tokens.
    """
    entries = run_llama(gguf_file, {"prefixes": ids, "top": top, "start": start}, timeout=timeout)[
        "tops"
    ]
    return [{int(id_): value for id_, value in pairs} for pairs in entries]


def run_llama(gguf_file: Path, request: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    try:
        done = run_child(
            "adapters.programs.llama_cpp",
            str(gguf_file),
            cwd=Path.cwd(),
            seconds=timeout,
            limits=get_model_program_limits(gguf_file.stat().st_size),
            stdin=json.dumps(request),
        )
    except subprocess.TimeoutExpired as error:
        raise BrokenGGUF(
            f"llama.cpp did not finish within {timeout / 60:.0f} minutes. The model is too large "
            "to be checked on this machine."
        ) from error
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = (
            [line for line in lines if " E " in line or "GGML_ASSERT" in line or "Error" in line]
            or lines
            or ["no output"]
        )
        raise BrokenGGUF(f"llama.cpp exited with code {done.returncode}: {errors[0]}")
    response: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return response


class LlamaServer:
    """llama.cpp in this process with the highest precision: one slot, KV cache in f32, no flash
    attention. It stops when it is garbage-collected.
    """

    def __init__(self, gguf_file: str, folder: str, *, context_tokens: int) -> None:
        import xllamacpp  # type: ignore[import-not-found,unused-ignore]

        params = xllamacpp.CommonParams()
        params.model.path = gguf_file
        # A host name that ends in .sock is a unix socket.
        params.hostnames = [f"{folder}/llama.sock"]
        params.ui = params.warmup = params.fit_params = False
        params.n_ctx, params.n_parallel, params.cache_ram_mib = context_tokens, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # A KV cache in f16 would cost three digits of precision.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.socket = params.hostnames[0]
        self.server = xllamacpp.Server(params)

    def post_json(self, path: str, **body: Any) -> dict[str, Any]:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.socket)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        if "error" in response:
            raise RuntimeError(f"llama.cpp failed: {response['error']['message']}")
        return response

    def tokenize_text(self, text: str) -> list[int]:
        ids: list[int] = self.post_json(
            "/tokenize", content=text, add_special=False, parse_special=True
        )["tokens"]
        return ids

    def generate_answer(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        response = self.post_json(
            "/completion", prompt=prompt, n_predict=max_tokens, temperature=0.0, return_tokens=True
        )
        return {"ids": response["tokens"], "text": response["content"]}

    def get_next_logprobs(
        self, prefix: list[int], top: int, *, plain_token: int
    ) -> list[tuple[int, float]]:
        """The most likely next tokens with their log-probabilities, before any bias.

        A logit bias forces the generated token to be `plain_token`, because llama.cpp reports no
        probabilities for a token that is an incomplete character.
        """
        options = {
            "n_predict": 1,
            "temperature": 0.0,
            "n_probs": top,
            "logit_bias": [[plain_token, 1e9]],
        }
        step = self.post_json("/completion", prompt=prefix, **options)["completion_probabilities"][
            0
        ]
        return [(entry["id"], entry["logprob"]) for entry in step["top_logprobs"]]


def main(gguf_file: str) -> None:
    request = json.load(sys.stdin)
    prompts, prefixes = (request.get(name, []) for name in ("prompts", "prefixes"))
    context_tokens = max([len(prefixes), *map(len, prompts)]) + request.get("max_tokens", 1)
    with tempfile.TemporaryDirectory() as folder:
        server = LlamaServer(gguf_file, folder, context_tokens=context_tokens + 8)
        plain_token = server.tokenize_text("a")[0]
        response = {
            "answers": [
                server.generate_answer(prompt, request["max_tokens"]) for prompt in prompts
            ],
            "tops": [
                server.get_next_logprobs(
                    prefixes[: end + 1], request["top"], plain_token=plain_token
                )
                for end in range(request.get("start", 1) - 1, len(prefixes))
            ],
        }
        del server
    emit_message(**response)


if __name__ == "__main__":
    main(sys.argv[1])
