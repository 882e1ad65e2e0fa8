# Two commands: `make demo` runs the main job, `make test` the tests. Each sets up .venv first if it must.
PYTHON ?= python3
VENV := .venv
RUN := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(VENV)/bin
LAUNCH := $(RUN)/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test lint format install
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: install
	$(RUN)/dist-fair shards demo --out data/demo
	$(LAUNCH) -m dist_fair.train recipe=sfd_gda out=runs/demo

test: install
	$(RUN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
