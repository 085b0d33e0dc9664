# make demo       fine-tune real weights on real images, print and plot the result
# make test       the tests, but for the slow ones
# make test-all   every test that needs no GPU
# make test-avx2  the numerical tests as on a processor without AVX-512
# make test-portable  the same by the kernels that every processor can run
# make test-tutorial  the tutorial's commands, from the page; takes minutes, and needs its images
# make test-ptx   the tests of the Triton kernels on the PTX that Triton compiles, executed without a GPU
# make test-binaries  the Triton kernels compiled for every card: registers, shared memory, spills
# make test-launches  their launches, on a stub of the CUDA driver
# make lint       ruff, mypy and clang-format
# make docs       the documentation site, into build/docs; fails on a broken link or name
# make docs-version VERSION=1.2 ALIAS=latest   the same, committed to the branch gh-pages as that version's
# make bench      every benchmark, against peers in the same run; to runs/bench
# make bench-all OUT=bench/results/MACHINE   the same into that folder, then the documentation's tables
# make tables     the documentation's tables of benchmarks, from bench/results, and their history, from git
# make bench-quick   the small ones, to compare with a saved run
# make gpu OUT=DIR   on a machine with a GPU: its tests, all benchmarks, a sweep of launch shapes
# make gpu-cache OUT=DIR  without a GPU: the binaries that its tests need there
# make release-check   builds and checks what a release publishes; TAG=v1.2.3 for the tag itself
# make lock       the versions that the workflows install, into .github/constraints.txt
# make sanitize   the C++ kernels' own tests under the address, undefined and thread sanitizers
# make aarch64    the same tests, built for 64-bit Arm and run in an emulator
# make hub OUT=DIR   the kernel for Hugging Face's Hub; to build/hub; needs no virtual environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := pyproject.toml CMakeLists.txt $(wildcard $(addprefix gist_kernels/csrc/,*.cpp *.h kernels/*.cpp kernels/*.h))

# Tests run on all cores, each with one thread.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal
# Of our kernels, oneDNN, MKL and PyTorch's own.
AVX2 := GIST_KERNELS_INSTRUCTIONS=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
  ATEN_CPU_CAPABILITY=avx2

.PHONY: demo test test-all test-avx2 test-portable test-tutorial test-ptx test-binaries
.PHONY: test-launches lint bench bench-all bench-quick tables release-check lock
.PHONY: gpu gpu-cache sanitize aarch64 clean
.PHONY: docs docs-version hub  # folders have names of these too

demo: $(VENV)/.installed-demo
	$(BIN)/gist demo $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m "triton and not slow" $(or $(ARGS),tests/gist_kernels/kernels/triton tests/gist/fusion)

test-all: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m triton $(ARGS)

NUMERICAL := $(PYTEST) -m "not triton and not slow" $(or $(ARGS),tests/gist_kernels tests/gist/fusion \
  --ignore=tests/gist_kernels/kernels/triton)

test-avx2: $(VENV)/.installed-dev
	$(AVX2) $(NUMERICAL)

test-portable: $(VENV)/.installed-dev
	GIST_KERNELS_INSTRUCTIONS=portable $(NUMERICAL)

test-tutorial: $(VENV)/.installed-dev
	GIST_TEST_TUTORIAL=1 $(BIN)/python -m pytest tests/test_tutorial.py $(ARGS)

# GIST_TEST_PTX=90 for that architecture, GIST_TEST_PTX_SEED=1 for programs and warps in another order.
test-ptx: export GIST_TEST_PTX ?= 80
test-ptx: $(VENV)/.installed-dev
	$(PYTEST) -m triton $(ARGS)

test-binaries: $(VENV)/.installed-dev
	$(BIN)/python bench/binaries.py $(ARGS)

test-launches: $(VENV)/.installed-dev
	$(PYTEST) tests/gist_kernels/kernels/triton/test_stub_driver.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(addprefix gist_kernels/csrc/,*.cpp *.h */*.cpp */*.h))

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Nothing is pushed, unless ARGS=--push asks for it.
docs-version: docs
	$(if $(VERSION),,$(error name the version: make docs-version VERSION=1.2))
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" mike deploy --update-aliases $(ARGS) $(VERSION) $(ALIAS)
	$(if $(filter latest,$(ALIAS)),NO_MKDOCS_2_WARNING=1 $(BIN)/mike set-default $(ARGS) latest)

bench: $(VENV)/.installed-bench
	$(BIN)/gist bench $(ARGS)

bench-all: $(VENV)/.installed-bench
	$(if $(OUT),,$(error name the folder of this machine: make bench-all OUT=bench/results/MACHINE))
	$(BIN)/gist bench --out $(OUT) $(ARGS)
	$(BIN)/python -m bench.tables
	$(BIN)/python -m bench.history

tables: $(VENV)/.installed-bench
	$(BIN)/python -m bench.tables
	$(BIN)/python -m bench.history

bench-quick: $(VENV)/.installed-bench
	$(BIN)/python -m pytest bench/test_quick.py --benchmark-columns=median,iqr,rounds \
	  --benchmark-storage=runs/bench-quick --benchmark-autosave $(ARGS)

# Without a virtual environment of its own: such a machine may have no network to fill one.
gpu:
	$(PYTHON) -m bench.visit $(or $(OUT),runs/gpu) $(ARGS)

# Triton's cache, filled by the launches of make gpu. No result is compared, and tests may fail.
gpu-cache: $(VENV)/.installed-dev
	TRITON_CACHE_DIR=$(abspath $(or $(OUT),runs/gpu-cache)) PYTHONPATH=tests/support \
	  PYTHONOPTIMIZE=1 $(PYTEST) -q --tb=no --no-header -r N --assert=plain \
	  -p stub_driver.plugin -p no:cacheprovider --hypothesis-seed=0 -m gpu \
	  $(or $(ARGS),tests/gist_kernels tests/support/stub_driver/check_benchmarks.py)

release-check: $(VENV)/.installed-release
	$(BIN)/python release/check.py $(if $(TAG),--tag $(TAG)) $(ARGS)

# PyTorch, its CUDA libraries and Triton are left out: the workflows choose among builds of these.
lock: $(VENV)/.installed-release
	mkdir -p build
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --upgrade --no-header --no-annotate \
	  --no-emit-index-url $(addprefix --extra ,dev docs) --group release \
	  $(addprefix --no-emit-package ,torch torchvision triton) | grep -Ev '^(nvidia|cuda)' > build/constraints.txt
	mv build/constraints.txt .github/constraints.txt

hub:
	$(PYTHON) release/hub/export.py $(or $(OUT),build/hub) $(ARGS)

sanitize: $(VENV)/.installed-dev build/sanitize-address,undefined build/sanitize-thread

build/sanitize-%: FORCE
	$(BIN)/cmake -S . -B $@ -DGIST_KERNELS_SANITIZE=$* -DCMAKE_BUILD_TYPE=None
	$(BIN)/cmake --build $@
	$(BIN)/ctest --test-dir $@ --verbose

# Of the virtual environment it needs CMake only.
aarch64: $(BIN)/cmake
	$(BIN)/cmake -S . -B build/aarch64 -DGIST_KERNELS_TESTS=ON -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  '-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu'
	$(BIN)/cmake --build build/aarch64
	$(BIN)/ctest --test-dir build/aarch64 --verbose

FORCE:

# One stamp an extra; made again when the build's inputs change, so the native module stays current.
# Built by the environment's own tools, in build/: only what has changed is compiled again.
# Bytecode is left to a module's first import: pip would compile 19,000 files, on one core.
$(VENV)/.installed-%: $(NATIVE) | $(BIN)/python
	@echo "Installing into $(VENV); PyTorch takes about 6 GB and, the first time, some minutes."
	$(BIN)/python -m pip install --quiet --no-compile 'scikit-build-core>=0.10' 'nanobind>=2.4' 'cmake>=3.18' ninja
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable '.[$*]'
	touch $@

# Neither PyTorch nor a build of the package.
$(VENV)/.installed-release: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group release
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/cmake: | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'cmake>=3.18'

clean:
	rm -rf build runs $(VENV)
