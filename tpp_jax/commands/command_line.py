"""Prune a network by TPP; show what a cut would do; time or evaluate a run.

    tpp-jax --config=configs/digits_resnet8_tpp.py --workdir=runs/digits
    tpp-jax --mode=sweep --config=configs/tables/digits.py --workdir=runs/table
    tpp-jax --mode=inspect --config=configs/cifar10_resnet56_tpp.py
    tpp-jax --mode=report --workdir=runs/table
    tpp-jax --mode=profile --workdir=runs/digits
    tpp-jax --mode=evaluate --workdir=runs/digits

Any config field can be set: --config.prune.ratios='*layer*.conv1:0.9'. The same command
continues an interrupted run. `python -m tpp_jax` and, in a checkout, `python launch.py`
are the same command.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tpp_jax.commands import config_files, huge_pages
from tpp_jax.errors import TPPError, require

if TYPE_CHECKING:
    from ml_collections import ConfigDict

MODES = ["train", "sweep", "report", "inspect", "profile", "evaluate"]
_OF_SECONDS = "report", "inspect"  # modes that are over before memory matters


def main() -> None:
    """Runs the command line of this process."""
    try:
        require("train", "absl", "ml_collections")
    except TPPError as error:
        sys.exit(f"error: {error}")
    from absl import app

    sys.modules["__main__"].__doc__ = __doc__  # what --help prints
    sys.argv[1:] = config_files.found(sys.argv[1:])
    sys.path.append(os.getcwd())  # the user's own modules, which a config may name
    config_files.make_importable()
    with _plain_errors():
        _define_flags()
    app.run(_run, flags_parser=_parse)


def _define_flags() -> None:
    from absl import flags
    from ml_collections import config_flags

    from tpp_jax.experiment.config_docs import flag_help

    # Reads --config.… already here, to make its default.
    default = str(config_files.folder() / config_files.DEFAULT)
    config_flags.DEFINE_config_file("config", default, flag_help())
    flags.DEFINE_string("workdir", None, "Folder of the run and its results.")
    flags.DEFINE_enum(
        "mode",
        "train",
        MODES,
        "Train, run the grid of a table, draw results, look ahead, time, or measure.",
    )
    flags.DEFINE_string(
        "coordinator", None, "Of several processes: host:port of the first; or 'auto'."
    )
    flags.DEFINE_integer("num_processes", None, "Total number of processes.")
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
    flags.DEFINE_integer("timeout", 100, "Seconds until a process counts as lost.")
    flags.DEFINE_bool("debug", False, "Show tracebacks and library logs.")
    for flag in flags.FLAGS.get_flags_for_module(__name__):  # --help shows these
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _parse(argv: list[str]) -> list[str]:
    from absl import flags

    with _plain_errors():
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.items()  # a file that cannot be read raises only here
    return rest


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns what is raised while flags and a config are read into one line."""
    from absl import flags

    try:
        yield
    except TPPError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if isinstance(error, flags.Error) and "Traceback" not in str(error):
            sys.exit(f"error: {str(error).strip()}")
        from tpp_jax.commands.config_errors import explain

        if (line := explain(error)) is None:
            raise
        sys.exit(f"error: {line}")


def _run(argv: list[str]) -> None:
    from absl import flags, logging

    values = flags.FLAGS
    if argv[1:]:
        sys.exit(f"error: not understood: {' '.join(argv[1:])}")
    if not values.debug:
        logging.set_verbosity(logging.FATAL)  # what matters is raised as well
    if not values.workdir and values.mode not in ("inspect", "profile"):
        sys.exit("error: --workdir is missing: give a folder for the run")
    if values.mode not in _OF_SECONDS:
        huge_pages.start_again_with()
    from tpp_jax.commands import compilation, processes

    compilation.keep_compiled_programs()
    try:
        processes.connect(
            values.coordinator or None,
            values.num_processes,
            values.process_id,
            values.timeout,
        )
        _do(values.mode, values.config, values.workdir)
    except TPPError as error:
        if values.debug:
            raise
        processes.leave(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues from the last checkpoint")


def _do(mode: str, config: "ConfigDict", workdir: str | None) -> None:
    """Does what a mode stands for.

    Args:
      mode: One of ``MODES``.
      config: The run, or for a sweep the table.
      workdir: Folder of the run; some modes do without.

    Raises:
      TPPError: a mistake of the user's.
    """
    from tpp_jax.commands import evaluate, inspect, profile, sweep
    from tpp_jax.experiment import run
    from tpp_jax.experiment.records import terminal

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
