"""A whole run where the terminal and the locale know ASCII alone."""

import json

import pytest

from tests.end_to_end.starts import start

# A network that compiles quickly.
TINY = [
    "--config.model.name=mlp7_relu",
    "--config.prune.ratios=*net*:0.5",
    "--config.prune.skip=net.12",
    "--config.pretrain.epochs=1",
    "--config.pretrain.warmup_epochs=0",
    "--config.prune.schedule.granularity=0.5",
    "--config.prune.schedule.stabilize=60",
    "--config.finetune.epochs=1",
    "--config.finetune.warmup_epochs=0",
]


def launch(*arguments):
    """Runs launch.py in the plainest locale there is; returns code, output, errors."""
    process = start(*arguments, locale="C", XLA_FLAGS="")
    output, errors = process.communicate()
    assert output.isascii() and errors.isascii()
    return process.returncode, output, errors


@pytest.mark.slow
def test_a_run_prints_ascii_and_names_its_folder_as_it_is(tmp_path):
    workdir = tmp_path / "[old] [b]größe"
    flag = f"--workdir={workdir}"
    prefix = str(workdir).partition("ö")[0]
    code, text, errors = launch(flag, *TINY)
    assert code == 0, errors
    assert "net.10" in text and "100 > 50" in text and "fine-tuned" in text
    assert json.loads((workdir / "summary.json").read_text())["status"] == "done"
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "3.54× fewer" in page

    code, text, errors = launch(flag, *TINY)
    assert (code, errors) == (0, "")
    assert f"The run in {prefix}" in text
    for mode in ("inspect", "evaluate", "report"):
        code, _, errors = launch(flag, f"--mode={mode}")
        assert (code, errors) == (0, ""), mode
    code, _, errors = launch(flag, *TINY, "--config.seed=1")
    assert code == 1 and errors.startswith(f"error: {prefix}")
