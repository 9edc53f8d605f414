"""A failing config file gives one line; a defect of the package, a traceback."""

import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from tpp_jax.commands.config_errors import explain
from tpp_jax.experiment import config as config_module

# ml_collections loads a config like this.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DEFAULT = "from tpp_jax.experiment.config import default_config\n"


def error_of(tmp_path, text, *overrides):
    """Returns the exception from reading a config file with some text."""
    file = tmp_path / "my_config.py"
    file.write_text(text)
    sys.modules.pop("config_config", None)  # from the previous file
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(["launch.py", f"--config={file}", *overrides])
        values.config.items()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{DEFAULT}def get_config():\n c = default_config()\n c.seed = 1.5\n return c",
         "TypeError: Could not override field 'seed' .*my_config.py, line 4"),
        ("import no_such_package", "No module named 'no_such_package' .*line 1"),
        ("def get_config():\n return 1 / 0", "ZeroDivisionError.*my_config.py, line 2"),
        ("def get_config():\n return nothing", "NameError: name 'nothing'.*line 2"),
        ("def get_config():\n return {}['k']", "KeyError: 'k' .*my_config.py, line 2"),
        ("def get_config():\n return None.x", "'NoneType' object has no .*line 2"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines .*line 1"),
        ("def get_config(x): return x", "get_config\\(\\) missing 1 required"),
        ("def get_config(:", "invalid syntax"),
        ("x = 1", "it has no function get_config"),
    ],
)  # fmt: skip
def test_a_config_that_fails_says_why_and_where(tmp_path, text, message):
    line = explain(error_of(tmp_path, text))
    assert line.startswith("the config cannot be read: ") and "\n" not in line
    assert re.search(message, line), line


def test_a_mistake_that_this_package_finds_in_a_config_is_told_in_its_words(tmp_path):
    text = (
        "from tpp_jax.pruning.ratios import parse_ratios\n"
        "def get_config():\n parse_ratios('x')"
    )
    line = explain(error_of(tmp_path, text))
    assert line.startswith("cannot read the pruning ratio 'x': write pattern:ratio")


def test_a_defect_of_this_package_is_not_blamed_on_the_config(tmp_path, monkeypatch):
    code = compile("def broken():\n int('a defect')", config_module.__file__, "exec")
    namespace = {}
    exec(code, namespace)
    monkeypatch.setattr(config_module, "default_config", namespace["broken"])
    text = f"{DEFAULT}def get_config(): return default_config()"
    assert explain(error_of(tmp_path, text)) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--config.prune.ratois=x",
            "has no field 'ratois'; did you mean prune.ratios?",
        ),
        ("--config.seed.x=1", "has no field 'seed.x'; did you mean seed?"),
    ],
)
def test_an_override_of_no_field_names_what_was_meant(
    tmp_path, monkeypatch, override, message
):
    text = f"{DEFAULT}def get_config(): return default_config()"
    monkeypatch.setattr(sys, "argv", ["launch.py", override])  # ml_collections looks
    assert message in explain(error_of(tmp_path, text, override))
