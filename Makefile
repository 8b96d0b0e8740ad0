# make demo   the whole pipeline on an embedded small model     make test   the whole suite
# make check  format, lint, types     make bench  CPU benchmarks     make gpu  everything worth ten minutes of a GPU

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUTPUT ?= runs/demo
TESTS  ?= tests

# A torch of the base interpreter that is new enough (a GPU build, say) is kept, with the triton it came with; else
# the pinned ones are installed.
HAS_TORCH = import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))

.PHONY: demo test check format bench gpu clean

demo: $(VENV)/.ready
	$(BIN)/lcdd demo --output_dir $(OUTPUT)

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run --effort 0.4

gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run --device cuda

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.ready: pyproject.toml requirements.txt setup.py CMakeLists.txt $(wildcard lcdd_kernels/csrc/*)
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && { $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || $(BIN)/pip install -q torch==2.13.0; }; fi
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ `uname` != Linux ] || $(BIN)/pip install -q triton==3.9.0
	$(BIN)/pip install -q -r requirements.txt 'setuptools>=77' wheel
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info lcdd_kernels/*.so
