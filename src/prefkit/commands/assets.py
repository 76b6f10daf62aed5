"""List the models and data that ship in packages, and check the installed ones: `prefkit assets [check]`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from prefkit import assets


def main(argv: Sequence[str]) -> int:
    """Prints the registry; returns 2 when an installed asset is of another version or damaged."""
    parser = argparse.ArgumentParser(prog="prefkit assets", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("list", "check"), default="list", help="check prints one line each")
    chosen = parser.parse_args(list(argv))
    states: dict[str, assets.State] = {asset.name: assets.check(asset) for asset in assets.ASSETS.values()}
    if chosen.what == "check":
        for name, state in states.items():
            print(f"{name}: {state}")
    else:
        _list(states)
    for name, state in states.items():
        if state != "present":
            print(f"to get {name}: {assets.repair(assets.get(name), state)}")
    return 0 if set(states.values()) <= {"present", "absent"} else 2


def _list(states: Mapping[str, assets.State]) -> None:
    for name, state in states.items():
        asset = assets.get(name)
        print(f"{name}  ({asset.kind}, {asset.size / 1e6:.1f} MB)  {state}")
        print(f"  {asset.description}")
        print(f"  in {asset.distribution} {asset.version}; licence {asset.licence_package}; ", end="")
        print(f"of the content: {asset.licence_content}")
