"""The fields of a run's config, listed for people: as a page and as a flag's help.

python -m tpp_jax.experiment.config_docs > docs/config.md
"""

import re

from tpp_jax.experiment.config import SECTIONS
from tpp_jax.experiment.fields import Field, Section

INTRODUCTION = """# Fields of a config

A run is described by one config: the network, the data, how it is trained, what is
pruned and how. This page lists every field, its default and the values that it may
have. The page is made by `python -m tpp_jax.experiment.config_docs`.

## Setting fields

On the command line a field is a flag, `--config.` and its full name. Quote values that
the shell would change, such as patterns:

```
python launch.py --config=configs/digits_resnet8_tpp.py --workdir=runs/digits \\
    --config.prune.ratios='*layer*.conv1:0.7' --config.finetune.epochs=20 \\
    --config.prune.bn=False
```

Values from the command line replace those of the config file. In a file, `get_config`
starts from all defaults and sets what differs:

```python
from tpp_jax.experiment.config import default_config


def get_config():
    config = default_config()
    config.model.name = "cifar_resnet20"
    config.prune.ratios = "*layer*.conv1:0.7"
    config.finetune.epochs = 20
    return config
```

The files in [configs/](../configs) are complete examples. A field keeps the type of its
default. A name that does not exist, or a value that no run can use, is refused before
anything is trained. In the config of a [table of runs](tables.md) these are the
fields of `base`: `--config.base.data.dir=…`.

Lengths are in steps (training batches) unless a line says otherwise. Whole numbers may
be as large as 2147483647 unless a line says less.

`RunConfig` in [config.py](../tpp_jax/experiment/config.py) and its sections in
[sections.py](../tpp_jax/experiment/sections.py) declare the fields. From
Python, `RunConfig.from_dict(get_config())` checks a config and returns it typed.
"""


def page() -> str:
    """Returns the text of docs/config.md."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        title = f"`{section.name}`" if section.name else "The run"
        parts.append(f"## {title}\n\n{section.doc}\n")
        fields, same = _listed(section)
        if same:
            parts.append(f"It has {_like(same)}\n")
        lines = ["| field | default | meaning | values |", "|---|---|---|---|"]
        lines += [
            f"| `{one.name}` | `{one.default!r}` | {one.doc} | {one.values} |"
            for one in fields
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def flag_help() -> str:
    """Returns a list of all fields for the help of the flag ``--config``."""
    lines = [
        "Python file whose function get_config() returns the config of a run. Each "
        "field of it is a flag too, as in --config.seed=1. Fields and their defaults, "
        "which the file may replace (docs/config.md lists the values they may have):"
    ]
    for section in SECTIONS:
        fields, same = _listed(section)
        if same:
            lines.append(_plain(f"Of `{section.name}`: {_like(same)}"))
        lines += [
            f"--config.{one.name}={one.default!r}: {_plain(one.doc)}" for one in fields
        ]
    return "\n".join(lines)


def _listed(section: Section) -> tuple[list[Field], str]:
    """Returns the fields of a section that are worth a line.

    Returns:
      All fields; or, if an earlier section is of the same kind, those whose default
      differs and the name of that section.
    """
    kind = type(section.defaults)
    first = next(one for one in SECTIONS if type(one.defaults) is kind)
    if first is section:
        return list(section.fields), ""
    pairs = zip(section.fields, first.fields, strict=True)
    return [own for own, other in pairs if own.default != other.default], first.name


def _like(name: str) -> str:
    return f"the same fields as of `{name}`; these have other defaults:"


def _plain(markdown: str) -> str:
    """Returns Markdown as text, its links as paths from the root of the repository."""
    return re.sub(r"\[.+?\]\((.+?)\)", r"docs/\1", markdown).replace("`", "")


if __name__ == "__main__":
    print(page(), end="")
