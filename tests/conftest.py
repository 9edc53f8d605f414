"""Set-up that every test needs: simulated devices, and reproducible properties."""

import gc
import os
import pathlib
import signal
import tempfile

# Garbage is looked for less often, which nearly all that is imported is not.
gc.set_threshold(50_000, 20, 10)

# XLA reads this once, when it first compiles. Eight devices let the tests of the
# parallel step run on any machine. Programs run only a few times here, and with less
# optimization LLVM compiles them in two thirds of the time. With none, loops such as
# convolutions in float64 would run too long. What the tests start by launch.py is
# optimized. A value that the user has set is left alone.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1",
)

# What launch.py keeps in the user's cache folder: not in that of who runs the tests.
_CACHES = pathlib.Path(tempfile.gettempdir()) / f"tpp_jax-tests-{os.getuid()}"
os.environ["XDG_CACHE_HOME"] = str(_CACHES)

# As the command line has it, which would otherwise start itself again in every test.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

# A shell that starts the tests in the background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from tests import tracing_costs  # noqa: E402
from tpp_jax.commands.compilation import keep_compiled_programs  # noqa: E402

# Many tests train the same small networks.
keep_compiled_programs()
tracing_costs.save()

# Compilation makes the first example of a property slow, so there is no deadline, and
# the examples are the same in every run: a failure is never a matter of luck.
hypothesis.settings.register_profile("tpp_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tpp_jax")


def pytest_collection_modifyitems(items):
    """Has long files start before short ones, so that all workers end together.

    Those with slow tests are first, then those that train networks.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    train = {"end_to_end", "experiment", "commands", "gallery", "data"}

    def place(item):
        path = item.path
        return path in slow, not train.isdisjoint(path.parts), path

    items.sort(key=place, reverse=True)


def pytest_collection_finish():
    """Has garbage not looked for among what was imported."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    """Has the last garbage found once, and not in each of six passes to come."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def graphs():
    """Skips a test of modules that share arrays where Flax refuses them."""
    if os.environ.get("NNX_GRAPH_MODE", "").lower() in ("false", "0"):
        pytest.skip("Flax's tree mode has no shared references")


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves runs without a report, the slowest part of one that is over in a second.

    For tests that repeat runs whose reports other tests look at.
    """
    from tpp_jax.experiment.records import summary

    monkeypatch.setattr(summary, "draw", lambda workdir: workdir / "report.html")


@pytest.fixture(scope="module")
def sketches():
    """Has runs draw their pictures without making files of them, which is slow.

    For runs whose reports are written as always, but looked at by other tests.
    """
    from tests.pictures import sketched
    from tpp_jax.reports import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", sketched)
        yield
