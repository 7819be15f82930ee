# Everything a newcomer types. Each target sets up by itself what it needs, in any order.
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
RECIPE ?= jobs/recipes/demo.yaml

.PHONY: help sweep check-demo test test-quick test-chaos bench-quality lint format clean
.DEFAULT_GOAL := help

help: ## these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

sweep: $(VENV)/.run ## train, compare and publish the dictionaries of RECIPE (default: the demo); FRESH=1 starts anew
	@$(PY) jobs/sweep.py $(RECIPE) $(if $(FRESH),--fresh)

check-demo: sweep ## hold the demo's figures against their targets
	@$(PY) tests/check_demo.py runs/demo/summary.json

test: $(VENV)/.dev ## all tests but those of test-chaos, the real Gemma 3 270M included (minutes)
	$(PY) -m pytest -m "not chaos"

test-chaos: $(VENV)/.dev ## sweeps on other meshes, machines and stores; what is killed on the way (minutes more)
	$(PY) -m pytest -m chaos $(CHAOS)

test-quick: $(VENV)/.dev ## the tests that need seconds
	$(PY) -m pytest -m "not slow and not chaos"

bench-quality: $(VENV)/.dev ## FVU and dead latents beside SAELens and dictionary_learning on the same rows (hours; resumes)
	$(PY) tests/bench/quality/run.py $(QUALITY)

lint: $(VENV)/.dev ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.dev ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove the environment and all runs
	rm -rf $(VENV) runs reports

# torch first: by its exact version it comes as it is offered for this machine, and nothing later replaces it.
$(VENV)/.run: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once, some minutes)"
	@python3 -m venv $(VENV)
	@$(PIP) install torch==2.13.0
	@$(PIP) install -c constraints.txt -e .
	@$(PIP) check
	@touch $@

# DeepSpeed's build looks at the torch that is there, and none of its own operators are used.
$(VENV)/.dev: $(VENV)/.run
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PIP) install --no-build-isolation -c constraints.txt -e ".[sharded]"
	@$(PIP) check
	@touch $@
