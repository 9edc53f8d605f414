"""Two processes that hold a model together get what one process gets."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

import tpp_jax as tpp
from tests.sharded.mlp import on_one_device
from tests.sharded.one_of_two import work

ROOT = pathlib.Path(__file__).parents[2]


def start_two(folder, kind):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    program = "tests.sharded.one_of_two"
    flags = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=1"
    )
    return [
        subprocess.Popen(
            [sys.executable, "-m", program, address, str(number), str(folder), kind],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


@pytest.mark.parametrize(
    "kind", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"]
)
def test_two_processes_prune_and_save_a_model_as_one_does(kind, tmp_path):
    both = start_two(tmp_path, kind)
    try:
        wanted, small = work(on_one_device())
        errors = [process.communicate(timeout=300)[1] for process in both]
    finally:
        for process in both:
            process.kill()  # a SIGTERM would be kept waiting by the coordination
    assert [process.returncode for process in both] == [0, 0], errors
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert found[0] == found[1]
    assert found[0].pop("plans") == wanted.pop("plans")
    for name, number in wanted.items():
        assert found[0][name] == pytest.approx(number, rel=1e-4), name
    loaded = tpp.load_model(tmp_path / "model")
    for name, leaf in small.items():
        np.testing.assert_allclose(loaded[name], leaf, atol=1e-5, err_msg=name)
