"""A page about a run or a sweep: one self-contained HTML file."""

import base64
import csv
import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe

from tpp_jax import style
from tpp_jax.headline import headline_of, title_of
from tpp_jax.reports import grids, story, tables
from tpp_jax.reports.canvas import Picture

_LONG = 40  # a list of more layers is folded
_PHONE = 42  # letters in a line of a phone
_CAPTIONS = {
    "curves": "The metric on the test set and on training batches, the loss, and the "
    "penalties if there are any. A solid vertical line is a cut.",
    "channels": "Kept of all channels, for each layer.",
    "groups": "Layers in order of execution. A lane is a group of channels that can "
    "only be removed together; its filled part is kept.",
    "profile": "Median time of a call, dense and pruned.",
    "jacobian": "Singular values of the Jacobian at the end of each stage. Values far "
    "below 1 mean that gradients vanish.",
    "gram": "Inner products of the filters. Outside of the upper left block, which the "
    "kept filters form, TPP drives them to zero before the cut.",
}


class Table(NamedTuple):
    """A table of texts.

    Attributes:
      header: Names of the columns.
      rows: Entries of each row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def stacked(self) -> bool:
        """Whether a phone shows the entries of a row one below the other."""
        return _stacked([self.header, *self.rows])


def _stacked(rows: Iterable[Sequence[str]]) -> bool:
    """Returns whether a table is too wide for a phone."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return len(widths) > 2 and sum(widths) + 2 * len(widths) > _PHONE


class Files(NamedTuple):
    """What belongs to a run besides its summary and its pictures.

    Attributes:
      history: Rows of metrics.
      profile: Content of ``profile.json``; None if the networks were not timed.
      exports: What was checked of each exported file, by its name.
      groups: Drawing of the channel groups; None if there is none.
      made: Command, date, version and machine.
      table: Address of the report of the sweep that the run belongs to; "" for none.
    """

    history: Sequence[Mapping[str, Any]] = ()
    profile: Mapping[str, Any] | None = None
    exports: Mapping[str, Mapping[str, Any]] = {}
    groups: Picture | None = None
    made: Mapping[str, str] = {}
    table: str = ""


_NO_FILES = Files()


def of_run(
    summary: Mapping[str, Any],
    pictures: Mapping[str, Picture],
    files: Files = _NO_FILES,
) -> str:
    """Returns the page of a run, finished or not.

    Args:
      summary: Summary of the run.
      pictures: Pictures by name, from :func:`tpp_jax.reports.canvas.save`.
      files: What else belongs to the run.
    """
    headline = headline_of(summary)
    shown = pictures if files.groups is None else {**pictures, "groups": files.groups}
    scores = [
        (name, headline.text(score))
        for name, score in tables.scores(summary)
        if score is not None
    ]
    layers = [
        (name, str(layer["total"]), str(layer["kept"]))
        for name, layer in summary["layers"].items()
    ]
    data = {"metrics.csv": _rows_csv(files.history)} if files.history else {}
    data["scores.csv"] = _csv([("network", f"test {headline.name}"), *scores])
    if layers:
        data["channels.csv"] = _csv([("layer", "channels", "kept"), *layers])
    timed = profile_table(files.profile) if files.profile else None
    if timed:
        data["profile.csv"] = _csv([timed.header, *timed.rows])
    return _render(
        "run.html",
        title=title_of(summary["config"]),
        tpp="tpp" in str(summary["method"]),
        method=story.method_of(summary),
        summary=summary,
        stopped=summary.get("status") != "done",
        table=files.table,
        figures=list(story.figures(summary, files.profile)),
        chapters=list(story.chapters(summary)),
        scores=Table(("network", f"test {headline.name}"), scores),
        pictures={name: _shown(name, one) for name, one in shown.items()},
        changes=", ".join(f"{n} {a} → {b}" for n, a, b in layers if a != b),
        folded=len(layers) > _LONG,
        profile=timed,
        device=files.profile["device"] if files.profile else "",
        exports=export_table(files.exports) if files.exports else None,
        made=files.made,
        config=json.dumps(summary["config"], indent=2),
        data={name: _address("text/csv", text) for name, text in data.items()},
    )


def of_grid(
    grid: grids.Grid,
    pictures: Mapping[str, Picture],
    failed: Mapping[str, str],
    links: Mapping[tuple[str, str, int], str] | None = None,
    made: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """Returns the page of a sweep, finished or not.

    Args:
      grid: Results so far.
      pictures: Pictures by metric.
      failed: Error messages by name of the failed cell.
      links: Addresses of the reports of the runs, by row, column and seed.
      made: Command, date, version and machine of a run of the sweep.
      config: Base of the table's config.
    """
    ran = [row for row in grid.rows if grids.has_ran(grid, row)]
    seen = dict.fromkeys([*ran, *(row for row, _, _ in grid.paper)])
    rows = [row for row in grid.rows if row in seen]
    cells = functools.partial(_cell, grid, links or {})
    sections = [
        {
            "metric": metric,
            "heading": grids.heading(grid, metric),
            "rows": [
                (row, [cells(row, c, metric) for c in grid.columns]) for row in rows
            ],
            "picture": _shown(metric, pictures[metric]),
        }
        for metric in grid.metrics
    ]
    texts = [
        [row, *(f"★ {cell['text']} {cell['paper']}" for cell in found)]
        for section in sections
        for row, found in section["rows"]
    ]
    return _render(
        "sweep.html",
        tpp=False,
        axis="pruning ratio" if grids.by_ratio(grid) else "",
        stacked=_stacked([["", *grid.columns], *texts]),
        title=grid.title,
        explanation=grids.explanation(grid),
        columns=grid.columns,
        sections=sections,
        marked=any(
            cell["best"] for s in sections for _, row in s["rows"] for cell in row
        ),
        missing=[row for row in grid.rows if row not in seen],
        failed=failed,
        made=made or {},
        config=json.dumps(config, indent=2) if config else "",
        data={"table.csv": _address("text/csv", grids.csv(grid))},
    )


def _cell(
    grid: grids.Grid,
    links: Mapping[tuple[str, str, int], str],
    row: str,
    column: str,
    metric: str,
) -> dict[str, Any]:
    """Returns an entry of a table: its text, the runs in it, and whether it is best."""
    runs = {
        seed: link for (r, c, seed), link in links.items() if (r, c) == (row, column)
    }
    ours, _, paper = grids.text(grid, row, column, metric).partition(" [")
    return {
        "text": ours,
        "paper": paper.removesuffix("]"),
        "runs": runs,
        "best": row in grids.best_rows(grid, column, metric),
    }


def profile_table(profile: Mapping[str, Any]) -> Table:
    """Returns times and speedups of networks and of layers.

    Args:
      profile: Content of ``profile.json``.
    """
    header = ("", "dense, ms", "pruned, ms", "faster", "fewer FLOPs")
    pairs = {**profile["networks"]}
    pairs |= {f"layer {name}": pair for name, pair in profile["layers"].items()}
    return Table(header, [_timed(name, pair) for name, pair in pairs.items()])


def _timed(name: str, pair: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = pair["dense_seconds"], pair["pruned_seconds"]
    fewer = pair["dense_flops"] / pair["pruned_flops"]
    times = f"{1e3 * before:,.2f}", f"{1e3 * after:,.2f}"
    return (name, *times, f"{before / after:.2f}×", f"{fewer:.2f}×")


def export_table(exports: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns what was checked of exported files.

    Args:
      exports: Content of the description next to each file, by the file's name.
    """
    header = ("file", "size", "parameters", "FLOPs", "runtime", "largest difference")
    rows = [
        (
            name,
            story.size(one["bytes"]),
            f"{one['params']:,}",
            story.number(one["flops"]),
            str(one["runtime"]),
            f"{one['difference']:.0e} std",
        )
        for name, one in exports.items()
    ]
    return Table(header, rows)


class _Shown(NamedTuple):
    """A picture as the page has it: its addresses, by theme and width."""

    name: str
    caption: str
    wide: str
    wide_dark: str
    phone: str
    phone_dark: str


def _shown(name: str, picture: Picture) -> _Shown:
    addresses = []
    for svg in picture:
        addresses += [_address("image/svg+xml", svg)]
        addresses += [_address("image/svg+xml", style.on_dark(svg))]
    return _Shown(name, _CAPTIONS.get(name, ""), *addresses)


def _address(kind: str, text: str) -> str:
    # Lone surrogates stand for bytes that are not UTF-8.
    content = base64.b64encode(text.encode(errors="backslashreplace")).decode()
    return f"data:{kind};base64,{content}"


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _rows_csv(history: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of metrics as CSV, with a column for each metric."""
    names = list(dict.fromkeys(name for row in history for name in row))
    rows = [[str(row.get(name, "")) for name in names] for row in history]
    return _csv([names, *rows])


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tpp_jax.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["is_tpp"] = grids.is_tpp
    return environment


def _render(template: str, **content: Any) -> str:
    environment = _environment()
    css = environment.get_template("page.css").render(
        light=style.LIGHT.colors(),
        dark=style.DARK.colors(),
        font=markupsafe.Markup(style.FONT),
        mono=markupsafe.Markup(style.MONO),
    )
    return environment.get_template(template).render(
        css=markupsafe.Markup(css), **content
    )
