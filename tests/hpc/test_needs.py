"""Packages that payloads lack are named before anything is queued, and by the preflight."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import counting  # noqa: E402

from hpc import control, gates, naming, needs  # noqa: E402
from hpc.cluster import Profile  # noqa: E402
from hpc.container import Container  # noqa: E402
from hpc.contents import spdx  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.rundir import STOPPED, Chain  # noqa: E402
from hpc.stages import Package  # noqa: E402

YAML = Package("pyyaml", "yaml", "pip install it")
DEEP = Package("no-such-thing", "no_such_package.core", "pip install '.[deep]'")
SAID = r"stage double needs the package no-such-thing, which is not .*: pip install '\.\[deep\]'$"


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    made = counting.open_chain(tmp_path / "run", ["small=true"])
    made.stages["double"] = replace(made.stages["double"], needs=(YAML, DEEP))
    return made


def test_what_cannot_be_imported_here_is_named(chain: Chain, monkeypatch) -> None:
    assert needs.absent([YAML, DEEP]) == [DEEP]
    with pytest.raises(UserError, match=SAID):
        needs.refuse_absent(chain)
    with pytest.raises(UserError, match="is not here"):
        needs.refuse_absent(chain, Profile())
    # What another program imports is not to be seen from here.
    needs.refuse_absent(chain, Profile(program=["/opt/other"]))
    needs.refuse_absent(chain, Profile(container=Container("/x.sif", program=["other"])))
    # What is complete needs nothing any more.
    monkeypatch.setattr(gates, "standing", lambda chain: dict.fromkeys(chain.stages, True))
    needs.refuse_absent(chain)


def test_an_image_is_known_by_the_list_beside_it(chain: Chain, tmp_path: Path) -> None:
    image, beside = tmp_path / "train.sif", tmp_path / "train.sif.spdx.json"
    chain.image = {"path": str(image), "sha256": "a" * 64}
    needs.refuse_absent(chain, Profile())  # none lies there

    def lists(*names: str, summed: str = "a" * 64) -> None:
        entries = [{"kind": "pypi", "name": n, "version": "1", "license": ""} for n in names]
        entries += [{"kind": "deb", "name": DEEP.name, "version": "1", "license": ""}]
        beside.write_text(json.dumps(spdx(image.name, summed, entries)))

    lists("pyyaml")
    with pytest.raises(UserError, match=r"which is not in .*/train\.sif: pip"):
        needs.refuse_absent(chain, Profile())
    lists("pyyaml", DEEP.name)
    needs.refuse_absent(chain, Profile())
    lists("pyyaml", summed="b" * 64)  # of another image
    needs.refuse_absent(chain, Profile())
    for text in ("", "[]", '{"documentNamespace": "urn:sha256:' + "a" * 64 + '"}'):
        beside.write_text(text)
        needs.refuse_absent(chain, Profile())


def test_the_preflight_looks_where_payloads_run(chain: Chain) -> None:
    naming.make_id(chain.run)
    assert control.payload(chain, ["preflight", "numbers"]) == gates.STOP
    said = chain.run.marked(STOPPED)
    assert said is not None and "preflight numbers: stage double needs the package" in said
    assert "not where payloads run" in said
