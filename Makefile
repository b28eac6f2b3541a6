# The developer's manual: every recipe is one thing you do here.   make help
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help install test slow fuzz reliability isas sanitize lint format docs bench goldens page clients ci

help:     ## this list
	@grep -E '^[a-z]+: ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install:  ## a virtual environment with everything the tests need
	python3 -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"

test:     ## the default tests: minutes on two cores, no network
	$(BIN)/pytest -n 2 --dist loadfile

slow:     ## the slow ones: SmolLM2 against llama.cpp's words (tiercel pull smollm2 first)
	$(BIN)/pytest -m slow

fuzz:     ## 20,000 broken files and configs of each kind instead of 2,000
	TIERCEL_FUZZ=20000 $(BIN)/pytest tests/weights/test_mutated_files.py tests/families/test_configs.py

reliability: ## every goal of docs/reliability.md at full scale, into its table (hours; continues where it was interrupted)
	$(BIN)/python tests/reliability/campaign.py

isas:     ## the tests of the kernels and the network on torch alone and on the portable path
	for isa in torch portable; do TIERCEL_ISA=$$isa $(BIN)/pytest -n 2 --dist loadfile tests/model tests/mixers tests/ops tests/test_generate.py || exit 1; done

sanitize: ## the tests of the kernels under the address and undefined behaviour sanitizers (ten minutes)
	$(BIN)/pip install -q -c constraints.txt nanobind cmake ninja
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DTIERCEL_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/sanitize
	mkdir -p build/sanitized && cp -r src/tiercel build/sanitized/ && cp build/sanitize/_native*.so build/sanitized/tiercel/ops/cpu/
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(BIN)/python -c "import sys, pytest; \
	  sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; \
	  sys.path.insert(0, 'build/sanitized'); sys.exit(pytest.main(['tests/ops', 'tests/mixers', 'tests/model', '-s', '-k', 'not memory_is_flat']))"  # freed memory is kept back here

lint:     ## ruff, mypy, and which part may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format:   ## what lint would complain about, mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs:     ## the documentation site in site/ (make docs, then open site/index.html)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

bench:    ## the table of the README: against llama.cpp and transformers, in turn (an hour)
	$(BIN)/python benchmarks/cpu.py

clients:  ## programs of others against the server, each installed beside; writes docs/clients.md (needs the registries)
	PYTHONPATH=tests $(BIN)/pytest -m slow tests/clients

page:     ## the libraries of the chat page again, from web/package-lock.json (needs node and npm)
	cd web && npm ci --ignore-scripts --no-audit --no-fund && node build.mjs

goldens:  ## how tests/golden was made (needs llama-cpp-python, see the scripts' heads)
	@head -20 tests/golden/make_llamacpp.py

ci:       ## exactly what CI runs
	bash .ci/run
