"""Installs packages by pip, and shows in few lines what it does.

    .venv/bin/python .ci/install.py --editable '.[train,plots]'

On a terminal one line follows pip; elsewhere one line a download is printed. If pip
fails, all that it said is printed.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import TextIO

STEPS = (
    "Collecting",
    "Downloading",
    "Using cached",
    "Building",
    "Installing",
    "Preparing",
)


def follow(lines: Iterable[str], out: TextIO, live: bool) -> list[str]:
    """Shows the steps of pip; returns all lines that it printed."""
    kept = []
    for line in lines:
        kept.append(line)
        step = line.strip()
        if not step.startswith(STEPS):
            continue
        minor = step.startswith(("Collecting", "Building", "Preparing"))
        minor |= ".metadata" in step
        step = re.sub(r" \(from .*|-py3\S*(?= \()|-cp\d\S*(?= \()", "", step)
        step = re.sub(r"collected packages: (.*)", _counted, step)
        if live:
            out.write(f"\r\033[K  {step[:76]}")
        elif not minor:
            out.write(f"  {step[:76]}\n")
        out.flush()
    if live:
        out.write("\r\033[K")
    return kept


def _counted(match: re.Match[str]) -> str:
    return f"{match[1].count(',') + 1} packages"


def main() -> int:
    """Runs pip with the arguments of this process; returns its exit code."""
    start = time.monotonic()
    options = "--disable-pip-version-check", "--progress-bar=off"
    pip = subprocess.Popen(
        [sys.executable, "-m", "pip", "install", *options, *sys.argv[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert pip.stdout is not None
    said = follow(pip.stdout, sys.stdout, live=sys.stdout.isatty())
    if pip.wait():
        sys.stderr.writelines(said)
    else:
        print(f"  done in {time.monotonic() - start:.0f} s")
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main())
