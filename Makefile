# Everything a newcomer types. Each target sets up by itself what it needs, in any order.
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
RECIPE ?= jobs/recipes/demo.yaml
RUNS ?= 20
CATALOG ?= runs/demo/published
PORT ?= 8000
MODEL ?= package:gemma-3-270m
SECONDS ?= 300

.PHONY: help sweep serve check-demo test test-quick test-real test-chaos test-serve test-gpu bench bench-check bench-quality bench-stream bench-gpu lint format clean
.DEFAULT_GOAL := help

help: ## these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

sweep: $(VENV)/.run ## train, compare and publish the dictionaries of RECIPE (default: the demo); FRESH=1 starts anew
	@$(PY) jobs/sweep.py $(RECIPE) $(if $(FRESH),--fresh)

serve: $(VENV)/.run ## answer on what the demo published; prints a token and calls (CATALOG=folder, MODEL=folder or name, PORT=8000)
	@$(PY) -m serve --catalog $(CATALOG) --port $(PORT) \
	  $(if $(MODEL),--model $$($(PY) jobs/fetch.py $(MODEL) | tail -n 1) --model-name $(MODEL:package:%=google/%))

check-demo: sweep ## hold the demo's figures against their targets
	@$(PY) tests/check_demo.py runs/demo/summary.json

test: $(VENV)/.dev ## all tests but those of test-real and test-chaos (minutes)
	$(PY) -m pytest -m "not real and not chaos" --durations=20 --durations-min=5

test-real: $(VENV)/.dev ## the tests on the real Gemma 3 270M, and another reader of what it gave (minutes)
	$(PY) -m pytest -m real --durations=5

test-chaos: $(VENV)/.dev ## everything is killed, filled up or cut off, and the table of faults (hours; RUNS=2: fewer)
	@$(PY) -m tests.chaos.table begin
	@SCOPEWORKS_CHAOS_RUNS=$(RUNS) $(PY) -m pytest -m "chaos or faults" $(CHAOS); \
	status=$$?; $(PY) -m tests.chaos.table && exit $$status

test-serve: $(VENV)/.dev ## the endpoint under load, attack and faults, and its table (an hour; SECONDS=10: minutes)
	@$(PY) -m tests.serve.figures --seconds $(SECONDS)

test-quick: $(VENV)/.dev ## the tests that need seconds
	$(PY) -m pytest -m "not slow and not real and not chaos"

bench-quality: $(VENV)/.dev ## FVU and dead latents beside SAELens and dictionary_learning on the same rows (hours; resumes)
	$(PY) tests/bench/quality/run.py $(QUALITY)

bench: $(VENV)/.dev .venv-peers/.done ## a training step beside its floor and beside four other trainers (an hour; BENCH="--rows 2048 …")
	@$(PY) tests/bench/speed/run.py --peers .venv-peers/bin/python $(BENCH)

bench-check: $(VENV)/.dev ## the same without the others, failing where it falls behind what is accepted (minutes)
	@$(PY) tests/bench/speed/run.py --check --widths 16384 --rows 2048 $(BENCH)

bench-stream: $(VENV)/.dev ## what Ray, exchange, windows and resuming cost, and memory beside its plan (minutes)
	@$(PY) tests/bench/stream/run.py $(STREAM)

test-gpu: $(VENV)/.dev ## the tests that need a CUDA device, and the Triton kernels on it
	$(PY) -m pytest tests/gpu tests/sae/kernels/test_triton.py

bench-gpu: $(VENV)/.dev ## milliseconds of a step on a CUDA device, beside its floor and a compiled dense step
	$(PY) -m tests.bench.gpu $(GPU)

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

# Other trainers, whose pins clash with ours: dictionary-learning's nnsight with all others.
.venv-peers/.done: tests/bench/speed/environment.txt
	@echo "setting up .venv-peers (once, some minutes)"
	@python3 -m venv .venv-peers
	@.venv-peers/bin/python -m pip --disable-pip-version-check -q install torch==2.13.0
	@.venv-peers/bin/python -m pip --disable-pip-version-check -q install -r $<
	@.venv-peers/bin/python -m pip --disable-pip-version-check -q install --no-deps dictionary-learning==0.1.0
	@touch $@
