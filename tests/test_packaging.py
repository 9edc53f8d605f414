"""The two lists of run-time dependencies say the same."""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parents[1]


def test_requirements_txt_lists_the_dependencies_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert requirements == project["dependencies"]


def test_every_dependency_has_a_lower_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = sum(project["optional-dependencies"].values(), [])
    for line in project["dependencies"] + optional:
        assert ">=" in line, line
