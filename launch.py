"""Prune a network by TPP; show what a cut would do; time or evaluate a run.

    python launch.py --config=configs/digits_resnet8_tpp.py --workdir=runs/digits
    python launch.py --mode=sweep --config=configs/tables/digits.py --workdir=runs/table
    python launch.py --mode=inspect --config=configs/cifar10_resnet56_tpp.py
    python launch.py --mode=report --workdir=runs/table
    python launch.py --mode=profile --workdir=runs/digits
    python launch.py --mode=evaluate --workdir=runs/digits

Any config field can be set: --config.prune.ratios='*layer*.conv1:0.9'. The same command
continues an interrupted run. This file reads flags, and asks for memory in huge pages.
"""

import contextlib
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator

# XLA asks for a step's memory anew in every step. In pages of 4 KiB the system then
# spends up to a fifth of a step on a CPU on making them; in huge ones, next to nothing.
# glibc is told so when a process starts: hence this one again, before all else is
# loaded (unless it runs more than this file, as a notebook does).
if (
    __name__ == "__main__"
    and sys.platform == "linux"
    and "GLIBC_TUNABLES" not in os.environ
    and sys.argv[0] in sys.orig_argv
):
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns what is raised while flags and a config are read into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, flags.Error) and "Traceback" not in str(error):
            sys.exit(f"error: {str(error).strip()}")
        from tpp_jax.commands.config_errors import explain

        if (line := explain(error)) is None:
            raise
        sys.exit(f"error: {line}")


with plain_errors():  # reads --config.… already here, to make its default
    from tpp_jax.experiment.config_docs import flag_help

    _DEFAULT = pathlib.Path(__file__).parent / "configs" / "digits_resnet8_tpp.py"
    _CONFIG = config_flags.DEFINE_config_file("config", str(_DEFAULT), flag_help())
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run and its results.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "sweep", "report", "inspect", "profile", "evaluate"],
    "Run, run a table's grid, draw what came out, look ahead, time, or measure.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of several processes: host:port of the first; or 'auto'."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_TIMEOUT = flags.DEFINE_integer("timeout", 100, "Seconds until one is taken for lost.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show tracebacks and library logs.")


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: not understood: {' '.join(argv[1:])}")
    if not _DEBUG.value:
        logging.set_verbosity(logging.FATAL)  # what matters is raised as well
    config, workdir, mode = _CONFIG.value, _WORKDIR.value, _MODE.value
    if not workdir and mode not in ("inspect", "profile"):
        sys.exit("error: --workdir is missing: give a folder for the run")
    # Imported late, so that --help and a wrong flag answer at once.
    from tpp_jax.commands import evaluate, inspect, profile, sweep
    from tpp_jax.errors import TPPError
    from tpp_jax.experiment import run
    from tpp_jax.experiment.records import terminal
    from tpp_jax.storage import processes
    from tpp_jax.xla import compilation

    compilation.keep_compiled_programs()
    try:
        if _COORDINATOR.value:
            numbers = _PROCESSES.value, _PROCESS.value, _TIMEOUT.value
            processes.connect(_COORDINATOR.value, *numbers)
        elif _PROCESSES.value is not None or _PROCESS.value is not None:
            raise TPPError("--num_processes and --process_id need --coordinator too")
        if mode == "evaluate":  # data.dir, if given: where it has moved to
            print(json.dumps(evaluate.evaluate(workdir, config.data.dir)))
        elif mode == "report":
            terminal.say(f"{sweep.write_report(workdir)} shows it.")
        else:
            given = any(word.lstrip("-").startswith("config") for word in sys.argv)
            jobs = {
                "train": run.train,
                "sweep": sweep.sweep,
                "inspect": functools.partial(inspect.inspect, given=given),
                "profile": functools.partial(profile.profile, given=given),
            }
            jobs[mode](config, workdir)
    except TPPError as error:
        if _DEBUG.value:
            raise
        processes.leave(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues from the last checkpoint")


def parse_flags(argv: list[str]) -> list[str]:
    with plain_errors():
        rest = flags.FLAGS(argv)
        _CONFIG.value.items()  # a file that cannot be read raises only here
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
