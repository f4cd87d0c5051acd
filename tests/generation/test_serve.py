"""`python -m torch_vtensor serve`, asked by the real OpenAI client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paged_memory import PAGE_BYTES
from serving_models import config_of
from tiny_models import VOCAB, sizes

from torch_vtensor.generation.serving import _transformers_compat as compat

pytestmark = [
    pytest.mark.skipif(compat.why_no_server() is not None, reason=str(compat.why_no_server())),
    pytest.mark.parametrize("memory", ["token-major"], indirect=True),
]
START_S = 240


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A tiny model and its tokenizer, words w0 to w95, and the folder that they are saved in."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes())).eval()
    words = {f"w{index}": index for index in range(VOCAB)}
    words["[UNK]"] = words.pop("w0")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    model.generation_config = config_of()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return model, fast, folder


@pytest.fixture
def server(saved: tuple[Any, Any, Path], tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address, and its process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch_vtensor", "serve", "--prefixes", "--budget", "64MiB", str(saved[2])]
    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environ = os.environ | {"TORCH_VTENSOR_PAGE_BYTES": str(PAGE_BYTES), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=log, env=environ, cwd=tmp_path, text=True
        )
    try:
        began = time.monotonic()
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() - began < START_S, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_the_openai_client(
    saved: tuple[Any, Any, Path], server: tuple[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Answers, streams, several at once and one that is given up are what generate() says; nothing is left behind."""
    from openai import OpenAI

    (model, tokenizer, folder), (address, process) = saved, server
    client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)
    questions = [" ".join(f"w{3 + (7 * index + number) % 80}" for number in range(20 + index)) for index in range(6)]

    def expected(question: str, num_new: int) -> str:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], return_tensors="pt", return_dict=True
        )["input_ids"]
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config_of(max_new_tokens=num_new)
        )
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    def ask(index: int, **options: Any) -> Any:
        return client.chat.completions.create(
            model=str(folder),
            messages=[{"role": "user", "content": questions[index]}],
            temperature=0,
            max_tokens=10 + index,
            **options,
        )

    def streamed(index: int) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(index, stream=True) if chunk.choices)

    with ThreadPoolExecutor(6) as pool:
        whole = list(pool.map(ask, range(3)))
        pieces = list(pool.map(streamed, range(3, 6)))
    for index, answer in enumerate(whole):
        assert answer.choices[0].message.content == expected(questions[index], 10 + index)
        assert answer.usage.completion_tokens == 10 + index
    for index, text in enumerate(pieces, 3):
        assert text == expected(questions[index], 10 + index)
    given_up = client.chat.completions.create(
        model=str(folder), messages=[{"role": "user", "content": "w5 w6"}], temperature=0, max_tokens=900, stream=True
    )
    next(iter(given_up))
    given_up.close()
    assert ask(0).choices[0].message.content == expected(questions[0], 10)

    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert "serving managers: 1" in printed
    assert "serving finished: 7" in printed
    assert "serving cancelled: 1" in printed
    assert "serving stock" not in printed
    assert "prefixes tokens reused: 19" in printed
