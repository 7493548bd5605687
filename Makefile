# `make quickstart` and `make test` need only python3 (3.11+) and the network to PyPI: each sets up $(VENV) by itself.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install quickstart test check served soak gpu gpu-bundle compat clean
install: $(VENV)/installed

# In a clone that was moved the environment's scripts name the old place, and so does the editable install.
ifneq ($(shell head -n 1 $(VENV)/installed 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/installed
endif
# Who names another build of PyTorch wants it in place of the one that is there.
ifeq ($(origin TORCH),command line)
ifneq ($(shell sed -n 2p $(VENV)/installed 2>/dev/null),$(TORCH))
.PHONY: $(VENV)/installed
UNINSTALL_TORCH := $(BIN)/pip uninstall --quiet --yes torch
endif
endif
RECENT = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
USABLE = $(BIN)/python $(RECENT) 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1 && head -n 2 $(BIN)/pip 2>/dev/null | grep -qF "$(abspath $(BIN))"

# .venv is made anew where it is too old or from another place and ours (`installed`), and gets pip where it has none (Ctrl-C in the
# middle, uv). Another one is taken as it is, or made where nothing is.
# torch first: packages that build against it then find it, and pip does not pick another build for a dependency.
$(VENV)/installed: setup.py constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@{ $(USABLE); } || { [ "$(VENV)" != .venv ] && [ -e "$(VENV)" ]; } || { \
		$(PYTHON) $(RECENT) || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed; name another: make install PYTHON=python3.12" >&2; exit 2; }; \
		$(PYTHON) -m venv $$([ ! -e .venv/installed ] || [ "$(VENV)" != .venv ] || echo --clear) $(VENV); }
	@{ $(USABLE); } || { echo "error: $(VENV) is no environment of Python 3.11 or newer with pip that was made at this place; remove it, or name another: make install VENV=DIR" >&2; exit 2; }
	$(UNINSTALL_TORCH)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@printf '%s\n' "$(CURDIR)" "$(TORCH)" > $@

# The PATH stays the user's: its last words say what has to be typed before `python` finds this environment.
quickstart: install
	@$(BIN)/python launch/quickstart.py

# Two processes: one takes the tests with ranks of their own, one after the other, the other one the rest (tests/conftest.py).
# What fails gets a second try, alone: on a busy machine a process that is to be killed in its start may not have started. The
# log names it either way; what fails twice fails.
test: install
	@PATH="$(abspath $(BIN)):$$PATH"; pytest() { $(BIN)/python -m pytest "$$@" $(PYTEST_ARGS); }; pytest --numprocesses 2 --no-loadscope-reorder --durations 10 || { \
		[ $$? = 1 ] && echo "A second try for each test that failed:" && \
		pytest --verbose --last-failed --last-failed-no-failures none --maxfail 3; }

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy model data launch tests/reference.py

# Exports in vLLM, its server and lm-eval, and with SERVED_ARGS="--llama_cpp DIR" in llama.cpp, each in an environment of its own
# below runs/served (5 GB on disk). Eleven minutes on two cores with other work on them, 5 of CPU time, downloads included.
served: install
	$(BIN)/python tests/served/compare_all.py $(SERVED_ARGS)

# Every fault test with a table of what struck at the end, then what else is too slow for CI. About an hour on two cores.
soak: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m "not gpu" tests/faults $(PYTEST_ARGS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m slow --ignore tests/faults $(PYTEST_ARGS)

# Everything that one GPU can show, at most a quarter of an hour and its last station: kernels against fp32, training, resume,
# conversions, export, compilation, a profile, benchmarks, and the roofline's prediction beside what was measured.
gpu: install
	$(BIN)/python tests/gpu/acceptance.py $(GPU_ARGS)

# The same for a machine without a network: wheels, sources and a script, in build/gpu-bundle; BUNDLE_ARGS="--python 3.11"
# for that Python there.
gpu-bundle: install
	$(BIN)/python tests/gpu/bundle.py $(BUNDLE_ARGS)

# The oldest, the tested and the newest PyTorch and transformers, each in an environment of its own. Downloads some 10 GB.
compat: install
	$(BIN)/python tests/compat/versions.py $(COMPAT_ARGS)

# Only what the targets above make again, and not what `gpu` measured on a card that may be gone: users' runs lie in runs/ too,
# and VENV may name an environment of their own, which .venv is as well until `installed` is in it.
clean:
	rm -rf $(if $(filter .venv,$(VENV)),$(if $(wildcard .venv/installed),.venv)) runs/quickstart runs/served build *.egg-info .pytest_cache .ruff_cache .mypy_cache
