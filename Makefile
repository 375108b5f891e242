# make demo: the whole path on the bundled teacher, offline. make test: linter and tests, on the newest versions tried.
VENV   := .venv
LOWEST := .venv-lowest
PYTHON ?= python3
BIN    := $(VENV)/bin
DEMO   := runs/demo

# Everything below runs from what is installed; nothing may ask a hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# In as many processes as there are cores, each of one thread.
PYTEST  := -m pytest --numprocesses auto --dist worksteal
PARALLEL := $(OFFLINE) OMP_NUM_THREADS=1

.PHONY: demo test test-lowest test-versions soak lint gpu clean

$(BIN)/supra: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(LOWEST)/bin/supra: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	touch $@

demo: $(BIN)/supra
	$(OFFLINE) $(BIN)/supra convert tiny --set mixer.gain=head --output runs/tiny-supra --overwrite
	$(OFFLINE) $(BIN)/supra uptrain --recipe recipes/demo.toml --model runs/tiny-supra --output $(DEMO) --overwrite
	$(OFFLINE) $(BIN)/supra eval runs/tiny-supra --tasks stdlib_cloze,stdlib_ppl --limit 100 > /dev/null
	$(OFFLINE) $(BIN)/supra eval $(DEMO) --tasks stdlib_cloze,stdlib_ppl --limit 100 > /dev/null
	$(OFFLINE) $(BIN)/supra report $(DEMO)
	@echo; echo 'The teacher goes on:'
	$(OFFLINE) $(BIN)/supra generate tiny --prompt 'def read(self, size=-1):' --max-new-tokens 48 --temperature 0.8 --seed 1 --quiet
	@echo; echo 'The student goes on, in constant memory:'
	$(OFFLINE) $(BIN)/supra generate $(DEMO) --prompt 'def read(self, size=-1):' --max-new-tokens 48 --temperature 0.8 --seed 1 --quiet

lint: $(BIN)/supra
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(PARALLEL) $(BIN)/python $(PYTEST)

# The lower bounds: what transformers and torch are asked for in another way there, not every word of every verb.
test-lowest: $(LOWEST)/bin/supra
	$(PARALLEL) $(LOWEST)/bin/python $(PYTEST) tests/laws tests/core/test_swap.py tests/core/test_modeling.py \
		tests/core/test_hugging_face.py tests/train/test_resume.py tests/cli/test_every_verb.py

# The laws on each minor version of transformers between the bounds; writes the table of docs/compatibility.md.
test-versions: $(BIN)/supra
	$(PARALLEL) $(BIN)/python tests/versions.py

# 500 steps on three ranks, something going wrong every 25; the same bits as without.
soak: $(BIN)/supra
	PYTHONPATH=. $(PARALLEL) $(BIN)/python tests/parallel/soak.py

# Takes $(PYTHON) as it is: a borrowed GPU machine needs what benchmarks/gpu.py names, no installation.
gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
