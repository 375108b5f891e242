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

.PHONY: demo test test-lowest test-versions soak ablation lint gpu wheels clean

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

# The lower bounds: what transformers and torch are asked for in another way there, not every word of every verb, and
# each mixer with its own options; what kills processes is the same on all versions.
test-lowest: $(LOWEST)/bin/supra
	$(PARALLEL) $(LOWEST)/bin/python $(PYTEST) -m 'not variant and not slow' tests/laws tests/core/test_swap.py tests/core/test_modeling.py \
		tests/core/test_hugging_face.py tests/core/test_after_conversion.py tests/train/test_resume.py \
		tests/cli/test_every_verb.py tests/cli/test_export.py tests/cli/test_serve.py

# The laws on each minor version of transformers between the bounds; writes the table of docs/compatibility.md.
test-versions: $(BIN)/supra
	$(PARALLEL) $(BIN)/python tests/versions.py

# 500 steps on three ranks, something going wrong every 25; the same bits as without.
soak: $(BIN)/supra
	PYTHONPATH=. $(PARALLEL) $(BIN)/python tests/parallel/soak.py

# What makes a student of the bundled teacher remember: hours on a CPU, and it goes on where it was stopped.
ablation: $(BIN)/supra
	$(OFFLINE) $(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/tables.py

# Takes $(PYTHON) as it is: a GPU machine needs what benchmarks/gpu.py names, no installation.
gpu:
	$(PYTHON) benchmarks/gpu.py

# 21 MB of what a GPU machine without a network may lack, for Python 3.12 on x86-64; there: pip install --no-index --no-deps wheels/*.whl
WHEELS := annotated-types pydantic pydantic_core typing-inspection tomli_w rich torchao lm_eval datasets dill multiprocess \
	evaluate pytablewriter DataProperty mbstrdecoder tabledata tcolorpy typepy pathvalidate nltk more-itertools chardet pytz
wheels: $(BIN)/supra
	for name in $(WHEELS); do grep -i "^$$name==" constraints.txt; done > wheels.txt
	$(BIN)/python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --dest $@ \
		$(foreach glibc,17 24 28 34,--platform manylinux_2_$(glibc)_x86_64) --platform manylinux2014_x86_64 --platform any \
		--requirement wheels.txt flash-linear-attention==0.6.0 fla-core==0.6.0
	$(BIN)/python -m pip wheel --no-deps --wheel-dir $@ rouge_score==0.1.2 sqlitedict==2.1.0 word2number==1.1
	rm wheels.txt

clean:
	rm -rf build dist wheels *.egg-info .pytest_cache .ruff_cache .hypothesis
