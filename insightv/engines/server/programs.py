"""How the known servers are started: their words, their variables, where their key goes."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hpc.container import Container
from hpc.container import command as contained
from hpc.disk import expanded
from hpc.errors import UserError
from insightv.folders import is_gguf

if TYPE_CHECKING:
    from insightv.engines.config import EngineConfig

HOST = "127.0.0.1"
KEY = "INSIGHTV_SERVER_KEY"
SLOTS = 4
"""Requests that llama.cpp answers at once, unless told."""
_LAUNCHER = Path(__file__).with_name("transformers_serve.py")
_LLAMACPP = Path(__file__).with_name("llamacpp_serve.py")
_MEMORY = 0.9
"""Share of a GPU's memory for weights and keys and values; vLLM's own default."""
_CACHES = {
    "XDG_CACHE_HOME": "cache",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "CUDA_CACHE_PATH": "cuda",
    "VLLM_CACHE_ROOT": "vllm",
    "NUMBA_CACHE_DIR": "numba",
}
_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class Place:
    """What one start of a server is given.

    Attributes:
        model: The model's folder.
        name: What requests call it.
        port: Where it is to listen, on the loopback interface.
        key: What it is to ask of its clients.
        folder: A folder of its own, which nobody else can read; removed at its end.
        gpus: The GPUs it may use, as CUDA_VISIBLE_DEVICES names them; none: it sees all.
        share: Its part of their memory.
    """

    model: Path
    name: str
    port: int
    key: str
    folder: Path
    gpus: tuple[str, ...] = ()
    share: float = 1.0


def words(config: EngineConfig, place: Place) -> list[str]:
    """The command that starts a server. The key is in none of its words.

    Raises:
        UserError: The program, or what runs images, is not there.
    """
    key_file = place.folder / "key"
    _write_secret(key_file, place.key)
    server = config.server
    make = {
        "vllm": _vllm,
        "sglang": _sglang,
        "transformers": _transformers,
        "llamacpp": _llamacpp,
    }.get(server.preset)
    command = make(config, place) + server.options if make else _custom(config, place, key_file)
    if server.image:
        image = Container(str(expanded(server.image).absolute()), binds=server.binds)
        if shutil.which(image.runtime) is None:
            raise UserError(
                f"engine.server.image: there is no {image.runtime} here; a worker that is in an "
                "image itself cannot start another: put the server into that image"
            )
        image.passed.append(KEY)
        model = place.model.absolute()
        seen = [model.parent if is_gguf(model) else model, _LAUNCHER.parent, place.folder]
        return contained(image.seeing(seen), place.folder, command, gpus=len(place.gpus))
    command[0] = _absolute(command[0])  # the server starts in a folder of its own
    if shutil.which(command[0]) is None:
        raise UserError(
            f"engine.server: no program {command[0]} here; name the interpreter of the environment "
            "it is installed in as engine.server.python, or an image as engine.server.image"
        )
    return command


def inherited(other_python: bool) -> dict[str, str]:
    """This process's environment without its rendezvous, and what misleads another Python."""
    dropped = {*_RENDEZVOUS, *(_PYTHON if other_python else ())}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def variables(config: EngineConfig, place: Place) -> dict[str, str]:
    """The server's environment: the worker's, less what would mislead it."""
    server = config.server
    env = inherited(other_python=bool(server.python))
    root = expanded(server.cache).absolute() if server.cache else place.folder
    env |= {name: str(root / folder) for name, folder in _CACHES.items()}
    env |= {KEY: place.key, "VLLM_API_KEY": place.key, "PYTHONUNBUFFERED": "1"}
    # The model is a folder here; nothing is fetched, and nobody is told.
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if place.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
    if config.threads:
        env["OMP_NUM_THREADS"] = str(config.threads)
    return env


def split_gpus(replicas: int) -> list[tuple[str, ...]]:
    """The GPUs of each replica: equal parts of those this process may see.

    Raises:
        UserError: They cannot be divided so.
    """
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        known = Path("/proc/driver/nvidia/gpus")
        found = [str(n) for n in range(len(list(known.iterdir())))] if known.is_dir() else []
    else:
        found = [name for name in told.split(",") if name.strip()]
    if len(found) % replicas:
        raise UserError(
            f"engine.server.replicas is {replicas}: {len(found)} GPUs cannot be divided so"
        )
    each = len(found) // replicas
    return [tuple(found[n * each : (n + 1) * each]) for n in range(replicas)]


def _vllm(config: EngineConfig, place: Place) -> list[str]:
    python = config.server.python
    model = str(place.model)
    start = [python, "-m", "vllm.entrypoints.openai.api_server", "--model"] if python else []
    command = [*(start or ["vllm", "serve"]), model, *_listening(place)]
    command += ["--served-model-name", place.name, "--uvicorn-log-level", "warning"]
    command += _given("--dtype", config.dtype if config.dtype != "auto" else "")
    command += _given("--max-model-len", config.context)
    return command + _given("--gpu-memory-utilization", _part(place))


def _sglang(config: EngineConfig, place: Place) -> list[str]:
    settings = place.folder / "settings.yaml"  # the only way to give it a key unseen
    _write_secret(settings, yaml.safe_dump({"api-key": place.key}))
    command = [config.server.python or "python3", "-m", "sglang.launch_server"]
    command += ["--config", str(settings), "--model-path", str(place.model), *_listening(place)]
    command += ["--served-model-name", place.name, "--log-level", "warning"]
    command += _given("--dtype", config.dtype if config.dtype != "auto" else "")
    command += _given("--context-length", config.context)
    return command + _given("--mem-fraction-static", _part(place))


def _transformers(config: EngineConfig, place: Place) -> list[str]:
    inside = "python3" if config.server.image else sys.executable
    command = [config.server.python or inside, str(_LAUNCHER), str(place.model), *_listening(place)]
    command += ["--device", config.device, "--dtype", config.dtype]
    return [*command, "--log-level", "error"]


def _llamacpp(config: EngineConfig, place: Place) -> list[str]:
    python, slots = config.server.python, config.server.concurrency or SLOTS
    command = [python, str(_LLAMACPP)] if python else ["llama-server"]
    command += ["--model", str(place.model), "--alias", place.name, *_listening(place)]
    command += ["--api-key-file", str(place.folder / "key"), "--parallel", str(slots)]
    command += ["--log-verbosity", "2"]  # warnings: else several lines for each request
    command += _given("--threads", config.threads)
    return command + _given("--ctx-size", slots * config.context)


def _custom(config: EngineConfig, place: Place, key_file: Path) -> list[str]:
    known = {
        "{model}": str(place.model),
        "{name}": place.name,
        "{host}": HOST,
        "{port}": str(place.port),
        "{key_file}": str(key_file),
    }
    command = []
    for word in config.server.command:
        for name, value in known.items():
            word = word.replace(name, value)
        command.append(word)
    return command


def _write_secret(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _absolute(program: str) -> str:
    return str(expanded(program).absolute()) if "/" in program else program


def _listening(place: Place) -> list[str]:
    return ["--host", HOST, "--port", str(place.port)]


def _part(place: Place) -> str:
    """Its share of the GPUs' memory; left to the server where nobody else wants any."""
    return f"{_MEMORY * place.share:.3f}" if place.share < 1 else ""


def _given(option: str, value: object) -> list[str]:
    return [option, str(value)] if value else []
