# make demo: fine-tune a real model on real data, scored before and after.   make test: the tests.
PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
RUN := $(VENV)/bin/python
WORKDIR ?= runs/demo
LOCKS := third_party/requirements
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --use-pep517 --require-hashes
PARITY_PYTHON ?= python3.11

# One shard of the long tests, for CI: SHARD=I/N.
SHARD ?= 0/1
PYTEST := $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: bazel lint-bazel check-locks docker-digest docs lint-launch env assets gemma minilm safety-data eval-data demo test test-all test-shard parity optimized lint wheel lock lock-parity
env: $(VENV)/.ready

# First the build backends: packages without a wheel are built with these, not with fetched ones.
# --no-deps: the lock holds everything, and pip before 26 cannot pair pins with extras.
$(VENV)/.ready: $(LOCKS)/build.txt $(LOCKS)/test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; try make PYTHON=python3.12"; exit 2; }
	@echo "Making $(VENV) from $(LOCKS)/test.txt ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -r $(LOCKS)/build.txt
	@$(INSTALL) --no-build-isolation -r $(LOCKS)/test.txt
	@touch $@

assets: env
	@$(RUN) demo/assets.py .cache

# Gemma 3 270M, 253 MB, under the Gemma Terms of Use.
gemma: env
	@$(RUN) demo/gemma.py .cache

# MiniLM, an encoder of sentences, 92 MB.
minilm: env
	@$(RUN) demo/minilm.py .cache

# Sets of stereotypes, toxicity and harmful requests, 22 MB; offensive by design. See docs/safety.md.
safety-data: env
	@$(RUN) demo/safety_data.py .cache

# Sets of the evaluation tables: sentiment of other domains, questions, sums, entities, and Debian's descriptions.
eval-data: env
	@$(RUN) demo/eval_data.py .cache

demo: assets
	@$(RUN) -m ftjax.train --config=configs/sft_sentiment.py --workdir=$(WORKDIR)

test: env
	@$(PYTEST)

# Also what takes long: every mesh, every kill, learning runs; the reference libraries; and make test once more under Bazel, where it can be had.
test-all: env
	@$(PYTEST) --full
	@tests/parity/parity.sh $(RUN) $(PARITY_PYTHON)
	@if third_party/bazel/install.sh; then third_party/bazel/debian.sh $(RUN) test //...; fi

# The golden numbers once more, by torch, transformers, PEFT, TRL and bitsandbytes in an environment of their own; see tests/parity/parity.sh.
parity: env
	@tests/parity/parity.sh $(RUN) $(PARITY_PYTHON)

test-shard: env
	@$(PYTEST) --shard=$(SHARD)

# What computes, compiled as users' programs are.
optimized: env
	@XLA_FLAGS= $(PYTEST) --full tests/parity tests/test_kernels.py tests/test_head.py tests/multidevice/test_context.py

# Bazel of Debian 12 on one quick test of each folder; see docs/bazel.md.
bazel: env
	@third_party/bazel/install.sh
	@third_party/bazel/debian.sh $(RUN) test //:ci

# BUILD files, MODULE.bazel and WORKSPACE by buildifier, which npm installs.
lint-bazel:
	@third_party/bazel/lint.sh

# The digest of the images' base, from an image registry: launch/docker.sh build --digest=...
docker-digest:
	@launch/docker/digest.sh $(IMAGE)

lint: env
	@$(RUN) -m ruff format --check . && $(RUN) -m ruff check .

LINT_VENV ?= .venv-lint
$(LINT_VENV)/.ready: $(LOCKS)/lint.txt
	@$(PYTHON) -m venv $(LINT_VENV)
	@$(LINT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes -r $<
	@touch $@

# shellcheck, yamllint and hadolint on all scripts, YAML files and Dockerfiles; x86-64 alone has wheels of them.
lint-launch: $(LINT_VENV)/.ready
	@PATH="$(abspath $(LINT_VENV))/bin:$$PATH" third_party/lint.sh

# Installs each lock in empty environments of Python 3.11 to 3.13, and resolves it for other machines; about an hour. See docs/building.md.
check-locks: env
	@$(RUN) third_party/check_locks.py $(CHECK)

# The wheel, the source archive, the bill of materials and SHA256SUMS of the commit, into dist/. The same commit gives the same bytes.
wheel: env
	@third_party/wheel.sh $(RUN) dist

# The documentation as a static site, build/site/index.html; a broken link or anchor fails it. In an environment of its own.
docs: $(DOCS_VENV)/.ready
	@$(DOCS_VENV)/bin/python docs/site/build.py build/site

$(DOCS_VENV)/.ready: $(LOCKS)/docs.txt
	@echo "Making $(DOCS_VENV) from $(LOCKS)/docs.txt ..."
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(LOCKS)/docs.txt
	@touch $@

# Needs uv; rewrites the hash-locked requirements, each for every supported Python, x86-64 and aarch64. LOCK=--upgrade for the newest versions.
lock:
	third_party/lock.sh $(LOCK)

# The same for the reference libraries; uv must find torch's CPU build (UV_FIND_LINKS or UV_INDEX).
lock-parity:
	uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header third_party/requirements/parity.in -o third_party/requirements/parity.txt
