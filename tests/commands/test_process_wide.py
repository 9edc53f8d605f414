"""Only commands change the state of the process."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[2] / "tpp_jax"
CALLS = {
    *("faulthandler.enable", "faulthandler.disable", "jax.config.update"),
    *("warnings.filterwarnings", "warnings.simplefilter", "warnings.resetwarnings"),
    *("os._exit", "os.execv", "os.dup2", "os.environ.setdefault", "os.environ.update"),
    *("signal.signal", "sys.exit", "logging.basicConfig", "logging.set_verbosity"),
}
LAST_NAMES = {call.rpartition(".")[2] for call in CALLS}
ELSEWHERE = {
    # In its own processes, which decode images.
    "data/streams.py": {"os._exit", "signal.signal"},
    # A separate command.
    "data/prepare.py": {"os.environ.setdefault", "sys.exit"},
    # During a refit, to show its warnings as notes; the previous filters are restored.
    "experiment/refitting.py": {"warnings.simplefilter"},
    # During a run; the previous handlers are restored.
    "experiment/records/stopping.py": {"signal.signal"},
    # After the reader of a pipe has ended.
    "experiment/records/terminal.py": {"os.dup2"},
}


def calls(tree: ast.AST) -> set[str]:
    """Returns the calls in a file that change the process."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = {ast.unparse(x) for x in calls if getattr(x, "attr", None) in LAST_NAMES}
    return found & CALLS


def test_only_commands_change_the_process():
    found = {
        file.relative_to(PACKAGE).as_posix(): calls(ast.parse(file.read_text("utf-8")))
        for file in PACKAGE.rglob("*.py")
    }
    commands = {name for name in found if name.startswith(("commands/", "configs/"))}
    assert set().union(*(found[name] for name in commands)) >= {
        *("faulthandler.disable", "jax.config.update", "warnings.filterwarnings"),
        *("os._exit", "os.execv", "sys.exit"),
    }
    assert {n: x for n, x in found.items() if x and n not in commands} == ELSEWHERE
