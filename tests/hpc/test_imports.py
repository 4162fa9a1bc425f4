"""`hpc` stands alone: it never imports the method or what the method is built on."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import hpc

FORBIDDEN = {"insightv", "torch", "transformers"}


def test_no_source_names_them() -> None:
    found = []
    for path in Path(hpc.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                # importlib.import_module("torch")
                names = [node.value] if node.value in FORBIDDEN else []
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] in FORBIDDEN]
    assert not found


def test_importing_everything_loads_none_of_them() -> None:
    modules = [item.name for item in pkgutil.walk_packages(hpc.__path__, "hpc.")]
    assert "hpc.driver" in modules and "hpc.executors.local" in modules
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & FORBIDDEN
