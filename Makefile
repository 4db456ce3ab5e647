# Two commands: `make study` and `make test`. Both work from a bare clone with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ORACLE := .venv-oracle
NNSIGHT := .venv-nnsight
SPARSIFY := .venv-sparsify
SAELENS := .venv-saelens
MODEL ?= organism
SWEEP ?= --items 16 --slow-items 4
TRAINING ?=
export HF_HUB_OFFLINE := 1

.PHONY: study test coverage check organism arms model-diff oracle rivals train-rivals wheel clean

study: $(INSTALLED)  ## run the harm-pressure study on the model that ships
	$(BIN)/qklens study harm-pressure

test: $(VENV)/.dev  ## the whole test suite
	$(BIN)/python -m pytest

coverage: $(VENV)/.dev  ## the same with branch coverage, slower
	$(BIN)/python -m pytest --cov

check: $(VENV)/.dev  ## lint, types, layers
	$(BIN)/ruff check src tests organism oracle benchmarks
	$(BIN)/ruff format --check src tests organism oracle benchmarks
	$(BIN)/pyright --pythonpath $(BIN)/python src
	$(BIN)/lint-imports

organism: $(VENV)/.dev  ## train the shipped models and their dictionary again
	$(BIN)/python -m organism.train
	$(BIN)/python -m organism.dictionary

arms: $(VENV)/.dev  ## which training examples make the organism withhold: train the arms again
	nice -n 19 $(BIN)/python -m organism.arms

model-diff: $(VENV)/.dev  ## what the organism's chat model has that its base has not: a crosscoder over both
	nice -n 19 $(BIN)/python -m organism.model_diff

oracle: $(INSTALLED) $(ORACLE)/.installed  ## compare with TransformerLens, which has an environment of its own
	$(BIN)/python -m oracle.qklens_side
	$(ORACLE)/bin/python -m oracle.lens_side
	$(BIN)/python -m oracle.compare

rivals: $(INSTALLED) $(ORACLE)/.installed $(NNSIGHT)/.installed  ## time a steering sweep beside other tools: MODEL=DIR
	$(BIN)/python -m benchmarks.sweep --model $(MODEL) $(SWEEP) \
	  --lens-python $(ORACLE)/bin/python --nnsight-python $(NNSIGHT)/bin/python

train-rivals: $(INSTALLED) $(SPARSIFY)/.installed $(SAELENS)/.installed  ## time dictionary training beside other tools
	$(BIN)/python -m benchmarks.dictionary_training $(TRAINING) \
	  --sparsify-python $(SPARSIFY)/bin/python --saelens-python $(SAELENS)/bin/python

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "'$(PYTHON)' is not Python 3.11 or newer; install one and name it: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(ORACLE)/.installed: oracle/constraints.txt
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet --upgrade -c oracle/constraints.txt pip
	$(ORACLE)/bin/python -m pip install --quiet torch -c oracle/constraints.txt
	$(ORACLE)/bin/python -m pip install --quiet transformer-lens -c oracle/constraints.txt
	touch $@

$(NNSIGHT)/.installed: benchmarks/rivals/constraints.txt
	$(PYTHON) -m venv $(NNSIGHT)
	$(NNSIGHT)/bin/python -m pip install --quiet --upgrade -c benchmarks/rivals/constraints.txt pip
	$(NNSIGHT)/bin/python -m pip install --quiet torch -c benchmarks/rivals/constraints.txt
	$(NNSIGHT)/bin/python -m pip install --quiet nnsight -c benchmarks/rivals/constraints.txt
	touch $@

$(SPARSIFY)/.installed: benchmarks/rivals/sparsify-constraints.txt
	$(PYTHON) -m venv $(SPARSIFY)
	$(SPARSIFY)/bin/python -m pip install --quiet --upgrade -c benchmarks/rivals/sparsify-constraints.txt pip
	$(SPARSIFY)/bin/python -m pip install --quiet torch -c benchmarks/rivals/sparsify-constraints.txt
	$(SPARSIFY)/bin/python -m pip install --quiet eai-sparsify -c benchmarks/rivals/sparsify-constraints.txt
	touch $@

$(SAELENS)/.installed: benchmarks/rivals/saelens-constraints.txt
	$(PYTHON) -m venv $(SAELENS)
	$(SAELENS)/bin/python -m pip install --quiet --upgrade -c benchmarks/rivals/saelens-constraints.txt pip
	$(SAELENS)/bin/python -m pip install --quiet torch -c benchmarks/rivals/saelens-constraints.txt
	$(SAELENS)/bin/python -m pip install --quiet sae-lens -c benchmarks/rivals/saelens-constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(ORACLE) $(NNSIGHT) $(SPARSIFY) $(SAELENS) dist build runs
