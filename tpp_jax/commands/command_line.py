"""The flags of the command line, and what each mode runs.

help.txt is what ``tpp-jax --help`` prints, without importing the package.
"""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tpp_jax.commands import config_files, huge_pages
from tpp_jax.errors import TPPError, require

if TYPE_CHECKING:
    from ml_collections import ConfigDict

MODES = ["train", "sweep", "report", "inspect", "profile", "evaluate", "export"]
_SHORT = "report", "inspect"  # modes that end before memory matters


def main() -> None:
    """Runs the command line of this process."""
    try:
        require("train", "absl", "ml_collections")
    except TPPError as error:
        sys.exit(f"error: {error}")
    from absl import app

    text = pathlib.Path(__file__).with_name("help.txt").read_text("ascii")
    sys.modules["__main__"].__doc__ = text  # --helpfull begins with it
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

    # This already reads --config.…, to set the default.
    default = str(config_files.folder() / config_files.DEFAULT)
    config_flags.DEFINE_config_file("config", default, flag_help())
    flags.DEFINE_string("workdir", None, "Folder of the run and its results.")
    flags.DEFINE_enum(
        "mode",
        "train",
        MODES,
        "Train, run the grid of a table, draw results, preview a cut, time, measure, "
        "or write files for other runtimes.",
    )
    flags.DEFINE_string(
        "coordinator", None, "Address host:port of the first process, or 'auto'."
    )
    flags.DEFINE_integer("num_processes", None, "Total number of processes.")
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
    flags.DEFINE_integer("timeout", 100, "Seconds until a process counts as lost.")
    flags.DEFINE_list(
        "format",
        ["stablehlo"],
        "Formats to export: stablehlo, onnx, tflite, safetensors.",
    )
    flags.DEFINE_bool("debug", False, "Show tracebacks and library logs.")


def _parse(argv: list[str]) -> list[str]:
    from absl import flags

    with _plain_errors():
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.items()  # raises if the file cannot be read
    return rest


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns exceptions while flags and a config are read into one line."""
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
        sys.exit(f"error: unknown arguments: {' '.join(argv[1:])}")
    if not values.debug:
        logging.set_verbosity(logging.FATAL)  # what matters is also raised
    if not values.workdir and values.mode not in ("inspect", "profile"):
        sys.exit("error: --workdir is missing: set a folder for the run")
    if values.mode not in _SHORT:
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
        _do(values.mode, values.config, values.workdir or "", values.format)
    except TPPError as error:
        if values.debug:
            raise
        processes.leave(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues from the last checkpoint")


def _do(mode: str, config: "ConfigDict", workdir: str, formats: Sequence[str]) -> None:
    """Runs a mode.

    Args:
      mode: One of ``MODES``.
      config: Config of the run, or of the table for a sweep.
      workdir: Folder of the run; "" for none, where the mode needs none.
      formats: Formats to export.

    Raises:
      TPPError: The user made a mistake.
    """
    from tpp_jax.commands import evaluate, export, inspect, profile, report, sweep
    from tpp_jax.experiment import run
    from tpp_jax.experiment.fields import flat
    from tpp_jax.experiment.records import terminal

    given = any(word.lstrip("-").startswith("config") for word in sys.argv)
    match mode:
        case "train":
            run.train(config, workdir)
        case "sweep":
            sweep.sweep(config, workdir)
        case "report":
            terminal.say(f"The report is {report.write_report(workdir)}.")
        case "inspect":
            inspect.inspect(config, workdir or None, given=given)
        case "profile":
            profile.profile(config, workdir or None, given=given)
        case "evaluate":  # the data may have moved to data.dir
            moved = flat(config).get("data.dir", "")
            print(json.dumps(evaluate.evaluate(workdir, moved, config)))
        case "export":
            moved = flat(config).get("data.dir", "")
            export.export_run(workdir, formats, moved, config)
