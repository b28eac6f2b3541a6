# The developer's manual: every recipe is one thing you do here.   make help
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help install test slow fuzz lint format bench goldens ci

help:     ## this list
	@grep -E '^[a-z]+: ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install:  ## a virtual environment with everything the tests need
	python3 -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"

test:     ## the default tests: minutes on two cores, no network
	$(BIN)/pytest

slow:     ## the slow ones: SmolLM2 against llama.cpp's words (tiercel pull smollm2 first)
	$(BIN)/pytest -m slow

fuzz:     ## 20,000 broken files and configs of each kind instead of 2,000
	TIERCEL_FUZZ=20000 $(BIN)/pytest tests/weights/test_mutated_files.py tests/families/test_configs.py

lint:     ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format:   ## what lint would complain about, mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench:    ## the table of the README: against llama.cpp and transformers, in turn (an hour)
	$(BIN)/python benchmarks/cpu.py

goldens:  ## how tests/golden was made (needs llama-cpp-python, see the scripts' heads)
	@head -20 tests/golden/make_llamacpp.py

ci:       ## exactly what CI runs
	bash .ci/run
