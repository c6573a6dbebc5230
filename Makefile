# `make fit` and `make test` need nothing but Python 3.10-3.13 and pip.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
JOBS ?= 2
# Tiny models gain nothing from threads, and two processes with threads slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help fit resume test test-fast check format tensorboard clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# Rebuilt only when the dependencies change: repeated commands start at once.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "[setup] making $(VENV) (once; some minutes, most of them downloads)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[dev]"
	@touch $@

fit: $(VENV)/.installed ## Set up and run the default experiment
	$(RUN) -m lightning_limber fit

resume: $(VENV)/.installed ## Go on where the newest run stopped
	$(RUN) -m lightning_limber fit --ckpt_path last

tensorboard: $(VENV)/.installed ## Watch the runs
	$(VENV)/bin/tensorboard --logdir runs

test: $(VENV)/.installed ## Set up and run every test
	$(PYTEST)

test-fast: $(VENV)/.installed ## Without the tests marked slow
	$(PYTEST) -m "not slow"

check: $(VENV)/.installed ## Lint, format, types and every test: what CI runs
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(MAKE) test

format: $(VENV)/.installed ## Mend lint and format
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean: ## Remove the environment
	rm -rf $(VENV)
