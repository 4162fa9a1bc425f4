"""Which image a run works in, without Apptainer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc import contents, inside
from hpc.cluster import Profile, read_profile
from hpc.container import Container, check_bindable, pin
from hpc.errors import UserError
from hpc.rundir import RunDir, write_json


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("container: {image: docker://x}", r"ends in \.sif"),
        ("container: {image: x.sif, sha256: abc}", "64 digits"),
        ("container: {image: x.sif, binds: [data]}", "absolute"),
        ("container: {image: x.sif, binds: ['/a,/b']}", "without commas"),
        ("container: {image: x.sif, passed: ['A B']}", "no variable's name"),
        ("container: {image: x.sif, runtime: ''}", "give a command"),
        ("container: {imag: x.sif}", r"container\.image"),
        ("program: [apptainer, exec, x.sif, insightv]", "container: {image"),
        ("{program: [x], container: {image: x.sif}}", "container.program"),
    ],
)
def test_a_profile_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)


def test_pinning(tmp_path: Path) -> None:
    image = tmp_path / "x.sif"
    with pytest.raises(UserError, match="no image to be read"):
        pin(Container(str(image)))
    image.write_bytes(b"one")
    found = pin(Container(str(image)))
    assert found.sha256.startswith("7692c3ad") and pin(Container()) == Container()
    with pytest.raises(UserError, match="is another image or a broken copy"):
        pin(Container(str(image), sha256="0" * 64))
    # An untouched file is not read again, a touched one is.
    trusted = Container(str(image), sha256="1" * 64, stamp=found.stamp)
    assert pin(Container(str(image)), trusted).sha256 == "1" * 64
    image.write_bytes(b"two")
    os.utime(image, (1, 1))
    assert pin(Container(str(image)), trusted).sha256.startswith("3fc4ccfe")
    with pytest.raises(UserError, match="has no digest"):
        pin(Container(str(tmp_path)))


def test_models_are_bound_once(tmp_path: Path) -> None:
    seen = Container("x.sif", binds=["/data"]).seeing([Path("/data/m"), Path("/m"), Path("/m")])
    assert seen.binds == ["/data", "/m:/m:ro"]
    for name in ("a,b", "a:b"):
        with pytest.raises(UserError, match="cannot bind"):
            check_bindable(tmp_path / name)


def test_a_run_stays_in_its_image(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    one, two = {"path": "/1", "sha256": "1" * 64}, {"path": "/2", "sha256": "2" * 64}
    run.refuse_other_image(two)
    run.add_provenance(image=one)
    run.refuse_other_image(two)  # nothing was begun
    write_json(run.started("numbers"), {})
    run.refuse_other_image({"path": "/moved", "sha256": "1" * 64})
    with pytest.raises(UserError, match="begun in the image 1111.*--other-image"):
        run.refuse_other_image(two)
    with pytest.raises(UserError, match="this is no image"):
        run.refuse_other_image(None)
    run.add_provenance(image=two)
    run.refuse_other_image(two)


def test_profiles_name_images_once() -> None:
    folder = Path(__file__).parents[2] / "configs" / "cluster"
    assert read_profile(folder / "apptainer.yaml").container.image
    assert read_profile(folder / "testbed-apptainer.yaml").container.image
    assert Profile().container == Container()


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,9}", fullmatch=True), st.just("1.0")))
def test_contents_are_spdx(names: dict[str, str]) -> None:
    listed = [
        {"kind": "pypi", "name": name, "version": version, "license": "MIT"}
        for name, version in names.items()
    ]
    made = contents.spdx("x.sif", "0" * 64, listed)
    ids = [package["SPDXID"] for package in made["packages"]]
    assert len(set(ids)) == len(ids) == len(names) + 1
    related = {relation["relatedSpdxElement"] for relation in made["relationships"]}
    assert related == set(ids)


def test_locked_versions(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    have = {entry["name"]: entry["version"] for entry in inside.packages()}
    lock.write_text(f"# comment\ntyper=={have['typer']} \\\n    --hash=sha256:0\n")
    assert inside.unlocked(lock) == []
    lock.write_text("Typer==0.0.1\nno-such_thing==1\n")
    assert inside.unlocked(lock) == [
        f"typer {have['typer']}, locked is 0.0.1",
        "no-such-thing is absent, locked is 1",
    ]
    lock.write_text("")
    assert inside.unlocked(lock)
