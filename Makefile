# `make demo` and `make test` are all a fresh machine needs: both make .venv and install the project first.
# Modules are compiled once, not once for every process that tests start.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= outputs/demo

.PHONY: demo test test-long lint install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.10 or later is needed, found {v[0]}.{v[1]}: make PYTHON=python3.12" if v < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[test]"
	touch $@

demo: install
	$(BIN)/python scripts/compare_methods.py --config configs/cifar10-small.yml --use_pretrained --methods nearest quick --weight_bit 4 --act_bit 8 --a_sym --split --outdir $(OUT)

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

# Processes killed at random, and more combinations of what `make test` shows once each.
test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m long tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
