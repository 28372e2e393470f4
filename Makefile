# make demo | test | test-slow | lint | docs | bench | measurements    Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and alone: the version of the constraints file has a build for CPUs only
PIP_TORCH := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
PIP_REST := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
OTHER_TRANSFORMERS := 4.57.6 5.0.0
OTHER_TRANSFORMERS_TESTS := $(patsubst %,tests/test_%.py,hf moe embedding checkpoint cache chat)
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard qins_ext/*)

.PHONY: demo test test-python test-transformers test-core test-sdist test-wheel test-slow lint docs bench measurements clean

demo: $(VENV)/installed
	$(BIN)/qins demo $(if $(MODEL),--model $(MODEL)) $(DEMO_ARGS)

test: test-core test-python test-transformers test-sdist test-wheel

# the Python suite under each instruction set that runs here, the best one first
test-python: $(VENV)/installed-dev
	set -e; which="not slow"; for isa in $$($(BIN)/python -c 'import qins; print(*qins.isas())'); do \
	    echo "== Python suite, $$isa"; \
	    QINS_ISA=$$isa $(BIN)/python -m pytest -q -m "$$which" tests; \
	    which="not slow and not once"; \
	done

# other versions of transformers than constraints.txt has, each in a directory that comes first on the path
test-transformers: $(VENV)/installed-dev
	set -e; for version in $(OTHER_TRANSFORMERS); do \
	    echo "== transformers $$version"; \
	    there=$(VENV)/transformers-$$version; \
	    test -e $$there/installed || { \
	        numpy=$$($(BIN)/python -c 'import numpy; print(numpy.__version__)'); \
	        $(BIN)/pip install --quiet --disable-pip-version-check --target $$there transformers==$$version numpy==$$numpy; \
	        touch $$there/installed; \
	    }; \
	    PYTHONPATH=$$there $(BIN)/python -m pytest -q -W ignore -k "not kill and not test_peak_memory[" $(OTHER_TRANSFORMERS_TESTS); \
	done

test-core:
	tests/core/run.sh

test-sdist: $(VENV)/installed-dev
	BIN=$(abspath $(BIN)) tests/sdist.sh

test-wheel: $(VENV)/installed-dev
	BIN=$(abspath $(BIN)) tests/wheel.sh

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m slow tests

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror qins_ext/*.c qins_ext/*.h qins_ext/*.inc tests/core/*.c tests/core/*.h

# the site, in build/docs
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --quiet

bench: $(VENV)/installed-dev
	$(BIN)/qins bench
	$(BIN)/python benchmarks/codec.py

measurements: $(VENV)/installed-dev
	$(BIN)/python benchmarks/measurements.py --write docs/measurements.md

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_TORCH)
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP_REST) -e '.[all]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_REST) -r requirements-dev.txt
	touch $@

# apart from the others: it needs neither torch nor the extension
$(VENV)/installed-docs: requirements-docs.txt constraints.txt
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) build dist out python/*.egg-info python/qins/*.so
