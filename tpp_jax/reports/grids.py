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
      recorded: Entries of a table that was read from CSV, which has no results of
        single runs, by row, column and metric.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    results: Mapping[tuple[str, str, int], Mapping[str, float]]
    planned: int
    paper: Mapping[tuple[str, str, str], tuple[float, float | None]]
    headline: Headline = ACCURACY
    recorded: Mapping[tuple[str, str, str], "Entry"] = {}

    @property
    def done(self) -> int:
        """Number of finished runs."""
        most: dict[tuple[str, str], int] = {}
        for (row, column, _), found in self.recorded.items():
            most[row, column] = max(most.get((row, column), 0), found.n)
        return len(self.results) + sum(most.values())

    @property
    def seeds(self) -> int:
        """Largest number of seeds in a row and column."""
        seeds = len({seed for _, _, seed in self.results})
        return max([seeds, *(found.n for found in self.recorded.values())])


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
    if (recorded := grid.recorded.get((row, column, metric))) is not None:
        return recorded
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


def dense(grid: Grid, column: str, metric: str) -> float | None:
    """Returns the mean of a column's dense networks, next to which a metric stands.

    None for a metric that is not a score of the pruned network, or without results.

    Args:
      grid: Results of the sweep.
      column: Name of the column.
      metric: Name of the metric.
    """
    name = grid.headline.name
    if metric not in (f"best_{name}", f"last_{name}", f"cut_{name}"):
        return None
    found = [
        metrics[f"dense_{name}"]
        for (_, c, _), metrics in grid.results.items()
        if c == column and f"dense_{name}" in metrics
    ]
    return statistics.fmean(found) if found else None


def is_tpp(row: str) -> bool:
    """Returns whether a row of a table is one of TPP, by its name.

    Args:
      row: Name of the row.

    Example:
      >>> is_tpp("TPP, distilled"), is_tpp("GReg-1")
      (True, False)
    """
    return re.search(r"\btpp\b", row, re.IGNORECASE) is not None


def by_ratio(grid: Grid) -> bool:
    """Returns whether the columns of a table are pruning ratios, by their names.

    Args:
      grid: Results of the sweep.
    """
    return all(re.fullmatch(r"0?\.\d+", name) for name in grid.columns)


def has_ran(grid: Grid, row: str) -> bool:
    """Returns whether any run of a row is done.

    Args:
      grid: Results of the sweep.
      row: Name of the row.
    """
    return any(
        entry(grid, row, column, metric).n
        for column in grid.columns
        for metric in grid.metrics
    )


def best_rows(grid: Grid, column: str, metric: str) -> list[str]:
    """Returns the rows with the best mean in a column, if there are several rows.

    Empty for a metric of which neither more nor less is better.

    Args:
      grid: Results of the sweep.
      column: Name of the column.
      metric: Name of the metric.
    """
    name = grid.headline.name
    scored = metric.endswith(f"_{name}") and metric != f"dense_{name}"
    if not scored and metric != "speedup":
        return []
    found = {row: entry(grid, row, column, metric) for row in grid.rows}
    means = {row: e.mean for row, e in found.items() if e.n and math.isfinite(e.mean)}
    if len(set(means.values())) < 2:
        return []
    lower = scored and grid.headline.better == "lower"
    best = (min if lower else max)(means.values())
    return [row for row, mean in means.items() if mean == best]


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
    published = "; in brackets the published value, and ours minus it"
    seeds = (
        "One seed"
        if grid.seeds == 1
        else f"Mean ± population standard deviation over up to {grid.seeds} seeds"
    )
    return (
        f"{grid.done} of {grid.planned} runs are done. "
        f"{seeds}{published if grid.paper else ''}."
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


def read_csv(text: str, title: str, planned: int) -> Grid:
    """Returns the table that :func:`csv` has written.

    Args:
      text: Content of the file.
      title: Title of the table.
      planned: Total number of runs.
    """
    recorded: dict[tuple[str, str, str], Entry] = {}
    for line in csv_format.DictReader(io.StringIO(text)):
        mean, std, paper, paper_std = (
            float(line[name]) if line[name] else None
            for name in ("mean", "std", "paper", "paper_std")
        )
        recorded[line["row"], line["column"], line["metric"]] = Entry(
            *(math.nan if mean is None else mean, math.nan if std is None else std),
            *(int(line["runs"]), paper, paper_std),
        )
    rows, columns, metrics = (
        tuple(dict.fromkeys(key[i] for key in recorded)) for i in range(3)
    )
    published = {
        key: (found.paper, found.paper_std)
        for key, found in recorded.items()
        if found.paper is not None
    }
    return Grid(
        *(title, rows, columns, metrics, {}, planned, published), recorded=recorded
    )


def _places(grid: Grid) -> Iterator[tuple[str, str, str]]:
    for metric in grid.metrics:
        for row in grid.rows:
            for column in grid.columns:
                yield row, column, metric
