# `make demo` and `make test` need nothing but Python 3.11 or later and the network:
# they create .venv, install into it, and run. A second call goes straight to running.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO_CONFIG ?= configs/digits_resnet8_tpp.py
DEMO_WORKDIR ?= runs/digits

BIN := $(VENV)/bin

.PHONY: help demo test unittest doctest lint format docs release-check newcomer clean

help:
	@echo "make demo    train, prune and fine-tune on handwritten digits (minutes)"
	@echo "make test    lint, tests and the examples in docstrings"
	@echo "make lint    ruff check, format check and type check only"
	@echo "make docs    build the documentation site: site/index.html"
	@echo "make format  format the code with ruff"
	@echo "make clean   remove the virtual environment and caches (keeps runs/)"
	@echo "make release-check  build the package, install it elsewhere, run the demo"
	@echo "make newcomer       follow the README in a clone, top to bottom"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS)"

demo: $(VENV)/.installed
	$(BIN)/python launch.py --config=$(DEMO_CONFIG) --workdir=$(DEMO_WORKDIR)
	@echo
	@echo "Where to look:"
	@echo "  $(DEMO_WORKDIR)/report.html    the run in pictures and tables"
	@echo "  $(DEMO_WORKDIR)/summary.json   accuracy, parameters and FLOPs, before and after"
	@echo "  $(DEMO_WORKDIR)                checkpoints and TensorBoard event files"
	@echo "Check the pruned network again, from its checkpoint alone:"
	@echo "  $(BIN)/python launch.py --mode=evaluate --workdir=$(DEMO_WORKDIR)"

# The three run at once, since the first and the last each keep only one core busy.
test: $(VENV)/.installed-test
	$(MAKE) --no-print-directory --jobs=3 lint unittest doctest

unittest: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# With the tests' settings, since compiled programs are kept by them.
doctest: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -p tests.conftest --doctest-modules tpp_jax

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

release-check: $(VENV)/.installed-release
	.ci/release-check $(BIN)/python

newcomer:
	$(PYTHON) tests/newcomer.py

# Warnings are errors: a link that leads nowhere, a name without an entry.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "Open site/index.html"

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find tpp_jax tests configs benchmarks -name __pycache__ -prune -exec rm -rf {} + \
		2>/dev/null || true

# The stamps say that the installation finished, for the dependencies as they are now.
$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.created
	@echo "Installing tpp_jax and what it needs into $(VENV) (once, a few minutes)"
	@$(BIN)/python .ci/install.py --editable '.[train,plots]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml setup.py | $(VENV)/.created
	@echo "Installing the tools of the documentation into $(VENV)"
	@$(BIN)/python .ci/install.py --editable '.[docs]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml setup.py | $(VENV)/.created
	@echo "Installing tpp_jax and what its tests need into $(VENV) (once, minutes)"
	@$(BIN)/python .ci/install.py --editable '.[test]'
	@# It asks for an old orbax-checkpoint, which it does not import.
	@$(BIN)/python .ci/install.py --no-deps 'jax2onnx>=0.17.1,<0.18'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-docs

$(VENV)/.installed-release: | $(VENV)/.created
	@echo "Installing build and twine into $(VENV)"
	@$(BIN)/python .ci/install.py 'build>=1.2' 'twine>=6.1'
	@touch $@

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: there is no $(PYTHON): install Python 3.11 or later, or name" \
			"one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or later is needed, but $(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1). Name another:" \
			"make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "error: no virtual environment could be made; on Debian and Ubuntu" \
			"install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@touch $@
