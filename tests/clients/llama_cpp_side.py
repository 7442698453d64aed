"""Runs in the environment of llama.cpp, which has no torch: greedy continuations by a GGUF file."""

from __future__ import annotations

import json
from importlib.metadata import version as installed
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp
from answering import answer


def version() -> str:
    """The version of this client."""
    return f"llama.cpp (xllamacpp {installed('xllamacpp')})"


def greedy(file: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """``count`` tokens after each prompt, the likeliest each time, end of text left out; all in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    wanted = {"n_predict": count, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
    return [
        _post(f"{server.listening_address}/completion", {"prompt": prompt, **wanted})["tokens"] for prompt in prompts
    ]


def _post(url: str, body: dict[str, Any]) -> Any:
    """What the server of this process answers; the calls of xllamacpp itself return text, not tokens."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    answer(version=version, greedy=greedy)
