"""Where a server is, or how it is started, and how much is asked of it at once."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from hpc.config import unhashed, unhashed_factory
from hpc.container import Container
from hpc.disk import expanded
from hpc.errors import UserError

PRESETS = ("vllm", "sglang", "transformers", "llamacpp")
"""Servers whose command line is known here."""
DIALECTS = ("vllm", "sglang", "transformers", "llamacpp", "openai")
"""What servers take beyond the protocol; ``openai`` is the protocol alone."""


@dataclass
class ServerConfig:
    """An OpenAI-compatible server: one that runs (``url``), or one to start (``command``).

    Attributes:
        url: Of running servers, ``http://127.0.0.1:8000``. Several are replicas of one model;
            all that is asked about a picture goes to the same of them.
        key_file: File with the API key of the servers at ``url``; nobody else may read it.
        model: What the servers at ``url`` call the model. Empty: what they list, if it is one.
        dialect: ``vllm``, ``sglang``, ``transformers``, ``llamacpp``, or ``openai`` for the bare
            protocol; the last two cannot go on with a turn: no progressive generation. Empty:
            that of the preset in ``command``, or what a server at ``url`` says it is.
        command: ``[vllm]``, ``[sglang]``, ``[transformers]`` or ``[llamacpp]``, started beside each
            worker; or the words of any other, in which {model}, {name}, {host}, {port} and
            {key_file} are filled in. The key also stands in the variable INSIGHTV_SERVER_KEY.
        options: More words behind those of a preset: ``[--tensor-parallel-size, "4"]``.
        python: Interpreter of the environment that the server is installed in; vLLM and SGLang
            pin a torch of their own, and llama.cpp is then the package xllamacpp. Empty:
            ``vllm``, ``llama-server`` and ``python3`` as the PATH has them, and this environment
            for transformers.
        image: An Apptainer image (.sif) that the server runs in; the worker itself must not.
        binds: Folders that are seen in the image beside the model's, as SOURCE[:INSIDE[:ro]].
        replicas: Servers started beside each worker, with an equal part of its GPUs each.
        cache: Folder of what servers compile. Empty: one of each server's own, removed at its
            end; servers that share one have corrupted it.
        concurrency: Requests in flight to each replica. 0: 256, or 8 for transformers, which
            answers one after the other, and 4 for llama.cpp, among whose slots its context is
            divided.
        timeout: Seconds for one answer, its wait inside the server included. With all ``tries``
            it should stay below the time after which a worker counts as hung (30 minutes).
        tries: Most attempts at a request that the server fails at (status 500, no answer in time,
            an answer that is none); after that its record fails.
        patience: Seconds to wait, all in all, for a server that is too busy, or that others
            start again; after that the worker fails, and its shards are taken up again.
        start: Seconds until a server must answer for the first time.
        restarts: Times that a server is started again when it dies, or is killed while it loads.
            A request that it dies of gives them back, once that is found out; that takes two.
    """

    url: list[str] = unhashed_factory(list)
    key_file: str = unhashed("")
    model: str = unhashed("")
    dialect: str = unhashed("")
    command: list[str] = unhashed_factory(list)
    options: list[str] = unhashed_factory(list)
    python: str = unhashed("")
    image: str = unhashed("")
    binds: list[str] = unhashed_factory(list)
    replicas: int = unhashed(1)
    cache: str = unhashed("")
    concurrency: int = unhashed(0)
    timeout: float = unhashed(500.0)
    tries: int = unhashed(3)
    patience: float = unhashed(600.0)
    start: float = unhashed(1200.0)
    restarts: int = unhashed(3)

    @property
    def preset(self) -> str:
        """The known server that is to be started; empty for others."""
        known = len(self.command) == 1 and self.command[0] in PRESETS
        return self.command[0] if known else ""

    @property
    def speaks(self) -> str:
        """The dialect as far as the configuration tells it."""
        return self.dialect or self.preset

    def validate(self, name: str) -> None:
        """Checks the values; ``name`` is the section's, for the message.

        Raises:
            UserError: One of them is not possible, or they contradict each other.
        """
        if bool(self.url) == bool(self.command):
            presets = ", ".join(f"[{preset}]" for preset in PRESETS)
            raise UserError(
                f"{name}: give url (servers that run) or command ({presets} or words), one of both"
            )
        if self.command and self.key_file:
            raise UserError(
                f"{name}.key_file: only of servers at url; others get a key by themselves"
            )
        if self.dialect and self.dialect not in DIALECTS:
            raise UserError(f"{name}.dialect is {self.dialect!r}: use {', '.join(DIALECTS)}")
        if self.command and not self.speaks:
            raise UserError(
                f"{name}.dialect: say what {self.command[0]!r} is like: {', '.join(DIALECTS)}"
            )
        for url in self.url:
            self._check_url(name, url)
        if len(set(self.url)) < len(self.url):
            raise UserError(f"{name}.url: the same server twice; name each once")
        for field, least in (("replicas", 1), ("tries", 1), ("concurrency", 0), ("restarts", 0)):
            if getattr(self, field) < least:
                raise UserError(f"{name}.{field} is {getattr(self, field)}: give {least} or more")
        for field in ("timeout", "patience", "start"):
            if not getattr(self, field) > 0:
                raise UserError(f"{name}.{field} is {getattr(self, field)}: give seconds above 0")
        if self.options and not self.preset:
            raise UserError(f"{name}.options: only presets take them; write them into command")
        if self.binds and not self.image:
            raise UserError(f"{name}.binds: only an image sees them; give image, or no binds")
        Container(self.image, binds=self.binds).validate(name)
        if self.image and self.python and not self.python.startswith("/"):
            raise UserError(f"{name}.python: give the interpreter's path in the image, or nothing")

    def _check_url(self, name: str, url: str) -> None:
        try:
            parts = urlsplit(url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            secret = parts.username or parts.password or parts.query or parts.fragment
        except ValueError:
            fine, secret = False, None
        if not fine:
            raise UserError(f"{name}.url: {url!r} is no address; write http://HOST:PORT")
        if secret:
            raise UserError(f"{name}.url: a host and a port are enough; keys go into key_file")
        if not self.key_file and not _loopback(str(parts.hostname)):
            raise UserError(
                f"{name}.url: {parts.hostname} can be reached by others; start that server with a "
                "key and name its file as key_file"
            )


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(name: str, option: str = "engine.server.key_file") -> str:
    """The key in a file that nobody else may read; none without a file.

    Raises:
        UserError: It cannot be read, or others can; the line begins with ``option``.
    """
    if not name:
        return ""
    path = expanded(name)
    try:
        key = path.read_text().strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{option}: others can read {path}; chmod 600 it")
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"{option}: {path} holds no key; write it on one line")
    return key
