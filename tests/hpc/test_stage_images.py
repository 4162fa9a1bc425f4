"""Stages that ask for something else than their kind, an image of their own above all."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import counting  # noqa: E402

from hpc import gates, needs, site, submission  # noqa: E402
from hpc.cluster import Override, Profile, Resources, read_profile  # noqa: E402
from hpc.config import dump  # noqa: E402
from hpc.container import Pin  # noqa: E402
from hpc.contents import spdx  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.executors.batch import write_host  # noqa: E402
from hpc.naming import make_id  # noqa: E402
from hpc.planning import plan_of  # noqa: E402
from hpc.rundir import Chain, write_json  # noqa: E402
from hpc.stages import Package  # noqa: E402

PACKAGE = Package("no-such-thing", "no_such_thing", "pip install it")


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    made = counting.open_chain(tmp_path / "run")
    make_id(made.run)
    return made


@pytest.fixture
def asked(tmp_path: Path) -> Profile:
    """Two images; ``double`` and ``triple`` run in the second."""
    for name in ("train", "serve"):
        (tmp_path / f"{name}.sif").write_text(name)
    file = tmp_path / "profile.yaml"
    file.write_text(
        f"container: {{image: {tmp_path}/train.sif}}\n"
        "cpu: {cores: 3, minutes: 20}\n"
        f"stages: {{'[dt]*le': {{image: {tmp_path}/serve.sif}}, triple: {{cores: 5}}}}\n"
    )
    return read_profile(file)


def test_what_an_entry_leaves_out_is_as_its_kind() -> None:
    fields = {field.name for field in dataclasses.fields(Resources)}
    assert {field.name for field in dataclasses.fields(Override)} == fields
    assert Override().over(Resources(cores=7)) == Resources(cores=7)
    assert Override(gpus=0, image="").over(Resources(gpus=8, image="x.sif")) == Resources()


def test_patterns(chain: Chain, asked: Profile, tmp_path: Path) -> None:
    of = {name: asked.of_stage(stage) for name, stage in chain.stages.items()}
    assert of["numbers"] is asked.cpu is of["square"]
    image = f"{tmp_path}/serve.sif"
    assert of["double"] == replace(asked.cpu, image=image)
    assert of["triple"] == replace(asked.cpu, image=image, cores=5)
    asked.stages["*"] = Override(image="", memory="1G")  # the later one prevails
    assert asked.of_stage(chain.stages["triple"]) == replace(asked.cpu, cores=5, memory="1G")
    asked.stages["total"] = Override(minutes=2)
    with pytest.raises(UserError, match=r"stages\.total\.grace is 120 s, too long for 2 min"):
        asked.of_stage(chain.stages["total"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {x: {image: docker://x}}", r"stages\.x\.image .* ends in \.sif"),
        ("gpu: {image: x}", r"gpu\.image"),
        ("gate: {image: x.sif}", r"gate\.image: gates run in the image of `container`"),
        ("stages: {x: {imag: x.sif}}", r"stages\.x\.image"),
        ("stages: {x: {minutes: 1, grace: 9}}", r"stages\.x\.grace"),
    ],
)
def test_a_profile_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_profile(path)


def test_each_stage_is_pinned_to_its_image(chain: Chain, asked: Profile, tmp_path: Path) -> None:
    asked.training.image = "/nowhere.sif"  # no stage of this chain is one
    profile = submission.pinned(chain, asked)
    submission.profile_path(chain.run).write_text(dump(profile))
    assert profile == read_profile(submission.profile_path(chain.run))
    assert set(profile.pins) == {f"{tmp_path}/serve.sif"}
    assert chain.images.keys() == {"double", "triple"}
    digests = {name: chain.image_of(name)["sha256"] for name in chain.stages}
    assert len(set(digests.values())) == 2 and digests["double"] == digests["triple"]
    texts = {item.file: item.text for item in plan_of(chain, profile)}
    for name, digest in digests.items():
        (line,) = [x for x in texts[name].splitlines() if x.startswith("image=")]
        assert line.endswith("serve.sif" if name in chain.images else "train.sif")
        assert f"image_sha256={digest}\n" in texts[name]
        assert f"image={tmp_path}/train.sif\n" in texts[f"{name}.gate"]
    # A gate notes the image of the stage, not its own.
    told = counting.open_chain(chain.run.path)
    read_profile(submission.profile_path(chain.run)).place(told)
    for name, digest in digests.items():
        assert gates._head(told, told.stages[name])["image"] == digest


def test_another_image_is_noticed_by_the_stages_that_began_in_it(
    chain: Chain, asked: Profile, tmp_path: Path
) -> None:
    submission.pinned(chain, asked)
    chain.run.add_provenance(image=chain.image, images=chain.images)
    write_json(chain.run.started("numbers"), {})
    (tmp_path / "serve.sif").write_text("another one")
    submission.pinned(chain, asked)  # nothing was begun in it
    write_json(chain.run.started("double"), {})
    with pytest.raises(UserError, match="double was begun in the image .*--other-image"):
        submission.pinned(chain, asked)
    submission.pinned(chain, asked, other_image=True)
    (tmp_path / "serve.sif").write_text("serve")
    submission.pinned(chain, asked)
    asked.stages.clear()
    with pytest.raises(UserError, match="double was begun in"):
        submission.pinned(chain, asked)
    asked.stages["double"] = Override(image=f"{tmp_path}/serve.sif")
    asked.pins[f"{tmp_path}/serve.sif"] = Pin(sha256="0" * 64)  # the digest it must have
    with pytest.raises(UserError, match="is another image or a broken copy"):
        submission.pinned(chain, asked)


def test_a_stage_needs_what_its_own_image_holds(
    chain: Chain, asked: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = submission.pinned(chain, asked)

    def holds(name: str, *packages: str) -> None:
        digest = chain.image["sha256"] if name == "train" else chain.images["double"]["sha256"]
        listed = [{"kind": "pypi", "name": one, "version": "1", "license": ""} for one in packages]
        beside = tmp_path / f"{name}.sif.spdx.json"
        beside.write_text(json.dumps(spdx(name, digest, listed)))

    holds("train", PACKAGE.name)
    holds("serve", "vllm")
    chain.stages["numbers"] = replace(chain.stages["numbers"], needs=(PACKAGE,))
    needs.refuse_absent(chain, profile)
    monkeypatch.setenv("APPTAINER_CONTAINER", "/copy.sif")
    monkeypatch.setenv("HPC_IMAGE", f"{tmp_path}/serve.sif")
    monkeypatch.setenv("HPC_IMAGE_SHA256", chain.images["double"]["sha256"])
    needs.refuse_unimportable(chain)  # not for this image to hold
    chain.stages["double"] = replace(chain.stages["double"], needs=(PACKAGE,))
    said = "stage double needs the package no-such-thing, which is not in .*serve.sif"
    with pytest.raises(UserError, match=said):
        needs.refuse_absent(chain, profile)
    with pytest.raises(UserError, match=said):
        needs.refuse_unimportable(chain)


def test_the_preflight_goes_through_every_image(
    chain: Chain, asked: Profile, tmp_path: Path
) -> None:
    """Its script, with a stand-in for Apptainer that says what it was called with."""
    tools = tmp_path / "tools"
    tools.mkdir()
    runtime = tools / "apptainer"
    runtime.write_text('#!/bin/bash\n[ "${!#}" = true ] || echo "$*" >>"$0.calls"\n')
    runtime.chmod(0o755)
    asked.container.runtime = str(runtime)
    asked.scratch = str(tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    profile = submission.pinned(chain, asked)
    write_host(chain.run.path / "slurm")
    (chain.run.path / "slurm" / "logs").mkdir()

    def preflight() -> int:
        script = plan_of(chain, profile)[0].text
        env = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": "/", "SLURM_JOB_ID": "1"}
        return subprocess.run(["bash", "-c", script], env=env, timeout=60).returncode

    assert preflight() == 0
    calls = Path(f"{runtime}.calls").read_text().splitlines()
    seen = [line.partition("sif env ")[0].rpartition("/")[2] for line in calls]
    assert seen == ["train.", "serve."]
    assert calls[0].endswith(f"preflight {chain.run.path} numbers")
    assert calls[1].endswith(f"preflight {chain.run.path}")
    (tmp_path / "serve.sif").write_text("another one")
    assert preflight() == 77
    assert "serve.sif is another image now" in (chain.run.marked("STOPPED") or "")


def test_nodes_are_probed_in_each_image(asked: Profile, tmp_path: Path) -> None:
    asked.gpu = replace(asked.cpu, workers=9)
    asked.stages["reduce"] = Override(gpus=0, cores=2)
    asked.stages["train"] = Override(nodes=2)
    titles = [kind.title for kind in site.kinds(asked)]
    assert titles == ["cpu/gpu/gate/triple/reduce", "training/train", "[dt]*le"]
