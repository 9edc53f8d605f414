"""Compiled programs are kept on disk and found by the next process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.end_to_end.starts import ROOT, start

# Prints a result and how often a program was and was not found.
PROGRAM = """
import collections, json
import jax, jax.numpy as jnp
from tpp_jax.commands.compilation import keep_compiled_programs

keep_compiled_programs()
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
result = float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((3, 3))))
each = [counts[f"/jax/compilation_cache/cache_{word}"] for word in ("hits", "misses")]
print(json.dumps({"result": result, "found": each[0], "compiled": each[1]}))
"""


def compute(caches: pathlib.Path, **variables: str) -> dict[str, float]:
    """Runs the program in another process, which must print no warning.

    JAX reads its own variables when it is imported: with them, it is imported again.
    """
    if not variables:
        program = caches.with_name("program.py")
        program.write_text(PROGRAM)
        cache = {"XDG_CACHE_HOME": str(caches), "XLA_FLAGS": ""}
        process = start(program=str(program), **cache)
        output, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        return json.loads(output)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**own, "XDG_CACHE_HOME": str(caches), **variables},
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Output of the first process, and the caches that it left."""
    caches = tmp_path_factory.mktemp("caches")
    return compute(caches), caches


def test_a_second_process_finds_every_program_of_the_first(kept):
    first, caches = kept
    assert first["found"] == 0 and first["compiled"] > 0
    assert [folder.name for folder in caches.iterdir()] == ["tpp_jax"]
    second = compute(caches)
    assert (second["found"], second["compiled"]) == (first["compiled"], 0)
    assert second["result"] == first["result"]


def test_a_damaged_entry_costs_a_compilation_and_nothing_else(kept, tmp_path):
    first, caches = kept
    folder = tmp_path / "tpp_jax"
    folder.mkdir()
    entries = list((caches / "tpp_jax").glob("*-cache"))
    assert entries
    for entry in entries:  # like a kill in the middle of writing
        content = entry.read_bytes()
        (folder / entry.name).write_bytes(content[: len(content) // 2])
    assert compute(tmp_path)["result"] == first["result"]


def test_a_folder_that_cannot_be_made_stops_nothing(kept, tmp_path):
    (tmp_path / "file").touch()
    found = compute(tmp_path / "file")
    assert found["result"] == kept[0]["result"] and found["found"] == 0


def test_settings_of_jax_go_first(kept, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    compute(tmp_path, JAX_COMPILATION_CACHE_DIR=str(elsewhere))
    assert not (tmp_path / "tpp_jax").exists()
    found = compute(kept[1], JAX_ENABLE_COMPILATION_CACHE="false")
    assert (found["found"], found["compiled"]) == (0, 0)
    assert found["result"] == kept[0]["result"]
