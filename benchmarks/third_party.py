"""Networks of third-party packages: groups, checks, a cut by half, a training step.

    python -m benchmarks.third_party

This runs every network of ``tests/third_party`` whose package is installed, each
package in a process of its own, and merges the results into
``results/third_party_cpu.json``, so that the results of several environments can be
combined. ``--table`` prints the file as the table of ``docs/results.md``.
"""

import argparse
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks import machine

# Each program runs once, so optimizing it costs as much as it gains.
_ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
FILE = machine.RESULTS / "third_party_cpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", nargs="*", help="only these")
    parser.add_argument("--child", help="prove one package's networks, print them")
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(FILE.read_text())["networks"]))
        return
    if options.child:
        _package(options.child)
        return
    entries = [entry for entry in _entries() if entry.installed()]
    packages = options.packages or dict.fromkeys(entry.package for entry in entries)
    for package in packages:
        command = [sys.executable, "-m", "benchmarks.third_party", "--child", package]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | _ENVIRONMENT
        )
        for line in child.stdout:
            if line.startswith('{"network"'):
                one = json.loads(line)
                print(_row(one), flush=True)
                _merge(one)
        if child.wait():
            print(f"{package}: its process ended with {child.returncode}", flush=True)


def _entries() -> list[Any]:
    from tests.third_party import catalogue

    return catalogue.NETWORKS


def _package(package: str) -> None:
    from tests.third_party import proof

    for entry in _entries():
        if entry.package != package:
            continue
        record: dict[str, Any] = {
            "network": str(entry),
            "version": importlib.metadata.version(package),
            "jax": importlib.metadata.version("jax"),
            "flax": importlib.metadata.version("flax"),
        }
        try:
            result = proof.quietly(entry)
            record |= dataclasses.asdict(result) | {"right": result.right}
        except Exception as error:
            record |= {"right": False, "failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(record), flush=True)


def _merge(one: dict[str, Any]) -> None:
    networks = {}
    if FILE.exists():
        networks = json.loads(FILE.read_text())["networks"]
    networks[one.pop("network")] = one
    machine.write("third_party", {"networks": networks})


def table(networks: dict[str, dict[str, Any]]) -> str:
    """Returns the records as a table in Markdown."""
    lines = [
        "| network | groups | prunable | heads | found in | masked − cut | parameters "
        "| wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row({"network": name} | one) for name, one in sorted(networks.items())]
    return "\n".join(lines)


def _row(one: dict[str, Any]) -> str:
    name, _, network = one["network"].partition(":")
    title = f"{name} {one['version']}, {network}"
    if "failed" in one:
        return f"| {title} | failed: {one['failed'][:200]} |"
    share = one["prunable"] / max(one["channels"], 1)
    masked = "–" if one["masked"] is None else f"{one['masked']:.0e}"
    before, after = one["parameters"]
    return (
        f"| {title} | {one['groups']} | {share:.0%} of {one['channels']} "
        f"| {_heads(one)} | {one['seconds']:.2f} s | {masked} "
        f"| {before:,} → {after:,} "
        f"| {(one['checked'] or one['cut'] or one['step'])[:200] or 'nothing'} |"
    )


def _heads(one: dict[str, Any]) -> str:
    """Returns whether the groups of heads can be pruned, for networks with heads."""
    entry = next((e for e in _entries() if str(e) == one["network"]), None)
    if entry is None or not entry.heads:
        return "–"
    cut, left = one["prunable_groups"], one["reasons"]
    names = [(fnmatch.filter(cut, p), fnmatch.filter(left, p)) for p in entry.heads]
    return "yes" if all(cut and not left for cut, left in names) else "no"


if __name__ == "__main__":
    main()
