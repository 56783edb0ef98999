# make demo    train, evaluate and look, from nothing, in minutes
# make test    the tests            make check   lint, types and tests
# make sweep   gate all 130 networks of docs/coverage.md, some fifteen minutes on two cores
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN := runs/demo

.PHONY: demo test sweep check lint types format clean

demo: $(VENV)/.installed
	$(BIN)/gaternet train digits_resnet20_gated --out $(RUN) $(if $(wildcard $(RUN)/config.json),--resume)
	$(BIN)/gaternet evaluate $(RUN)
	$(BIN)/python examples/save_digits.py $(RUN)/images
	$(BIN)/gaternet predict $(RUN) $(RUN)/images/*.png --top 2
	$(BIN)/gaternet report $(RUN)
	@echo
	@echo "The trained model is in $(RUN)/last. Next: $(BIN)/gaternet --help, the README, docs/method.md"
	@echo "See its gates in a browser: $(RUN)/report/index.html"

test: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4

sweep: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 -m "slow or not slow" tests/test_coverage.py

check: lint types test

lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developer
	$(BIN)/pyright

format: $(VENV)/.developer
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(RUN)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): PyTorch and the rest are large, this takes a minute or more ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@
