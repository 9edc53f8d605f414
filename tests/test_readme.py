"""The README fits a screen or two, and its code does what it says."""

import pathlib
import re

import tpp_jax as tpp
from tests import newcomer

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_code_runs_and_ends_in_a_fine_tuned_smaller_network():
    text = README.read_text(encoding="utf-8")
    found = {"__name__": "readme"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        # A traceback names the line of the page.
        lines = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(lines + block.group(1), str(README), "exec"), found)
    dense, small, example = found["model"], found["small"], found["images"][:1]
    assert tpp.count(small, example).flops <= tpp.count(dense, example).flops / 2
    at_once = found["accuracy"](tpp.prune(found["model"], found["plan"]))
    assert at_once > 0.9  # of the prepared network
    assert found["accuracy"](small) > 0.9
    count = found["optimizer"].step[...]
    assert count == found["schedule"].total_steps + 200


def test_it_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    code = "\n".join(lines).split("</details>")[1].split("```")[1]
    calls = [line for line in code.splitlines() if "tpp." in line]
    assert len(calls) <= 10


def test_a_newcomer_finds_each_command_and_the_results_of_the_demo():
    text = README.read_text(encoding="utf-8")
    shell = [block for language, block in newcomer.blocks(text) if not language]
    found = [command for block in shell for command in newcomer.commands(block)]
    assert found == ["make demo", newcomer.LONG, "pip install '.[train]'"]
    table = "│ dense │       98.89 % │\n│ fine-tuned │  9.50 % │"
    assert newcomer.accuracies(table) == [98.89, 9.5]
    assert len(newcomer.accuracies(text.partition("## Prune your own")[0])) == 4
