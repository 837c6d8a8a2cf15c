# make demo     phantom patients -> slices -> training -> samples and pictures, in demo/
# make test     all tests
# make lint     style and lint
# make venv     only the virtual environment, which the other targets make by themselves
#
# PYTHON        the interpreter to build the environment with (3.10 or newer)
# TORCH_INDEX   package index for torch alone, e.g. one that holds CPU-only builds

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?=
VENV ?= .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready-torch-$(TORCH_VERSION)

.PHONY: demo test lint format venv clean-demo

test: $(READY)
	$(RUN) -m pytest -n 2

demo: $(READY)
	$(RUN) scripts/demo.py --out_dir demo

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

venv: $(READY)

clean-demo:
	rm -rf demo

# The mark names what was installed; a second call finds it and installs nothing.
$(READY): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; name another: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==$(TORCH_VERSION) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(RUN) -m pip install --quiet --editable '.[plots,test]'
	touch $@
