"""A page about a run or a sweep: one self-contained HTML file."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tpp_jax.headline import headline_of, title_of
from tpp_jax.reports import grids, plots, tables

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto;
  padding: 1rem; background: #fff; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8884;
  white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
table { margin-bottom: 1rem; } figure { margin: 1.5rem 0; }
img { width: 100%; min-width: 34rem; max-width: 54rem; height: auto; display: block; }
small, figcaption { color: #777; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .85rem; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd; }
  small, figcaption { color: #999; } }
"""

_CAPTIONS = {
    "curves": "{}, loss, penalty strength and Gram penalty over all phases. "
    "Dots: test set; faint: training batches.",
    "channels": "Channels of each layer before and after.",
    "jacobian": "Jacobian singular values at the end of each stage. Values far below 1 "
    "mean that gradients vanish.",
    "gram": "Filters to prune are decorrelated from the kept ones, so that the cut "
    "does not affect the latter.",
}


def of_run(
    summary: Mapping[str, Any],
    pictures: Mapping[str, str],
) -> str:
    """Returns the page of a finished run.

    Args:
      summary: Summary of the run.
      pictures: SVG pictures by name, from :func:`tpp_jax.reports.plots.save`.
    """
    config = summary["config"]
    title = title_of(config)
    dense, small = summary["dense"], summary["pruned"] or summary["dense"]
    sizes = [
        ("parameters", dense["params"], small["params"]),
        ("FLOPs", dense["flops"], small["flops"]),
    ]
    headline = headline_of(summary)
    metric = headline.name
    scores = [
        (name, headline.text(score))
        for name, score in tables.scores(summary)
        if score is not None
    ]
    phases = [
        (
            phase["name"],
            f"{phase['steps']:,}",
            f"{phase['seconds']:.1f} s",
            headline.text(phase[metric]),
            headline.text(phase[f"best_{metric}"]),
        )
        for phase in summary["phases"]
    ]
    title_case = metric[0].upper() + metric[1:]
    captions = {name: text.format(title_case) for name, text in _CAPTIONS.items()}
    shown = pictures.items()
    blocks = [
        f"<p>Method {html.escape(summary['method'])}: {summary['speedup']:.2f}× fewer "
        f"FLOPs, {100 * summary['sparsity']:.1f} % of the parameters removed.</p>",
        _table(("network", f"test {metric}"), scores),
        _table(
            ("", "before", "after", "share"),
            [
                (name, f"{a:,}", f"{b:,}", f"{100 * b / a:.1f} %")
                for name, a, b in sizes
            ],
        ),
        "<h2>Phases</h2>",
        _table(("phase", "steps", "time", f"{metric} at its end", "best"), phases),
        *(_picture(name, svg, captions.get(name, "")) for name, svg in shown),
        "<h2>Configuration</h2><details><summary>all fields</summary><pre>"
        f"{html.escape(json.dumps(config, indent=2))}</pre></details>",
    ]
    return _page(title, blocks)


def of_grid(
    grid: grids.Grid, pictures: Mapping[str, str], failed: Mapping[str, str]
) -> str:
    """Returns the page of a sweep, finished or not.

    Args:
      grid: Results so far.
      pictures: SVG pictures by metric.
      failed: Error messages by name of the failed cell.
    """
    blocks = [f"<p>{html.escape(grids.explanation(grid))}</p>"]
    for metric in grid.metrics:
        blocks.append(f"<h2>{html.escape(grids.heading(grid, metric))}</h2>")
        rows = [
            (row, *(grids.text(grid, row, column, metric) for column in grid.columns))
            for row in grid.rows
        ]
        blocks.append(_table(("", *grid.columns), rows))
        blocks.append(_picture(metric, pictures[metric]))
    if failed:
        blocks.append("<h2>Failed</h2>")
        blocks.append(_table(("cell", "error"), list(failed.items())))
    return _page(grid.title, blocks)


def _page(title: str, blocks: Sequence[str]) -> str:
    body = "\n".join(blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    lines = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _picture(name: str, svg: str, caption: str = "") -> str:
    """Returns a picture in both themes, of which the browser shows the suitable one."""
    light, dark = _data_uri(svg), _data_uri(plots.on_dark(svg))
    return (
        f'<figure id="{name}"><div class="wide"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(caption or name)}"></picture></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
