"""What an image holds: its packages with their licences, as an SPDX document."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc.disk import write_atomic
from hpc.errors import UserError

_PYPI = "SPDXRef-pypi-"


def write_contents(built: Path, target: Path, summed: str) -> None:
    """Writes the image's packages as SPDX 2.3 beside ``target``.

    Raises:
        UserError: The image cannot say what it holds.
    """
    words = ["apptainer", "--quiet", "exec", "--cleanenv", "--no-home"]
    words += ["--userns"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*words, str(built), "python", "-m", "hpc.inside"], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{target}: the image cannot tell its packages ({last}); mend its %post")
    text = spdx(target.name, summed, json.loads(done.stdout))
    write_atomic(target.with_name(f"{target.name}.spdx.json"), json.dumps(text, indent=1) + "\n")


def contents(image: Path, summed: str) -> set[str] | None:
    """The names of an image's Python packages, from the document beside it.

    Args:
        image: The SIF.
        summed: Its SHA-256.

    Returns:
        Names in the index's spelling; None where no document beside it speaks of this very image.
    """
    try:
        told = json.loads(image.with_name(f"{image.name}.spdx.json").read_text(encoding="utf-8"))
        if told["documentNamespace"] != f"urn:sha256:{summed}":
            return None
        entries = [entry for entry in told["packages"] if entry["SPDXID"].startswith(_PYPI)]
        return {entry["name"] for entry in entries}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # none, or not one of ours


def spdx(name: str, summed: str, packages: Sequence[dict[str, str]]) -> dict[str, Any]:
    """An SPDX 2.3 document of an image's packages."""
    entries = [*_entries(packages)]
    image = {
        "SPDXID": "SPDXRef-image",
        "name": name,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "checksums": [{"algorithm": "SHA256", "checksumValue": summed}],
    }
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": f"urn:sha256:{summed}",
        "creationInfo": {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "creators": ["Tool: insightv image build"],
        },
        "packages": [image, *entries],
        "relationships": [
            {
                "spdxElementId": "SPDXRef-DOCUMENT",
                "relatedSpdxElement": "SPDXRef-image",
                "relationshipType": "DESCRIBES",
            },
            *(
                {
                    "spdxElementId": "SPDXRef-image",
                    "relatedSpdxElement": entry["SPDXID"],
                    "relationshipType": "CONTAINS",
                }
                for entry in entries
            ),
        ],
    }


def _entries(packages: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    for package in packages:
        kind, name, version = package["kind"], package["name"], package["version"]
        place = "pypi" if kind == "pypi" else "deb/debian"
        licence = package["license"]
        yield {
            "SPDXID": f"SPDXRef-{kind}-{re.sub(r'[^A-Za-z0-9.-]', '-', name)}",
            "name": name,
            "versionInfo": version,
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": False,
            "licenseConcluded": "NOASSERTION",
            # Packages' own words are seldom SPDX expressions.
            "licenseDeclared": "NOASSERTION",
            **({"licenseComments": f"declared: {licence}"} if licence else {}),
            "externalRefs": [
                {
                    "referenceCategory": "PACKAGE-MANAGER",
                    "referenceType": "purl",
                    "referenceLocator": f"pkg:{place}/{name}@{version.replace('+', '%2B')}",
                }
            ],
        }
