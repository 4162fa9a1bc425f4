"""``llama-server`` for environments that hold llama.cpp as the package xllamacpp.

It has the server of llama.cpp, and no command. This takes those words of ``llama-server`` that a
worker starts it with. Runs in the environment that xllamacpp is installed in, which need not be
this package's.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any


def words() -> argparse.ArgumentParser:
    """The command line, as ``llama-server`` has it."""
    parser = argparse.ArgumentParser("llamacpp_serve.py", allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-a", "--alias", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("-np", "--parallel", type=int, default=0)
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("-lv", "--log-verbosity", type=int, default=3)
    parser.add_argument("-ngl", "--n-gpu-layers", type=int)
    return parser


def main() -> None:
    """Runs the server until it is ended."""
    given = words().parse_args()
    import xllamacpp

    asked: Any = xllamacpp.CommonParams()
    asked.model.path, asked.hostnames, asked.port = given.model, [given.host], given.port
    asked.n_ctx, asked.verbosity = given.ctx_size, given.log_verbosity
    if given.alias:
        asked.model_alias = {given.alias}
    if given.api_key_file:
        asked.api_keys = given.api_key_file.read_text().split()
    if given.parallel:
        asked.n_parallel = given.parallel
    if given.threads:
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = given.threads
    if given.n_gpu_layers is not None:
        asked.n_gpu_layers = given.n_gpu_layers
    try:
        server = xllamacpp.Server(asked)
    except RuntimeError as error:
        sys.exit(f"llama.cpp: {error}")
    print(f"listening at {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
