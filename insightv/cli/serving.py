"""``insightv serve``: a run's agents for any chat client."""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from hpc.errors import UserError
from insightv.cli.models import agents_of, config_of
from insightv.cli.runs import RunArgument, console, opened


def serve(
    directory: RunArgument,
    port: Annotated[int, typer.Option(help="Where to listen; 0: any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="127.0.0.1: this machine alone.")] = "127.0.0.1",
    key_file: Annotated[
        Path | None, typer.Option(help="The key to ask for; by default RUN/serve.key, made here.")
    ] = None,
) -> None:
    """Serve the agents over the OpenAI protocol.

    A model name for each way of answering. The reasoning of multi-agent is streamed step by
    step, then the answer.
    """
    try:
        import uvicorn

        from insightv.serving import MODELS, Agents, LentPictures, application
    except ImportError as error:
        raise UserError(f"insightv serve needs {error.name}: pip install -e '.[serve]'") from None
    from insightv.engines import Engine, load_engine
    from insightv.evaluation.answering import EntryConfig
    from insightv.folders import model_folder
    from insightv.prompting import load_prompts

    run = opened(directory).run
    config = config_of(run)
    reasoning, summary = agents_of(run)
    base = config.models.base
    folders = {"base": model_folder(base.path), "reasoning": reasoning, "summary": summary}
    offered = [name for name in MODELS if name != "single-agent"]
    if (run.models / "direct").is_dir():
        folders["single"], offered = run.models / "direct", [*MODELS]
    pictures = LentPictures()

    def load(role: str) -> Engine:
        special = base.engine if role == "base" else None
        return load_engine(
            folders[role], special or config.engine, pictures, share=1 / len(folders)
        )

    asked = config.evaluation
    entry = EntryConfig("serve", "multi_agent", "-", "-", asked.reasoning, asked.answer)
    agents = Agents(load, load_prompts(base.prompts), entry, tuple(offered))
    key_path = key_file or run.path / "serve.key"
    app = application(agents, pictures, _key(key_path))
    settings = uvicorn.Config(
        app, log_level="warning", limit_concurrency=1024, timeout_graceful_shutdown=5
    )
    with _listening(host, port) as listener:
        where = f"http://{host}:{listener.getsockname()[1]}/v1"
        console().print(f"{where}  models: {', '.join(offered)}  key: {key_path}", soft_wrap=True)
        with suppress(KeyboardInterrupt):  # the usual end
            uvicorn.Server(settings).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: It cannot.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        told = getattr(error, "strerror", None) or error
        raise UserError(
            f"{host}:{port} cannot be listened at: {told}; give another --port"
        ) from None
    return listener


def _key(path: Path) -> str:
    """The key in a file, which is made if it is not there.

    Raises:
        UserError: It cannot be read, or others can.
    """
    from insightv.engines.server.config import read_key

    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file with --key-file") from None
    return read_key(str(path), "--key-file")


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command("serve", rich_help_panel="Look")(serve)
