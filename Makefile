# `make quickstart` and `make test` need only python3 (3.11+) and the network to PyPI: each sets up $(VENV) by itself.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install quickstart test check soak gpu clean
install: $(VENV)/installed

# torch first: packages that build against it then find it, and pip does not pick another build for a dependency.
$(VENV)/installed: setup.py constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python launch/quickstart.py

test: install
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy model data

# Every fault test with a table of what struck at the end, then what else is too slow for CI. About an hour on two cores.
soak: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m "not gpu" tests/faults $(PYTEST_ARGS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m slow --ignore tests/faults $(PYTEST_ARGS)

# Everything that a GPU can show, in one command and within ten minutes: kernels against fp32, then ours beside the peers.
gpu: install
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs a CUDA device; make test is for CPUs')"
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)
	$(BIN)/python launch/benchmark.py attention
	$(BIN)/python launch/benchmark.py loss
	$(BIN)/python launch/benchmark.py moe
	$(BIN)/python launch/benchmark.py step --model 800m --sequence_length 2048 --deepspeed_config ds_configs/ep1_zero2.json

clean:
	rm -rf $(VENV) runs *.egg-info .pytest_cache .ruff_cache .mypy_cache
