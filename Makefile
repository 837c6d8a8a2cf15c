# make demo     phantom patients -> slices -> training -> samples, pictures, report, in demo/
# make test     all tests
# make soak     a training is killed 300 times, on two processes 30 times; about 20 minutes
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

.PHONY: demo test soak lint format venv clean-demo

test: $(READY)
	$(RUN) -m pytest -n 2 --dist worksteal

# The files of a run that was killed again and again against those of one that was not.
soak: $(READY)
	OMP_NUM_THREADS=1 $(RUN) tests/soak.py --kills 300
	OMP_NUM_THREADS=1 $(RUN) tests/soak.py --kills 30 --processes 2

# Each step is made once; an interrupted one is continued by the next call.
DEMO = demo
DEMO_STEPS = 750
DEMO_MODEL = $(DEMO)/run/ema_0.99_000$(DEMO_STEPS).pt

demo: $(DEMO)/grid.png $(DEMO)/loss.png $(DEMO)/evaluation
	@echo "Look at $(DEMO)/grid.png (real beside synthetic), $(DEMO)/samples, $(DEMO)/loss.png"
	@echo "and $(DEMO)/evaluation/report.html"

$(DEMO)/cases: | $(READY)
	$(RUN) scripts/brats_phantom.py --out_dir $@.making --patients 16 --seed 0
	mv $@.making $@

$(DEMO)/slices: | $(DEMO)/cases
	$(RUN) scripts/brats_prepare.py --brats_dir $(DEMO)/cases --out_dir $@ --channels T1CE,Seg

$(DEMO_MODEL): | $(DEMO)/slices
	$(RUN) scripts/image_train.py --data_dir $(DEMO)/slices --channels T1CE,Seg \
		--out_dir $(DEMO)/run --resume_checkpoint latest --max_steps $(DEMO_STEPS) \
		--image_size 64 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1,2,4 \
		--attention_resolutions 8 --num_heads 1 --preset brats \
		--batch_size 8 --lr 2e-3 --lr_anneal_steps $(DEMO_STEPS) --ema_rate 0.99 \
		--save_interval 250 --sample_interval 375 --sample_respacing 50

$(DEMO)/samples: | $(DEMO_MODEL)
	$(RUN) scripts/image_sample.py --model_path $(DEMO_MODEL) --sample_dir $@ \
		--num_samples 16 --batch_size 16

$(DEMO)/grid.png: | $(DEMO)/samples
	$(RUN) scripts/figures.py compare --real $(DEMO)/slices --samples $(DEMO)/samples --out $@ --num 12

$(DEMO)/loss.png: | $(DEMO)/samples
	$(RUN) scripts/figures.py loss --progress $(DEMO)/run/progress.csv --out $@

$(DEMO)/evaluation: | $(DEMO)/samples
	$(RUN) scripts/image_eval.py --real $(DEMO)/slices --samples $(DEMO)/samples --out_dir $@

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

venv: $(READY)

clean-demo:
	rm -rf $(DEMO)

# The mark names what was installed; a second call finds it and installs nothing.
$(READY): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; name another: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==$(TORCH_VERSION) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(RUN) -m pip install --quiet --editable '.[plots,test]'
	touch $@
