"""The demo and the same at nine tenths, recorded for the pictures in docs/images.

    python -m benchmarks.demo

Trains, prunes and fine-tunes ResNet-8 on scikit-learn's digits as
``configs/digits_resnet8_tpp.py`` says, which is what ``make demo`` runs, and once more
with 0.9 of the filters pruned. Kept are the summaries and, of the demo, the metrics of
all steps. ``python -m benchmarks.pictures`` draws them.
"""

import json
import pathlib
import tempfile
from typing import Any

from benchmarks import machine
from configs import digits_resnet8_tpp
from tpp_jax.experiment import run

RATIOS = "0.5", "0.9"


def main() -> None:
    runs: dict[str, Any] = {}
    for ratio in RATIOS:
        config = digits_resnet8_tpp.get_config()
        config.prune.ratios = f"*layer*.conv1:{ratio}"
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder) / "run"
            summary = run.train(config, workdir)
            lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        runs[ratio] = {"summary": summary}
        if ratio == RATIOS[0]:
            rows = map(json.loads, lines)
            runs[ratio]["history"] = [_rounded(row) for row in rows]
    print(machine.write("demo", {"runs": runs}))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of metrics with four digits, without what no picture shows."""
    hidden = "learning_rate", "images_per_second"
    return {
        name: float(f"{x:.4g}") if isinstance(x, float) else x
        for name, x in row.items()
        if name not in hidden
    }


if __name__ == "__main__":
    main()
