"""The server engine with servers of its own: `transformers serve`, and a small one that dies."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import psutil
import pytest
from openai_server import FakeServer, completion
from runs import begun

from hpc.errors import RecordError, UserError
from hpc.shards import read_groups, shard_paths
from insightv.agents import direct_messages, reasoning_messages, summary_messages
from insightv.chainfile import read
from insightv.demo.sets import QuestionsConfig, Sizes, make_questions
from insightv.engines import EngineConfig, Request, Sampling, load_engine
from insightv.engines.server import engine as engine_module
from insightv.engines.server import process, replicas
from insightv.engines.server.config import ServerConfig
from insightv.engines.server.process import ServerGone
from insightv.engines.server.programs import Place, split_gpus, variables, words
from insightv.evaluation.statistics import paired_difference
from insightv.folders import model_folder
from insightv.pictures import Pictures, PictureWriter
from insightv.prompting import load_prompts
from insightv.records import Message

TINY = model_folder("tiny")
FAKE = str(Path(__file__).with_name("openai_server.py"))
SMALL = [sys.executable, FAKE, "{port}", "{name}"]
SMOKE = Path(__file__).parents[2] / "configs" / "chain" / "smoke.yaml"
PROMPTS = load_prompts("tiny")
BEFORE: list[psutil.Process] = []


@pytest.fixture(autouse=True)
def _rooms(monkeypatch, tmp_path_factory):
    """Servers' own folders are made in a place of this test's, and are gone at its end."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    BEFORE[:] = psutil.Process().children(recursive=True)  # what other tests' libraries keep
    yield
    assert not left() and not scratch()


def draw(folder, count):
    """Questions of all sets, and their pictures."""
    config = QuestionsConfig(*(Sizes(test=n) for n in (count, count // 4, count // 4)))
    with PictureWriter(folder) as writer:
        found = list(make_questions("test", config, 0, writer))
    return found, Pictures([folder])


def config(*command, **server):
    told = {} if command == ("transformers",) else {"dialect": "vllm"}
    server = ServerConfig(command=list(command), **{**told, **server})
    return EngineConfig(kind="server", device="cpu", threads=1, server=server)


def run(scenario, config, pictures=None, logs=None):
    """Runs ``await scenario(engine)``."""

    async def whole():
        engine = load_engine(TINY, config, pictures or Pictures([]), logs)
        try:
            return await scenario(engine)
        finally:
            await engine.close()

    return asyncio.run(whole())


def left() -> list[psutil.Process]:
    """What still runs of all that was started here."""
    return [one for one in psutil.Process().children(recursive=True) if one not in BEFORE]


def servers() -> list[psutil.Process]:
    """The servers themselves, not their guards."""
    guards = [found for found in left() if "guard.py" in " ".join(found.cmdline()[:3])]
    return [child for guard in guards for child in guard.children()]


def asks(count, **sampling):
    sampling = Sampling(**{"max_tokens": 8} | sampling)
    return [Request((Message("user", f"{n}?"),), (), sampling, n) for n in range(count)]


def scratch() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("insightv-server-*"))


def chats(question):
    """Every kind of call: an answer, a chain, a step that goes on, a summary, text alone."""
    short, long = Sampling(max_tokens=24), Sampling(max_tokens=120)
    shown = question.pictures
    begun = '{"title": "Read all values", "content": "'
    steps = begun + 'A 3, B 4", "next_action": "continue"}\n'
    return [
        Request(direct_messages(PROMPTS, question), shown, short),
        Request(reasoning_messages(PROMPTS, question), shown, long),
        Request(reasoning_messages(PROMPTS, question, begun), shown, long, stop=("}",)),
        Request(reasoning_messages(PROMPTS, question, steps), shown, long, stop=("}", "\n\n")),
        Request(summary_messages(PROMPTS, question, steps), shown, short),
        Request(direct_messages(PROMPTS, question), (), short),
    ]


async def complete(engine, requests):
    return await asyncio.gather(*map(engine.complete, requests))


# ---- transformers serve


def same_greedy_texts(folder, count):
    questions, pictures = draw(folder / "pictures", count)
    asked = [chat for question in questions for chat in chats(question)]

    async def in_process():
        engine = load_engine(TINY, EngineConfig(device="cpu", threads=1), pictures)
        found = await complete(engine, asked), [engine.count(chat) for chat in asked]
        await engine.close()
        return found

    async def behind_http(engine):
        return await complete(engine, asked), [engine.count(chat) for chat in asked]

    here = asyncio.run(in_process())
    there = run(behind_http, config("transformers"), pictures, folder / "logs")
    differ = [n for n, pair in enumerate(zip(here[0], there[0], strict=True)) if len({*pair}) > 1]
    assert not differ, [(here[0][n], there[0][n]) for n in differ[:3]]
    assert here[1] == there[1]
    assert len({reply.text for reply in here[0]}) > len(questions)
    return len(asked)


def test_greedy_texts_are_those_of_the_engine_in_process(tmp_path):
    assert same_greedy_texts(tmp_path, 4) == 36


@pytest.mark.full
def test_greedy_texts_are_the_same_on_a_hundred_questions(tmp_path):
    assert same_greedy_texts(tmp_path, 68) == 612


@pytest.mark.full
def test_a_plain_transformers_serve_that_runs_already(tmp_path):
    """Without what is mended in one of our own: no stop strings, no key, a space lost."""
    questions, pictures = draw(tmp_path / "pictures", 4)
    asked = [chat for question in questions[:2] for chat in chats(question)]
    port = process.free_port()
    start = "from transformers.cli.transformers import app; app()"
    words = [sys.executable, "-c", start, "serve", str(TINY), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--device", "cpu"], stdout=log, stderr=log
        )
    server = ServerConfig(
        url=[f"http://127.0.0.1:{port}/v1"], model=str(TINY), dialect="transformers"
    )
    behind = EngineConfig(kind="server", server=server)

    async def both(engine):
        here = load_engine(TINY, EngineConfig(device="cpu", threads=1), pictures)
        try:
            return await complete(here, asked), await complete(engine, asked)
        finally:
            await here.close()

    try:
        here, there = run(both, behind, pictures)
    finally:
        running.kill()
        running.wait()
    assert [reply.text.strip() for reply in here] == [reply.text.strip() for reply in there]


def test_draws_keys_and_what_others_see(tmp_path):
    questions, pictures = draw(tmp_path / "pictures", 4)
    shown = questions[0].pictures
    asked = reasoning_messages(PROMPTS, questions[0])

    def drawn(seed):
        return Request(asked, shown, Sampling(2.5, 0.98, 1.1, max_tokens=40), seed)

    async def scenario(engine):
        first = await complete(engine, [drawn(seed) for seed in range(6)])
        again = await complete(engine, [drawn(seed) for seed in (3, 0)])
        (place,) = scratch()
        (server,) = servers()
        key = (place / "key").read_text()
        url = engine._replicas[0].url
        async with httpx2.AsyncClient() as client:
            for headers in ({}, {"authorization": "Bearer x"}, {"authorization": key}):
                for path in ("chat/completions", "models", "completions"):
                    refused = await client.post(f"{url}/v1/{path}", json={}, headers=headers)
                    assert refused.status_code == 401
            assert (await client.get(f"{url}/openapi.json")).status_code == 401
            known = {"authorization": f"Bearer {key}"}
            listed = (await client.get(f"{url}/v1/models", headers=known)).json()["data"]
            assert [model["id"] for model in listed] == [str(TINY)]
        assert place.stat().st_mode & 0o77 == 0
        listening = [c for c in server.net_connections() if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
        for found in left():
            assert key not in " ".join(found.cmdline())
        return first, again

    first, again = run(scenario, config("transformers"), pictures, tmp_path / "logs")
    assert again == [first[3], first[0]]  # a seed's draws are its own
    assert len({reply.text for reply in first}) > 3
    (log,) = (tmp_path / "logs").iterdir()
    said = log.read_text()
    assert said.startswith("$ ") and "transformers_serve.py" in said and "Uvicorn running" in said
    assert not re.search(r"INSIGHTV_SERVER_KEY|Bearer|Traceback", said)


# ---- a server that dies


def test_a_server_killed_twice_is_started_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("SLOW", "0.3")

    async def scenario(engine):
        asked = [asyncio.ensure_future(engine.complete(chat)) for chat in asks(120)]
        seen = []
        for done in (5, 60):
            while sum(task.done() for task in asked) < done:
                await asyncio.sleep(0.01)
            (server,) = servers()
            seen.append((server.pid, engine._replicas[0].url))
            server.kill()
        replies = await asyncio.gather(*asked)
        return replies, seen

    replies, seen = run(scenario, config(*SMALL, concurrency=10), logs=tmp_path)
    assert [reply.text for reply in replies] == [f"reply to {n}" for n in range(120)]
    assert len({*seen}) == 2
    assert caplog.text.count("SIGKILL and is started again") == 2
    assert next(tmp_path.iterdir()).read_text().count("listening") == 3


def test_deaths_of_a_slow_server_are_counted_and_not_timed(monkeypatch):
    """What counts is how often it died, not how long a request waited for it to come again."""
    monkeypatch.setenv("SLOW", "2")
    monkeypatch.setattr(engine_module, "_LONGEST_PAUSE", 0.05)

    async def scenario(engine):
        asked = asyncio.ensure_future(engine.complete(asks(1)[0]))
        (replica,) = engine._replicas
        known = set()
        for _ in range(2):
            while not replica.flying or replica.url in known:
                await asyncio.sleep(0.05)
            known.add(replica.url)
            await asyncio.sleep(1)
            (server,) = servers()
            server.kill()
        return await asked

    assert run(scenario, config(*SMALL, patience=1.5)).text == "reply to 0"


def test_a_server_that_dies_too_often_fails_the_shard(tmp_path, monkeypatch):
    monkeypatch.setenv("DIE_AT", "2")

    async def scenario(engine):
        return await asyncio.gather(*map(engine.complete, asks(9)), return_exceptions=True)

    replies = run(scenario, config(*SMALL, restarts=1, concurrency=1), logs=tmp_path)
    (problem,) = {str(reply) for reply in replies if isinstance(reply, Exception)}
    assert all(isinstance(r, ServerGone) for r in replies if isinstance(r, Exception))
    assert "died 2 times" in problem and "listening" in problem and "\n" not in problem


@pytest.mark.parametrize("wedged", ["", "1"])
def test_a_request_that_kills_its_server_fails_alone(monkeypatch, wedged):
    """It exits, or answers with nothing but errors from then on, as vLLM does."""
    monkeypatch.setenv("POISON", "5")
    monkeypatch.setenv("WEDGED", wedged)
    monkeypatch.setattr(replicas, "_SECOND_LOOK", 0.1)

    async def scenario(engine):
        return await asyncio.gather(*map(engine.complete, asks(12)), return_exceptions=True)

    replies = run(scenario, config(*SMALL))
    failed = replies.pop(5)
    assert isinstance(failed, RecordError) and "died of it 3 times" in str(failed)
    assert "CUDA out of memory" in str(failed) and "\n" not in str(failed)
    assert [reply.text for reply in replies] == [f"reply to {n}" for n in range(12) if n != 5]


def test_a_server_killed_while_it_loads_is_started_again(tmp_path, caplog):
    mark = tmp_path / "loads"
    script = (
        "import os, runpy\n"
        f"loads = open({str(mark)!r}, 'a+'); print(file=loads, flush=True)\n"
        "if os.fstat(loads.fileno()).st_size < 3: os.kill(os.getpid(), 9)\n"
        f"runpy.run_path({FAKE!r}, run_name='__main__')\n"
    )
    started = [sys.executable, "-c", script, "{port}", "{name}"]

    async def scenario(engine):
        return await asyncio.gather(*map(engine.complete, asks(3)), return_exceptions=True)

    gone = run(scenario, config(*started, restarts=1))
    assert all(isinstance(reply, ServerGone) and "died 2 times" in str(reply) for reply in gone)
    mark.unlink()
    assert [reply.text for reply in run(scenario, config(*started))] == [
        f"reply to {n}" for n in range(3)
    ]
    assert caplog.text.count("ended with SIGKILL and is started again") == 3


def test_a_server_that_hangs_is_ended_and_started_again(caplog):
    async def scenario(engine):
        await engine.complete(asks(1)[0])
        (server,) = servers()
        server.send_signal(signal.SIGSTOP)
        return await engine.complete(asks(2)[1])

    patient = config(*SMALL, timeout=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_PROBE", 0.5)
        assert run(scenario, patient).text == "reply to 1"
    assert "hangs and is ended" in caplog.text


# ---- a server that does not come


def fails(config, logs=None):
    async def scenario(engine):
        with pytest.raises(UserError) as told:
            await engine.complete(asks(1)[0])
        with pytest.raises(UserError, match=re.escape(str(told.value))):
            await engine.complete(asks(1)[0])  # at once, and the same
        assert "\n" not in str(told.value)
        return str(told.value)

    return run(scenario, config, logs=logs)


def test_a_server_that_never_answers_is_told_with_its_last_words(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(process, "_TELL", 0.5)
    script = "import time\nfor n in range(9): print('loading \\x1b[31mpart', n, flush=True)\n"
    silent = config(sys.executable, "-c", script + "time.sleep(99)", start=2.0)
    told = fails(silent, tmp_path)
    assert "did not answer within 2 s" in told and "part 7 | loading \\x1b[31mpart 8" in told
    assert "part 5" not in told and str(tmp_path) in told
    assert "has been loading for" in caplog.text


def test_a_server_that_ends_at_once_is_told_with_its_last_words(tmp_path):
    told = fails(config(sys.executable, "-c", "print('no GPU'); raise SystemExit(3)"), tmp_path)
    assert "ended with status 3 before it answered" in told and "no GPU" in told


def test_a_program_that_is_not_there(tmp_path):
    assert "no program no-such-server" in fails(config("no-such-server", "{port}"))
    script = tmp_path / "server"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert "ended with status 127" in fails(config(str(script)))


def test_a_port_that_is_taken_is_left_to_its_owner(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1]] * 2)
        plain = process.free_port
        monkeypatch.setattr(process, "free_port", lambda: next(ports, None) or plain())

        async def scenario(engine):
            return await engine.complete(asks(1)[0])

        monkeypatch.setattr(process, "_PROBE", 0.3)
        assert run(scenario, config(*SMALL)).text == "reply to 0"


def test_another_server_of_the_same_user_is_not_taken_for_ours(monkeypatch):
    with FakeServer(lambda body, n: completion("another's"), key="another") as other:
        ports = iter([other.http.server_port])
        plain = process.free_port
        monkeypatch.setattr(process, "free_port", lambda: next(ports, None) or plain())

        async def scenario(engine):
            return await engine.complete(asks(1)[0])

        assert run(scenario, config(*SMALL)).text == "reply to 0"
        assert not other.bodies


def test_ports_are_none_of_outgoing_connections():
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {process.free_port() for _ in range(20)}
    assert len(ports) > 1 and all(1024 < port < low for port in ports)


def test_the_listener_must_be_ours(monkeypatch):
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        ours.listen()
        port = ours.getsockname()[1]
        assert process._is_ours(port)
        monkeypatch.setattr(process.os, "getuid", lambda: 4242)
        assert not process._is_ours(port)


# ---- nothing is left


WORKER = """
import asyncio, sys
sys.path[:0] = [{here!r}]
from test_server_engine import SMALL, TINY, asks, config
from insightv.engines import load_engine
from insightv.pictures import Pictures

async def main():
    engine = load_engine(TINY, config(*SMALL, replicas=2), Pictures([]))
    await engine.complete(asks(1)[0])
    print("up", flush=True)
    await asyncio.sleep(99)

asyncio.run(main())
"""


def test_nothing_outlives_a_worker_that_is_killed_while_its_server_loads():
    loading = config(sys.executable, "-c", "import time; time.sleep(99)").server.command
    script = WORKER.format(here=str(Path(__file__).parent)).replace("*SMALL", f"*{loading!r}")
    worker = subprocess.Popen([sys.executable, "-c", script])
    while len(found := psutil.Process(worker.pid).children(recursive=True)) < 4:
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    _, alive = psutil.wait_procs(found, 10)
    assert not alive and not scratch()


def test_a_log_that_grows_too_long_loses_its_middle(tmp_path):
    path = tmp_path / "log"
    path.write_text("first\n" + "x" * 5000 + "\nlast\n")
    script = f"import sys; sys.path[:0] = [{str(process._GUARD.parent)!r}]; import guard; "
    with path.open("a+b") as log:
        for words in (f"{script}guard.trim(6000)", f"{script}guard.trim(4000, 100)"):
            subprocess.run([sys.executable, "-c", words], stdout=log, check=True)
        log.write(b"more\n")
    said = path.read_text()
    assert said.startswith("first\nxx") and said.endswith("xx\nlast\nmore\n")
    assert len(said) < 300 and "4812 bytes cut out" in said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_worker_that_is_killed(how):
    script = WORKER.format(here=str(Path(__file__).parent))
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "up\n"
    found = psutil.Process(worker.pid).children(recursive=True)
    assert len(found) == 4  # two guards, two servers
    assert len(scratch()) == 2
    worker.send_signal(how)
    worker.wait()
    worker.stdout.close()
    _, alive = psutil.wait_procs(found, 10)
    assert not alive and not scratch()


def test_what_a_server_leaves_behind_is_ended_too(tmp_path):
    """A child in a session of its own, as servers start them, which heeds no signal."""
    noted = tmp_path / "pid"
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
    script = (
        "import subprocess, sys, runpy\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)\n"
        f"open({str(noted)!r}, 'w').write(str(child.pid))\n"
        f"sys.argv[1:] = sys.argv[1:]\nrunpy.run_path({FAKE!r}, run_name='__main__')\n"
    )

    async def scenario(engine):
        await engine.complete(asks(1)[0])

    run(scenario, config(sys.executable, "-c", script, "{port}", "{name}"))
    assert not psutil.pid_exists(int(noted.read_text()))


def test_closing_an_engine_that_was_never_asked():
    async def scenario(engine):
        assert engine.concurrency == 256 and engine.count(asks(1)[0]) == 5

    run(scenario, config(*SMALL))


# ---- how servers are started


def place(tmp_path, **more):
    return Place(TINY, "m", 1234, "s3cret", tmp_path, **more)


def test_presets_say_what_they_must_and_never_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    for preset in ("vllm", "sglang", "transformers"):
        started = config(preset, python=sys.executable, options=["--more", "2"])
        started.context, started.dtype = 2048, "bfloat16"
        told = words(started, place(tmp_path, gpus=("4", "5"), share=0.5))
        assert "s3cret" not in " ".join(told) and told[-2:] == ["--more", "2"]
        assert told[told.index("--port") + 1] == "1234"
        assert told[told.index("--host") + 1] == "127.0.0.1"
        assert "bfloat16" in told and str(TINY) in told
        memory = {"vllm": "--gpu-memory-utilization", "sglang": "--mem-fraction-static"}
        if preset in memory:
            assert told[told.index(memory[preset]) + 1] == "0.450" and "2048" in told
        env = variables(started, place(tmp_path, gpus=("4", "5")))
        assert env["INSIGHTV_SERVER_KEY"] == env["VLLM_API_KEY"] == "s3cret"
        assert env["CUDA_VISIBLE_DEVICES"] == "4,5" and env["HF_HUB_OFFLINE"] == "1"
        assert env["VLLM_CACHE_ROOT"] == f"{tmp_path}/vllm"
        assert "RANK" not in env and "PYTHONPATH" not in env
    assert "s3cret" in (tmp_path / "settings.yaml").read_text()  # SGLang takes it there
    for name in ("key", "settings.yaml"):
        assert (tmp_path / name).stat().st_mode & 0o77 == 0


def test_an_image_gets_the_key_unseen_and_sees_the_model(tmp_path, monkeypatch):
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    started = config("vllm", image="/images/vllm.sif", binds=["/data"])
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        told = words(started, place(tmp_path, gpus=("0",)))
    assert told[:2] == ["bash", "-c"] and told[4:6] == ["vllm", "serve"]
    assert f"{TINY}:{TINY}:ro" in told[2] and "/data" in told[2]
    assert "s3cret" not in " ".join(told)
    assert "INSIGHTV_SERVER_KEY" in told[2] and "image_gpus=1" in told[2]
    monkeypatch.setenv("PATH", "/no/such/folder")
    with pytest.raises(UserError, match="in an image itself"):
        words(started, place(tmp_path))


def test_gpus_are_divided(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-6,7")
    assert split_gpus(2) == [("4", "5"), ("GPU-6", "7")]
    with pytest.raises(UserError, match="4 GPUs cannot be divided"):
        split_gpus(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert split_gpus(2) == [(), ()]


# ---- a stage


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_stage_whose_server_is_killed_twice_has_the_same_keys(tmp_path):
    """Generation with workers, leases and shards, beside the same without a server."""
    small = [
        "questions={charts: {train: 24}, reading: {train: 1}, shapes: {train: 1}, per_shard: 4}",
        "generation={paths: 2, max_steps: 4}",
        "local={slots: 1, workers: 1}",
        "engine={device: cpu, threads: 1}",
    ]
    behind = "engine={kind: server, device: cpu, threads: 1, server: {command: [transformers]}}"
    plain, served = tmp_path / "plain", tmp_path / "served"
    assert generate(plain, small) == []
    killed = generate(served, [*small, behind], kills=2)
    assert len({*killed}) == 2
    assert keys(served) == keys(plain) and len(keys(plain)) == 26
    assert [key for key, rows in keys(served) if not rows] == []
    (log,) = (served / "stages" / "r0-generate" / "logs").glob("server-*.log")
    assert log.read_text().count("Uvicorn running") == 3


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_paths_drawn_by_a_server_are_right_as_often(tmp_path):
    """The same model and sampling, other draws: accuracies differ by chance alone."""
    asked = [
        "questions={charts: {train: 80}, reading: {train: 10}, shapes: {train: 10}, per_shard: 25}",
        "generation={paths: 2, max_steps: 6}",
        "local={slots: 1, workers: 1}",
        "engine={device: cpu, threads: 1}",
    ]
    behind = "engine={kind: server, device: cpu, threads: 1, server: {command: [transformers]}}"
    stages = ("questions-train", "r0-generate", "r0-judge")
    plain, served = tmp_path / "plain", tmp_path / "served"
    assert generate(plain, asked, stages=stages) == generate(served, [*asked, behind], 0, stages)
    wanted, found = right(plain), right(served)
    assert list(found) == list(wanted) and len(wanted) == 200
    drawn = list(wanted.values()), list(found.values())
    difference = paired_difference(*drawn, [key.split("/")[0] for key in wanted])
    assert difference.low <= 0 <= difference.high and difference.high - difference.low < 0.25
    assert 40 < sum(drawn[0]) < 200 and drawn[0] != drawn[1]


def right(run):
    """Each path with whether its answer is right; a path that failed is not."""
    judged = {
        row["path"]: bool(row["correct"]) for _, rows in rows_of(run, "judge") for row in rows
    }
    return {
        row["key"]: judged.get(row["key"], False)
        for _, rows in rows_of(run, "generate")
        for row in rows
    }


def rows_of(run, stage):
    folder = run / "stages" / f"r0-{stage}" / "shards"
    return [group for path in shard_paths(folder) for group in read_groups(path)]


def keys(run):
    return [(key, [row["key"] for row in rows]) for key, rows in rows_of(run, "generate")]


def generate(run, overrides, kills=0, stages=("questions-train", "r0-generate")):
    """Runs a chain's first stages; ends its server so often once paths are there."""
    killed: list[int] = []
    driving = begun(run, read(SMOKE, overrides), stages)
    while driving.is_alive():
        time.sleep(0.2)
        done = len(list((run / "stages" / "r0-generate" / "shards").glob("*.json")))
        if len(killed) < kills and done > 2 * len(killed):
            for server in servers():
                if server.pid not in killed:
                    killed.append(server.pid)
                    server.kill()
    return killed
