"""Does for the package what pyproject.toml cannot.

The configs become ``tpp_jax/configs``: a checkout has them at the top, where who runs
an experiment looks for them. In the description, the links of the README become
absolute, since an index shows it without the repository's other files.
"""

import pathlib
import re
import tomllib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent


def description() -> str:
    """Returns the README with links to this version's files in the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    source = (ROOT / "tpp_jax" / "__init__.py").read_text("utf-8")
    version = re.search('^__version__ = "(.+)"', source, re.M)[1]
    address = project["urls"]["Repository"]

    def absolute(match: re.Match[str]) -> str:
        before, target = match.groups()
        image = target.endswith((".png", ".svg"))
        return f"{before}{address}/{'raw' if image else 'blob'}/v{version}/{target}"

    # [text](target), src="target" and srcset="target"
    link = r"""(\]\(|\bsrc(?:set)?=")(?!https?://|#)([^)"\s]+)"""
    return re.sub(link, absolute, (ROOT / "README.md").read_text("utf-8"))


setup(
    packages=[
        *find_packages(include=["tpp_jax", "tpp_jax.*"]),
        "tpp_jax.configs",
        "tpp_jax.configs.tables",
    ],
    package_dir={"tpp_jax.configs": "configs"},
    py_modules=["tpp_jax_command"],
    long_description=description(),
    long_description_content_type="text/markdown",
)
