# On a machine with only Python 3.11-3.13 and make, `make demo` and `make test`
# set up .venv by themselves; each install step leaves a stamp in it and is not
# run again until pyproject.toml or this file changes.

PYTHON = python3
VENV = .venv
BACKEND ?= jax
ARGS =

# What pip installs for each backend. They pass through the shell: quote a
# range twice, as in JAX="'jax>=0.10'".
JAX = jax
# Pinned, since pip takes a CPU build of exactly this release where one is
# offered; plain `torch` on Linux brings gigabytes of CUDA along.
TORCH = torch==2.13.0
# The CPU build has a name of its own, and exists for one platform.
ifeq ($(shell uname -sm),Linux x86_64)
TENSORFLOW = tensorflow-cpu
else
TENSORFLOW = tensorflow
endif

BACKENDS = jax torch tensorflow
ifeq ($(filter $(BACKEND),$(BACKENDS)),)
$(error BACKEND must be one of: $(BACKENDS). Received: BACKEND=$(BACKEND))
endif

PY = $(VENV)/bin/python
DONE = $(VENV)/done

.NOTPARALLEL:  # two pips at work in one environment break it
.PHONY: help demo test test-jax test-torch test-tensorflow lint clean

help:
	@echo 'make demo [BACKEND=jax|torch|tensorflow] [ARGS=...]'
	@echo '                 train a small MoE on handwritten digits'
	@echo 'make test        all tests on all three backends'
	@echo 'make test-jax    all tests on one backend (or test-torch, test-tensorflow)'
	@echo 'make lint        ruff check and ruff format --check'
	@echo 'make clean       remove $(VENV), dist and caches'
	@echo 'Another Python: PYTHON=python3.12. Arguments for pytest: ARGS="-k router -x".'

demo: $(DONE)/project $(DONE)/group-demo $(DONE)/$(BACKEND)
	$(PY) examples/vision/digits_moe.py --backend $(BACKEND) $(ARGS)

test: $(DONE)/project $(DONE)/group-test $(DONE)/keras-hub \
		$(BACKENDS:%=$(DONE)/%)
	$(PY) -m tests $(ARGS)

test-jax test-torch test-tensorflow: test-%: \
		$(DONE)/project $(DONE)/group-test $(DONE)/keras-hub $(DONE)/%
	$(PY) -m tests --backends $* $(ARGS)

lint: $(DONE)/group-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,WHAT TO SAY,PIP ARGUMENTS)
# A pip that was killed can leave a package that looks installed but is not
# whole; it lacks the INSTALLER file, and without its records pip redoes it.
define install
@printf '\n>> Installing %s into $(VENV)\n' '$(1)'
@for info in $(VENV)/lib/python3*/site-packages/*.dist-info; do \
	[ ! -d "$$info" ] || [ -f "$$info/INSTALLER" ] || rm -rf "$$info"; done
$(PY) -m pip install $(2)
@touch $@
endef

$(DONE)/jax: SPEC = $(JAX)
$(DONE)/torch: SPEC = $(TORCH)
$(DONE)/tensorflow: SPEC = $(TENSORFLOW)
$(BACKENDS:%=$(DONE)/%): $(DONE)/venv pyproject.toml Makefile
	$(call install,$(SPEC) (hundreds of MB: this can take minutes),$(SPEC))

$(DONE)/project: $(DONE)/venv pyproject.toml Makefile
	$(call install,keras_moe and Keras (this can take a minute),-e .)

# Without what it asks for: tensorflow-text, which it can do without, would
# bring a second TensorFlow. The group `test` has the rest.
$(DONE)/keras-hub: $(DONE)/venv pyproject.toml Makefile
	$(call install,keras-hub,--no-deps 'keras-hub>=0.32')

$(DONE)/group-%: $(DONE)/venv pyproject.toml Makefile
	$(call install,what `make $*` needs,--group $*)

# Without its stamp an environment is half made, so it is made anew; but one
# that was not begun here is somebody's own.
$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
		{ echo 'This needs Python 3.11, 3.12 or 3.13, and `$(PYTHON)` is:' \
		"$$($(PYTHON) --version 2>&1 || true)." \
		'Name another one, as in: make test PYTHON=python3.12'; exit 1; } >&2
	@[ ! -e $(VENV) ] || [ -d $(DONE) ] || { echo '$(VENV) was not made by' \
		'this Makefile. Remove it, or choose another: VENV=.venv-make'; \
		exit 1; } >&2
	@printf '\n>> Creating $(VENV)\n'
	@rm -rf $(VENV) && mkdir -p $(DONE)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install 'pip>=25.1'  # the first with --group
	@touch $@
