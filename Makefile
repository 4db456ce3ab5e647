# Two commands: `make study` and `make test`. Both work from a bare clone with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.PHONY: study test check organism wheel clean

study: $(INSTALLED)  ## run the harm-pressure study on the model that ships
	$(BIN)/qklens study harm-pressure

test: $(VENV)/.dev  ## the whole test suite
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## lint, types, layers
	$(BIN)/ruff check src tests organism
	$(BIN)/ruff format --check src tests organism
	$(BIN)/pyright --pythonpath $(BIN)/python src
	$(BIN)/lint-imports

organism: $(VENV)/.dev  ## train the shipped models and their dictionary again
	$(BIN)/python -m organism.train
	$(BIN)/python -m organism.dictionary

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build runs
