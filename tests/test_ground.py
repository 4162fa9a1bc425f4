"""The ground: what may import what, what is pinned, what the Makefile would do."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN_IN_HPC = {"insightv", "torch", "transformers"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imports_of(source: str) -> set[str]:
    """Top-level names of every import in a module, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_imports_of_sees_nested_imports():
    assert imports_of("def f():\n    from torch.nn import Linear\n    import os.path") == {
        "torch",
        "os",
    }


@pytest.mark.parametrize(
    "path", sorted((ROOT / "hpc").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_hpc_imports_nothing_of_the_method(path):
    assert not imports_of(path.read_text()) & FORBIDDEN_IN_HPC


def loaded_after(statement: str, cwd: Path = ROOT) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_hpc_loads_alone():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "hpc").rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert len(modules) > 5
    assert not loaded_after("import " + ", ".join(modules)) & FORBIDDEN_IN_HPC


def test_command_line_loads_no_model_library():
    """`insightv --help` and every command that needs no model answer at once."""
    assert not loaded_after("import insightv.cli") & {
        "torch",
        "transformers",
        "datasets",
        "pandas",
        "numpy",
        "sklearn",
    }


def test_building_a_chain_loads_no_model_library():
    assert not loaded_after("import insightv.chain, insightv.config") & {"torch", "transformers"}


def requirement_name(requirement: str) -> str:
    return re.split(r"[<>=\[; ]", requirement)[0].lower().replace("_", "-")


def test_every_requirement_is_pinned_exactly():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "ranges or local versions"
    pinned = {requirement_name(pin) for pin in pins}
    extras = PROJECT["optional-dependencies"].values()
    wanted = {requirement_name(item) for item in sum(extras, PROJECT["dependencies"])}
    assert wanted <= pinned
    assert "torch==2.13.0" in pins


def test_every_requirement_is_used():
    """A dependency nobody imports is a download nobody needs."""
    modules = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}
    sources = [path for name in ("hpc", "insightv") for path in (ROOT / name).rglob("*.py")]
    used = set().union(*(imports_of(path.read_text()) for path in sources))
    named = "".join(path.read_text() for path in sources)
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["demo"]]:
        name = requirement_name(requirement)
        module = modules.get(name, name.replace("-", "_"))
        assert module in used or f"{module}.datasets" in named, f"{name} is imported nowhere"


def test_licence_is_apache_2():
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.mark.parametrize("target", ["demo", "test", "test-full", "lint", "clean"])
def test_makefile_plans_from_nothing(target, tmp_path):
    plan = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path}/venv"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    if target == "clean":
        assert "runs" not in plan
        return
    installs = plan.index("-m pip install")
    assert plan.index("-m venv") < installs
    assert "-c constraints.txt" in plan[installs:]
    first = {"demo": "insightv run configs/chain/quickstart.yaml"}.get(target, "ruff check")
    assert installs < plan.index(first)
    assert ("-m pytest" in plan) == target.startswith("test")


@pytest.mark.parametrize("script", ["/bin/false", "/no/such/python"])
def test_makefile_says_what_python_it_wants(script, tmp_path):
    done = subprocess.run(
        ["make", "demo", f"PYTHON={script}", f"VENV={tmp_path}/venv"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_makefile_is_quick_the_second_time(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("bin/python", ".demo", ".test"):
        (venv / name).touch()
    plan = subprocess.run(
        ["make", "-n", "demo", f"VENV={venv}"], capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert "insightv run" in plan and "pip" not in plan


def test_ci_script_is_valid_and_executable():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def tracked_texts() -> list[Path]:
    skipped = {".git", ".venv", "runs", "__pycache__", ".cache"}
    texts = {".py", ".md", ".toml", ".yaml", ".txt", ".html", ".css", ".js", ".sh", ""}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.suffix in texts
        and not skipped & set(path.relative_to(ROOT).parts)
        and not any(
            part.startswith(".") and part != ".ci" for part in path.parts[len(ROOT.parts) :]
        )
        and "egg-info" not in str(path)
    ]


def test_no_path_of_one_machine():
    """Nothing refers to a home or working folder of the machine it was written on."""
    found = re.compile(r"(?<![\w./])/(?:w[o]rk|r[o]ot|home/\w+)/")
    guilty = [
        str(path.relative_to(ROOT))
        for path in tracked_texts()
        if found.search(path.read_text(errors="ignore"))
    ]
    assert not guilty
