# make demo   from nothing to a trained and tested equilibrium model
# make test   from nothing to a passed test suite
# make check  the linter and the type checker
# make weights  train and publish the weights that ship in checkpoints/; FORCE=1 replaces those that are there

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/tanh_deq_digits.yaml

.PHONY: demo test check weights clean

demo: $(VENV)/installed
	$(BIN)/python cli.py fit -c $(CONFIG)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

weights: $(VENV)/installed
	$(BIN)/python cli.py fit -c $(CONFIG) $(ARGS) --trainer.accelerator cpu --trainer.logger.name published
	$(BIN)/python examples/publish_weights.py $(if $(FORCE),--force) \
		"$$(ls -td runs/published/version_*/checkpoints/best.ckpt | head -n 1)"

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
