"""Building images and looking into them, with real Apptainer."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import making
import pytest

from hpc import images
from hpc.errors import UserError
from hpc.inside import shadowed


def test_a_build_leaves_digest_and_contents(image: Path) -> None:
    kept = image.with_name(f"{image.name}.sha256").read_text()
    assert kept == f"{hashlib.sha256(image.read_bytes()).hexdigest()}  {image.name}\n"
    told = json.loads(image.with_name(f"{image.name}.spdx.json").read_text())
    assert told["spdxVersion"] == "SPDX-2.3"
    found = {package["name"]: package for package in told["packages"]}
    for name in ("insightv-hpc", "omegaconf"):
        assert found[name]["versionInfo"] and "declared" in found[name]["licenseComments"]
    labels = subprocess.run(["apptainer", "inspect", image], capture_output=True, text=True).stdout
    assert "insightv.lock.sha256" in labels and "insightv-small" in labels


def test_the_runscript_is_the_command(image: Path) -> None:
    as_root = ["--userns"] if os.geteuid() == 0 else []
    words = ["apptainer", "--quiet", "run", *as_root, "--no-home", image, "--version"]
    assert subprocess.run(words, capture_output=True, text=True).stdout.startswith("insightv ")


def test_a_broken_image_fails_its_own_test(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        making.build(tmp_path, base, "broken", lock="omegaconf==0.0.1\n")
    said = str(caught.value)
    assert "%test" in said and "omegaconf" in said and "locked is 0.0.1" in said
    assert not (tmp_path / "broken.sif").exists() and not list(tmp_path.glob(".*.sif"))


def test_check_says_what_a_node_and_an_image_make(image: Path, tmp_path: Path) -> None:
    done = making.insightv("image", "check", image, "--run-dir", tmp_path / "runs")
    assert "versions" in done.stdout and "as locked" in done.stdout, done.stdout + done.stderr
    assert "run directory" in done.stdout and "shadowed" in done.stdout
    # No torch in it: the one thing to mend, and a status that says so.
    assert done.returncode == 2 and "1 to mend" in done.stdout


def test_check_fails_where_packages_are_shadowed(image: Path, tmp_path: Path) -> None:
    planted = tmp_path / "packages"
    planted.mkdir()
    (planted / "jinja2.py").touch()
    profile = tmp_path / "p.yaml"
    options = f"[--env, 'PYTHONPATH={planted}']"
    profile.write_text(f"container: {{image: x.sif, binds: [{planted}], options: {options}}}\n")
    words = ("image", "check", image, "--run-dir", tmp_path / "runs", "--cluster", profile)
    done = making.insightv(*words, "--imports", "hpc")
    assert done.returncode == 2 and "not the image's own: jinja2" in done.stdout, done.stderr


def test_shadows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typer").mkdir()
    (tmp_path / "typer" / "__init__.py").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "mine.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [word for word in shadowed() if str(tmp_path) in word] == [
        f"typer ({tmp_path / 'typer'})"
    ]


def test_a_wrong_copy_is_told(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / image.name
    copy.write_bytes(image.read_bytes()[:-1])
    kept = image.with_name(f"{image.name}.sha256")
    copy.with_name(kept.name).write_text(kept.read_text())
    for command in ("verify", "check"):
        done = making.insightv("image", command, copy)
        assert done.returncode == 2 and "copy" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system with no room."""
    if os.geteuid() != 0:
        pytest.skip("mounting wants root")
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_temporary_folder_is_told_before_the_build(full: Path, tmp_path: Path) -> None:
    file = making.definition(tmp_path / "d")
    words = ("image", "build", file, "--to", tmp_path / "x.sif", "--base", tmp_path)
    done = making.insightv(*words, env={"APPTAINER_TMPDIR": str(full)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "APPTAINER_TMPDIR" in done.stderr and "GiB free" in done.stderr


def test_no_user_namespaces_are_told_before_the_build(tmp_path: Path) -> None:
    file = making.definition(tmp_path / "d")
    limit = 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"'
    words = ["unshare", "--user", "--map-root-user", "bash", "-c", limit, "limited"]
    words += [images.sys.executable, "-m", "insightv", "image", "build", str(file), "--fakeroot"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=making.ROOT)
    assert done.returncode == 2 and "user namespaces: cannot be made here" in done.stderr


def test_a_definition_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cpu, serve, train"):
        images.find("tarin", making.ROOT / "containers")
    (tmp_path / "x.def").write_text("Bootstrap: docker\n")
    with pytest.raises(UserError, match="no lock file"):
        images.find(str(tmp_path / "x.def"), tmp_path)


@pytest.mark.parametrize("name", ["cpu", "train", "serve"])
def test_the_definitions_are_whole(name: str, tmp_path: Path) -> None:
    """Apptainer parses them as far as their first fetch; what they run is a shell's."""
    definition = images.find(name, making.ROOT / "containers")
    text = definition.file.read_text()
    for place in text.split("\n%")[1:]:
        section, _, lines = place.partition("\n")
        if section in ("post", "test", "environment", "runscript"):
            body = "\n".join(line for line in lines.split("\nBootstrap")[0].splitlines())
            done = subprocess.run(["bash", "-n", "-c", body], capture_output=True, text=True)
            assert done.returncode == 0, f"{name} %{section}: {done.stderr}"
    assert "insightv --version" in text and 'exec insightv "$@"' in text
    pinned = images_lock(definition.lock)
    assert pinned["torch"] and all(pinned.values())
    if name != "serve":
        assert {"omegaconf", "submitit", "transformers"} <= set(pinned)


def images_lock(path: Path) -> dict[str, int]:
    """Packages of a lock file with the number of their digests."""
    found: dict[str, int] = {}
    for line in path.read_text().splitlines():
        if line.startswith("    --hash=sha256:"):
            found[list(found)[-1]] += 1
        elif line and not line.startswith("#"):
            found[line.partition("==")[0]] = 0
    return found


@pytest.mark.parametrize("name", ["train", "serve"])
def test_apptainer_parses_the_definitions(name: str, tmp_path: Path, base: Path) -> None:
    """With an empty base that fails at its first command: nothing is fetched."""
    empty = tmp_path / "empty"
    (empty / "bin").mkdir(parents=True)
    definition = images.find(name, making.ROOT / "containers")
    given = [f"{base}={empty}" for base in definition.bases]
    words = [word for one in given for word in ("--base", one)]
    fake = ["--fakeroot"] if os.geteuid() == 0 else []
    room = {"PATH": os.environ["PATH"]}
    target = tmp_path / "never.sif"
    monkey = definition.file.read_text().replace("# room: 60 GiB", "").replace("# room: 50 GiB", "")
    (tmp_path / f"{name}.def").write_text(monkey)
    (tmp_path / f"{name}.lock").write_text(definition.lock.read_text())
    done = making.insightv(
        *("image", "build", tmp_path / f"{name}.def", "--to", target, *fake, *words), env=room
    )
    assert done.returncode == 2 and not target.exists()
    assert "%post" in done.stderr or "while running" in done.stderr.lower(), done.stderr


def test_signing(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / image.name
    copy.write_bytes(image.read_bytes())
    keys = {"APPTAINER_KEYSDIR": str(tmp_path / "keys")}
    made = ["--name=t", "--email=t@example.org", "--comment=", "--password=", "--push=false"]
    subprocess.run(
        ["apptainer", "key", "newpair", *made], check=True, env={**os.environ, **keys}, input=b""
    )
    before = hashlib.sha256(copy.read_bytes()).hexdigest()
    assert making.insightv("image", "verify", copy, env=keys).returncode == 2, "not signed yet"
    signed = making.insightv("image", "sign", copy, env=keys)
    assert signed.returncode == 0, signed.stderr
    kept = copy.with_name(f"{copy.name}.sha256").read_text().split()[0]
    assert kept == hashlib.sha256(copy.read_bytes()).hexdigest() != before
    verified = making.insightv("image", "verify", copy, env=keys)
    assert verified.returncode == 0 and kept in verified.stdout, verified.stderr
