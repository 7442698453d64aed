# Two commands matter: `make demo` and `make test`. `make help` lists all of them.

PYTHON ?= python3
VENV ?= .venv
# Extra package index for torch, e.g. PyTorch's index of CPU builds. Empty: what pip is set up to use.
TORCH_INDEX ?=
WORKERS ?= 2
# Environments of other software that loads results, for `make test-clients`.
CLIENTS_VENV ?= .venv-clients
TRANSFORMERS4_VENV ?= .venv-transformers4

BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help demo bench bench-quick bench-recombination test test-all record-families test-slow test-clients record-clients lint clean clean-venv
.DEFAULT_GOAL := help

help:
	@echo "make demo            compress the bundled model with every recipe and print the results side by side"
	@echo "make bench-quick     compare the main methods on the bundled Mixtral (ten minutes), with a report to look at"
	@echo "make bench           train and carve the other testbeds where they are not there, and compare everything on all (hours)"
	@echo "make bench-recombination  compare recombination's parts, widths and calibration texts (two hours)"
	@echo "make test            lint, then all tests but the slow ones, on a dozen model families"
	@echo "make test-all        the same for every model family (half an hour)"
	@echo "make record-families the laws on every model family, and writes docs/reference/architectures.md"
	@echo "make test-slow       the slow tests"
	@echo "make test-clients    mlx-lm, llama.cpp and transformers 4 load results; makes their environments (1.6 GB) first"
	@echo "make record-clients  the same, and writes docs/reference/clients.md"
	@echo "make lint            ruff, mypy and the import contracts"
	@echo "make clean           remove caches and build products"
	@echo "make clean-venv      remove the environments $(VENV), $(CLIENTS_VENV) and $(TRANSFORMERS4_VENV)"
	@echo
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV), TORCH_INDEX=$(TORCH_INDEX) (see README.md), WORKERS=$(WORKERS)"

# The models of the tests are tiny and run side by side: more threads would only wait for each other.
test test-all record-families test-slow test-clients record-clients: export OMP_NUM_THREADS = 1

demo: $(VENV)/.demo
	$(BIN)/python benchmarks/demo.py

# Plugins that take part in comparisons lie outside the environment: the tests must not see them.
bench bench-quick bench-recombination: export PYTHONPATH = runs/plugins
bench bench-quick bench-recombination: export HF_HUB_DISABLE_PROGRESS_BARS = 1
COMPARE = $(BIN)/dernkit compare --jobs $(WORKERS)

TRAIN = $(BIN)/python -m benchmarks.testbeds.fine_grained
benchmarks/testbeds/qwen2_moe/routing.md: | $(VENV)/.bench
	$(TRAIN) qwen2-moe --work-dir runs/testbeds/work --out $(@D)

benchmarks/testbeds/deepseek/routing.md: | $(VENV)/.bench
	$(TRAIN) deepseek --work-dir runs/testbeds/work --out $(@D)

SMOL = runs/testbeds/smol/model/README.md
$(SMOL): | $(VENV)/.bench
	$(BIN)/python -m benchmarks.testbeds.smol.dense --out runs/testbeds/smol/dense
	$(BIN)/python -m benchmarks.testbeds.smol --dense runs/testbeds/smol/dense --out $(@D)

TASKS = runs/tasks/dernkit-tasks.json
$(TASKS): | $(VENV)/.bench
	$(BIN)/dernkit tasks prepare --out $(@D)

TRAINED = benchmarks/testbeds/qwen2_moe/routing.md benchmarks/testbeds/deepseek/routing.md

bench-quick: $(VENV)/.bench
	$(COMPARE) benchmarks/comparisons/quick.yaml --out runs/bench-quick

bench: $(VENV)/.bench $(TRAINED) $(SMOL) $(TASKS)
	$(BIN)/python benchmarks/smol_tasks.py --dense runs/testbeds/smol/dense --smol runs/testbeds/smol/model --tasks runs/tasks
	$(COMPARE) benchmarks/comparisons/methods.yaml --out benchmarks/results/methods
	$(COMPARE) benchmarks/comparisons/claims.yaml --out benchmarks/results/claims
	$(COMPARE) benchmarks/comparisons/smol.yaml --out benchmarks/results/smol
	$(BIN)/python benchmarks/fit_profile.py
	$(BIN)/python -m benchmarks.claims --write-docs

bench-recombination: $(VENV)/.bench $(TRAINED) $(SMOL) $(TASKS)
	$(BIN)/python -m benchmarks.testbeds.corpus --domains runs/testbeds/calibration
	$(COMPARE) benchmarks/comparisons/recombination.yaml --out benchmarks/results/recombination
	$(COMPARE) benchmarks/comparisons/variants.yaml --out benchmarks/results/variants
	$(COMPARE) benchmarks/comparisons/width.yaml --out benchmarks/results/width
	$(COMPARE) benchmarks/comparisons/sample-size.yaml --out benchmarks/results/sample-size
	$(COMPARE) benchmarks/comparisons/calibration-text.yaml --out benchmarks/results/calibration-text
	$(COMPARE) benchmarks/comparisons/smol-recombination.yaml --out benchmarks/results/smol-recombination
	$(BIN)/python -m benchmarks.recombination --write-docs

test: lint
	$(BIN)/python -m pytest -m "not slow and not clients and not families" -n $(WORKERS) --durations=30

test-all: lint
	$(BIN)/python -m pytest -m "not slow and not clients" -n $(WORKERS)

record-families: $(VENV)/.test
	DERNKIT_FAMILIES_RECORD=docs/reference/architectures.json $(BIN)/python -m pytest tests/laws/test_every_family.py -n $(WORKERS)
	$(BIN)/python docs/generate.py

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

test-clients record-clients: export DERNKIT_CLIENTS_VENV = $(abspath $(CLIENTS_VENV))
test-clients record-clients: export DERNKIT_TRANSFORMERS4_VENV = $(abspath $(TRANSFORMERS4_VENV))
test-clients: $(VENV)/.test $(CLIENTS_VENV)/.made $(TRANSFORMERS4_VENV)/.made
	$(BIN)/python -m pytest -m clients tests/clients

record-clients: $(VENV)/.test $(CLIENTS_VENV)/.made $(TRANSFORMERS4_VENV)/.made
	DERNKIT_CLIENTS_RECORD=docs/reference/clients.json $(BIN)/python -m pytest -m clients tests/clients
	$(BIN)/python docs/generate.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# Stamps: an environment is made once and again only when what it is made from has changed.

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "PYTHON must be Python 3.11 or newer. Got '$(PYTHON)' instead. Set PYTHON, e.g. make test PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch into $(VENV) (the first time this can take minutes)"
	@$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "Installing dernkit into $(VENV)"
	@$(INSTALL) --quiet -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "Installing dernkit with its extras compare and dev into $(VENV)"
	@$(INSTALL) --quiet -e '.[compare,dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@echo "Installing dernkit with its extra compare into $(VENV), and plugins into runs/plugins"
	@$(INSTALL) --quiet -e '.[compare]' -r benchmarks/testbeds/smol/requirements.txt
	@rm -rf runs/plugins
	@$(INSTALL) --quiet --no-deps --target runs/plugins plugins/dernkit-hc-smoe
	@touch $@

$(CLIENTS_VENV)/.made: tests/clients/requirements.txt
	@echo "Installing mlx-lm and llama.cpp into $(CLIENTS_VENV)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

# torch goes first and alone: it may come from an index of its own.
$(TRANSFORMERS4_VENV)/.made: tests/clients/requirements-transformers4.txt
	@echo "Installing transformers 4 and torch into $(TRANSFORMERS4_VENV)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -c $< \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find dernkit tests benchmarks plugins docs -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv:
	rm -rf $(VENV) $(CLIENTS_VENV) $(TRANSFORMERS4_VENV)
