"""Tables of many runs: mean and spread over seeds, compared with published values."""

import csv as csv_format
import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tpp_jax.headline import ACCURACY, Headline, headline_of


def metrics_about(headline: Headline) -> dict[str, str]:
    """Returns what can be shown of runs, by name, each with its description.

    Args:
      headline: Metric by which the runs are judged.
    """
    name, unit = headline.name, f", {headline.unit}" if headline.unit else ""
    return {
        f"best_{name}": f"best test {name} of the fine-tuning{unit}",
        f"last_{name}": f"test {name} at the end{unit}",
        f"trainability_{name}": f"mean test {name} at the first learning rate{unit}",
        f"cut_{name}": f"test {name} right after the cut{unit}",
        f"dense_{name}": f"test {name} of the dense network{unit}",
        "jsv_mean": "mean Jacobian singular value right after the cut",
        "speedup": "FLOPs, dense by pruned",
        "sparsity": "parameters removed, %",
    }


class Grid(NamedTuple):
    """The results of a sweep.

    Attributes:
      title: Title of the table.
      rows: Names of the rows.
      columns: Names of the columns.
      metrics: Names of the metrics to show, from :func:`metrics_about`.
      results: Metrics of the finished runs, by row, column and seed.
      planned: Total number of runs.
      paper: Published mean, and standard deviation or None, by row, column and metric.
      headline: Metric by which the runs are judged.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    results: Mapping[tuple[str, str, int], Mapping[str, float]]
    planned: int
    paper: Mapping[tuple[str, str, str], tuple[float, float | None]]
    headline: Headline = ACCURACY


class Entry(NamedTuple):
    """One entry of a table.

    Attributes:
      mean: Mean over seeds.
      std: Standard deviation over seeds; that of the population, as in the paper.
      n: Number of finished runs.
      paper: Published mean, if any.
      paper_std: Published standard deviation, if any.
    """

    mean: float
    std: float
    n: int
    paper: float | None
    paper_std: float | None

    @property
    def difference(self) -> float | None:
        """Mean minus published mean; None if one of them is missing."""
        return self.mean - self.paper if self.n and self.paper is not None else None


def metrics_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of :func:`metrics_about` that a run's summary contains.

    Args:
      summary: Summary of the run.
    """
    cuts = [p for p in summary["phases"] if p["name"].startswith("slice")]
    cut, name = cuts[-1] if cuts else {}, headline_of(summary).name
    found = {
        f"best_{name}": summary[f"best_{name}"],
        f"last_{name}": summary[f"last_{name}"],
        f"trainability_{name}": summary[f"trainability_{name}"],
        f"cut_{name}": cut.get(name),
        f"dense_{name}": summary["dense"][name],
        "jsv_mean": cut.get("jacobian", {}).get("mean"),
        "speedup": summary["speedup"],
        "sparsity": 100 * summary["sparsity"],
    }
    return {name: value for name, value in found.items() if value is not None}


def entry(grid: Grid, row: str, column: str, metric: str) -> Entry:
    """Returns mean and spread of a metric over the finished seeds.

    Args:
      grid: Results of the sweep.
      row: Name of the row.
      column: Name of the column.
      metric: Name of the metric.
    """
    values = [
        metrics[metric]
        for (r, c, _), metrics in grid.results.items()
        if (r, c) == (row, column) and metric in metrics
    ]
    paper, paper_std = grid.paper.get((row, column, metric), (None, None))
    if not values:
        return Entry(math.nan, math.nan, 0, paper, paper_std)
    mean, std = statistics.fmean(values), statistics.pstdev(values)
    return Entry(mean, std, len(values), paper, paper_std)


def markdown(grid: Grid) -> str:
    """Returns the tables in Markdown, one for each metric.

    Args:
      grid: Results of the sweep.
    """
    lines = [f"# {literal(grid.title)}", "", explanation(grid)]
    for metric in grid.metrics:
        lines += ["", f"## {heading(grid, metric)}", ""]
        lines.append(f"| | {' | '.join(map(literal, grid.columns))} |")
        lines.append(f"|---|{'---|' * len(grid.columns)}")
        for row in grid.rows:
            texts = [text(grid, row, column, metric) for column in grid.columns]
            lines.append(f"| {literal(row)} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def literal(text: str) -> str:
    r"""Returns Markdown that renders as the given text, also inside a table.

    Args:
      text: Text to render.

    Example:
      >>> print(literal("$L_1$ | half"))
      \$L_1\$ \| half
    """
    return re.sub(r"([\\|$*<`])", r"\\\1", " ".join(text.split()))


def heading(grid: Grid, metric: str) -> str:
    """Returns the description of a metric with an initial capital.

    Args:
      grid: Results of the sweep.
      metric: Name of the metric.
    """
    words = metrics_about(grid.headline)[metric]
    return words[0].upper() + words[1:]


def explanation(grid: Grid) -> str:
    """Returns a sentence that explains the entries of the tables.

    Args:
      grid: Results of the sweep.
    """
    seeds = len({seed for _, _, seed in grid.results})
    published = "; in brackets the published value, and ours minus it"
    return (
        f"{len(grid.results)} of {grid.planned} runs are done. Mean ± population "
        f"standard deviation over up to {seeds} seeds{published if grid.paper else ''}."
    )


def text(grid: Grid, row: str, column: str, metric: str) -> str:
    """Returns an entry as ``ours ± spread [published ± spread, difference]``.

    Args:
      grid: Results of the sweep.
      row: Name of the row.
      column: Name of the column.
      metric: Name of the metric.
    """
    found = entry(grid, row, column, metric)
    digits = _digits(grid, metric, found.mean)
    ours = "–" if not found.n else f"{found.mean:.{digits}f}"
    if found.n > 1:
        ours += f" ± {found.std:.{digits}f}"
    if found.paper is None:
        return ours
    published = f"{found.paper:.{digits}f}"
    if found.paper_std is not None:
        published += f" ± {found.paper_std:.{digits}f}"
    if found.difference is not None:
        published += f", {found.difference:+.{digits}f}"
    return f"{ours} [{published}]"


def _digits(grid: Grid, metric: str, value: float) -> int:
    """Returns the number of decimals of a metric."""
    if metric == "jsv_mean":
        return 4
    if grid.headline.unit == "%" or not metric.endswith(f"_{grid.headline.name}"):
        return 2
    return next((n for n, most in ((4, 1), (3, 10)) if abs(value) < most), 2)


def csv(grid: Grid) -> str:
    """Returns all entries as CSV, one per line.

    Args:
      grid: Results of the sweep.
    """
    lines = io.StringIO()
    writer = csv_format.writer(lines, lineterminator="\n")
    header = ["row", "column", "metric", "mean", "std", "runs"]
    writer.writerow([*header, "paper", "paper_std", "difference"])
    for row, column, metric in _places(grid):
        e = entry(grid, row, column, metric)
        numbers = (e.mean, e.std) if e.n else (None, None)
        writer.writerow(
            [row, column, metric, *numbers, e.n, e.paper, e.paper_std, e.difference]
        )
    return lines.getvalue()


def _places(grid: Grid) -> Iterator[tuple[str, str, str]]:
    for metric in grid.metrics:
        for row in grid.rows:
            for column in grid.columns:
                yield row, column, metric
