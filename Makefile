# Everything runs in .venv, with the versions of constraints.txt. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
# More pytest arguments, such as ARGS="-k parity".
ARGS ?=
# What `make test-versions` runs the tests on: constraints-oldest.txt, and versions of transformers.
VERSIONS ?= oldest 5.18.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0
# For `make gpu` where nothing can be installed: a Python that has torch, transformers and sparing's other dependencies.
GPU_PYTHON ?=
# Cores for benchmarks; tests use as many processes of one thread each.
THREADS ?= 2

threads = OMP_NUM_THREADS=$(1) MKL_NUM_THREADS=$(1) OPENBLAS_NUM_THREADS=$(1) TOKENIZERS_PARALLELISM=false
# Whatever needs a download fails at once instead of waiting for it.
offline = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quant test-versions bench gpu docs lint

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## create .venv with everything that developing needs

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: setup ## the tour: profile two small models, on text and on pictures, report
	$(BIN)/sparing demo --out runs/demo

test: setup ## the tests, offline
	$(call threads,1) $(offline) $(BIN)/python -m pytest -n $(THREADS) --dist worksteal $(ARGS)

test-versions: ## the tests on other versions of transformers (an environment each; slow, by night)
	$(call threads,1) $(offline) $(PYTHON) tests/versions.py $(VERSIONS) --pytest='-q -n $(THREADS) --dist worksteal $(ARGS)'

bench: setup ## the benchmarks on this CPU: executors, ViCA, families, checkpoints, studies, lenses
	$(call threads,$(THREADS)) $(BIN)/python benchmarks/engine.py --json benchmarks/results/engine.json
	$(call threads,$(THREADS)) $(BIN)/python benchmarks/vica.py --json benchmarks/results/vica.json
	$(call threads,1) $(BIN)/python benchmarks/families.py --json benchmarks/results/families.json
	$(call threads,1) $(BIN)/python benchmarks/checkpoints.py --json benchmarks/results/checkpoints.json
	$(call threads,1) $(BIN)/python benchmarks/study.py --json benchmarks/results/study.json
	$(call threads,$(THREADS)) $(BIN)/python benchmarks/embedlens.py --json benchmarks/results/embedlens.json

gpu: $(if $(GPU_PYTHON),,setup) ## time ViCA and the executors on a GPU; with GPU_PYTHON=python3 in a Python that has torch already
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu_vica.py --json benchmarks/results/gpu_vica.json
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu_engine.py --json benchmarks/results/gpu_engine.json

test-quant: setup ## the tests on quantised weights, in .venv-quant: torchao talks in every process that has it
	test -e .venv-quant/.installed || ($(PYTHON) -m venv .venv-quant && \
	  .venv-quant/bin/python -m pip install --quiet -c constraints.txt -e '.[test,quant]' && touch .venv-quant/.installed)
	$(call threads,1) $(offline) .venv-quant/bin/python -m pytest -n $(THREADS) tests/test_around_quantised.py $(ARGS)

docs: setup ## run the examples of README.md and docs/
	$(call threads,$(THREADS)) $(offline) $(BIN)/python docs/check_examples.py

lint: setup ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
