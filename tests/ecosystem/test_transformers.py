"""transformers' own tools: pipeline, chat template, streamers, the server with the openai client, the chat."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from ecosystem.conftest import PATTERN, ROOT, run
from ecosystem.ways import BEGIN, REMOTE
from testing.time_limits import PROCESS_SECONDS

MESSAGES = [{"role": "user", "content": "Return the number of items"}]


@pytest.mark.row("transformers", "pipeline, by path", package="transformers")
def test_pipeline(load, checkpoint):
    from transformers import pipeline

    load()  # imports the package, where it is what loads
    pipe = pipeline("text-generation", model=str(checkpoint), trust_remote_code=REMOTE, dtype="float32", device="cpu")
    (answer,) = pipe("Return the", max_new_tokens=8, do_sample=False)
    assert answer["generated_text"].startswith("Return the") and len(answer["generated_text"]) > len("Return the")


@pytest.mark.row("transformers", "pipeline, a batch of chats", package="transformers")
def test_pipeline_of_chats(load, checkpoint, tokenizer):
    from transformers import pipeline

    pipe = pipeline("text-generation", model=load(), tokenizer=tokenizer, device="cpu")
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    long = [{"role": "user", "content": "Return the number of items in the list. " * 12}]
    together = pipe([MESSAGES, long], batch_size=2, **options)
    alone = [pipe(chat, **options) for chat in (MESSAGES, long)]
    said = [[answer[0]["generated_text"][-1]["content"] for answer in answers] for answers in (together, alone)]
    assert said[0] == said[1] and all(said[0])


@pytest.mark.row("transformers", "chat template of the converted tokenizer", package="transformers")
def test_chat_template(load, tokenizer):
    encoded = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
    text = tokenizer.decode(encoded["input_ids"][0])
    assert text == "<user>Return the number of items\n<assistant>"
    assert load().generate(**encoded, max_new_tokens=4, min_new_tokens=4).shape[1] == encoded["input_ids"].shape[1] + 4


@pytest.mark.row("transformers", "text streamer", package="transformers")
def test_streamer(load, tokenizer, ids):
    from transformers import TextIteratorStreamer

    model, options = load(), dict(max_new_tokens=12, do_sample=False, eos_token_id=-1)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=model.generate, kwargs={"inputs": ids, "streamer": streamer, **options})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :])


@pytest.mark.row("transformers", "assisted generation (prompt lookup)", package="transformers")
def test_prompt_lookup(load, ids):
    model, options = load(), dict(max_new_tokens=16, do_sample=False, eos_token_id=-1)
    assert (model.generate(ids, **options) == model.generate(ids, prompt_lookup_num_tokens=3, **options)).all()


@pytest.mark.row("transformers", "continuous batching (`generate_batch`)", package="transformers")
def test_continuous_batching(load, ids, limit):
    with pytest.raises((ValueError, NotImplementedError, TypeError)) as raised:
        load().generate_batch([ids[0].tolist()], progress_bar=False)
    assert "indexed_attention" not in str(raised.value) and "continuous batching" in str(raised.value)
    limit("no continuous batching: its pages hold keys and values by head; serve with vLLM or SGLang (`export`)")


@pytest.fixture
def server(checkpoint, tmp_path):
    """`transformers serve`, on loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"{BEGIN}; from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    trust = ["--trust-remote-code"] if REMOTE else []
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", script, "serve", str(checkpoint), *options, *trust],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/health", process, log)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait_for(url, process, log):
    until = time.monotonic() + PROCESS_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=PROCESS_SECONDS):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


@pytest.mark.row(
    "transformers serve",
    "openai client: an answer, a stream, two at once",
    package=["transformers", "openai", "uvicorn", "fastapi"],
)
def test_serve(server, checkpoint):
    import openai

    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    request = dict(model=str(checkpoint), messages=MESSAGES, max_tokens=8, temperature=0, seed=0)
    whole = client.chat.completions.create(**request).choices[0].message.content
    assert whole
    with client.chat.completions.create(stream=True, **request) as stream:
        parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(parts) == whole and len([part for part in parts if part]) > 1
    answers = {}

    def ask(number):
        answers[number] = client.chat.completions.create(**request).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {0: whole, 1: whole}


@pytest.mark.row("transformers chat", "a turn, and out", package=["transformers", "openai", "uvicorn", "fastapi"])
def test_chat(server, checkpoint, tmp_path):
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(checkpoint), server]
    finished = subprocess.run(
        [*command, "max_new_tokens=8", "do_sample=False"],
        input="Return the number of items\nn\n!exit\n",
        cwd=tmp_path,
        # Offline, huggingface_hub keeps it from the server on loopback too.
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert "8 tokens in" in finished.stdout, finished.stdout


@pytest.mark.row("encoding/", "DeepSeek-V3.2's chat format, called in place of a template", package="transformers")
def test_encoding_folder(load, tokenizer, tmp_path):
    """The code of a release's `encoding/` comes along with a conversion, and what it encodes is generated from."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "demo" / "dsa_demo", source)
    (source / "encoding").mkdir()
    # In the manner of the release's: a function from messages to text.
    (source / "encoding" / "encoding_dsv32.py").write_text(
        "def encode_messages(messages, thinking_mode='chat'):\n"
        "    turns = ''.join(f'<{m[\"role\"]}>{m[\"content\"]}' for m in messages)\n"
        "    return turns + '<assistant>'\n"
    )
    command = ["convert", source, tmp_path / "out", "--pattern", PATTERN]
    finished = run([sys.executable, "-m", "indexcache.cli", *command], cwd=tmp_path)
    told = " ".join((finished.stdout + finished.stderr).split())
    assert "its chat format is the code in encoding/" in told
    encoding = runpy.run_path(str(tmp_path / "out" / "encoding" / "encoding_dsv32.py"))
    ids = tokenizer(encoding["encode_messages"](MESSAGES), return_tensors="pt").input_ids
    assert load(tmp_path / "out").generate(ids, max_new_tokens=4, min_new_tokens=4).shape[1] == ids.shape[1] + 4
