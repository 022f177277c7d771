# `make demo` and `make test` are all that a fresh machine with Python 3.11 needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: demo test test-t5x lint experiments bench clean

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# The whole story on embedded data: pretrain, adapt, fine-tune, evaluate, compare.
demo: $(INSTALLED)
	$(RUN) -m diffusion_t5x.experiments --run demo

# The same comparison over three task families and both architectures.
experiments: $(INSTALLED)
	$(RUN) -m diffusion_t5x.experiments --run families

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .

test: lint
	$(RUN) -m pytest

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
