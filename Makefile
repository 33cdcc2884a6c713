# slum: `make quickstart` to see it run, `make check test` before a commit. Every target can be repeated.
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: help quickstart venv dev check test simulate simulate-mutations chaos chaos-all test-members cluster cluster-down bench backup-demo clean ssh-hosts ssh-hosts-down test-ssh test-long

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

$(VENV)/.run: pyproject.toml slum/__init__.py scripts/install.sh
	scripts/install.sh run $(VENV)
	@touch $@

$(VENV)/.dev: pyproject.toml slum/__init__.py scripts/install.sh
	scripts/install.sh dev $(VENV)
	@touch $@ $(VENV)/.run

venv: $(VENV)/.run  ## install slum into .venv (and with apt, as root, what it needs)

dev: $(VENV)/.dev  ## the same with what tests and checks need

quickstart: $(VENV)/.run  ## run the example fleet on this machine and print URLs that answer
	@VENV=$(VENV) scripts/quickstart.sh

check: $(VENV)/.dev  ## format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: $(VENV)/.dev  ## all tests, against real parts; most of them wait more than they work: WORKERS=3
	$(VENV)/bin/pytest -n $(or $(WORKERS),3) --dist loadgroup -m "not long" $(PYTEST_ARGS)

test-long: $(VENV)/.dev  ## the tests that take minutes: whole paths with many real hosts and members
	$(VENV)/bin/pytest -m long $(PYTEST_ARGS)

simulate: $(VENV)/.dev  ## the ledger under a simulated network, disk and clock: N=schedules SEED=first
	$(PY) -m tests.simulation --count $(or $(N),1000) --seed $(or $(SEED),1) --jobs $$(nproc)

simulate-mutations: $(VENV)/.dev  ## switch each protection of the ledger off, and see that the simulation notices: SEED=first
	$(PY) -m tests.simulation.mutate --seed $(or $(SEED),1)

test-members: $(VENV)/.dev  ## several members end to end, the long way
	$(VENV)/bin/pytest tests/e2e/test_members.py tests/e2e/members_long.py $(PYTEST_ARGS)

chaos: $(VENV)/.dev  ## break a cluster in network namespaces, under load, and check all it promised (root): MINUTES= SEED= MEMBERS= EPOCH=
	@$(PY) -m tests.chaos --minutes $(or $(MINUTES),5) --seed $(or $(SEED),1) --members $(or $(MEMBERS),3) --epoch-entries $(or $(EPOCH),50)

chaos-all: $(VENV)/.dev  ## 20 seeds of 3 minutes with small epochs and 20 with default ones: two hours and a half: SEED=first
	@failed=0; for epoch in 50 default; do \
	  $(PY) -m tests.chaos --minutes 3 --seed $(or $(SEED),1) --seeds 20 --epoch-entries $$epoch || failed=1; done; exit $$failed

cluster: $(VENV)/.dev  ## three members and two tenements in network namespaces (root); prints how to reach and break them: MEMBERS= TENEMENTS=
	@$(PY) tests/cluster_site.py up $(or $(MEMBERS),3) $(or $(TENEMENTS),2)

cluster-down: $(VENV)/.dev  ## end them
	@$(PY) tests/cluster_site.py down

bench: $(VENV)/.dev  ## all benchmarks, one after the other; figures to docs/benchmarks.md by hand
	@for b in $(filter-out %/measure.py %_load.py %_peer.py,$(wildcard benchmarks/*.py)); do echo "== $$b"; $(PY) $$b || exit 1; done

ssh-hosts: $(VENV)/.dev  ## hosts with sshd in namespaces of this machine, N=5 of them, SYSTEMD=1 by systemd; prints a slum.toml
	@$(PY) tests/ssh_hosts.py up $(or $(N),5) --systemd $(or $(SYSTEMD),0)

test-ssh: $(VENV)/.dev  ## the ssh operator for longer: a bootstrap killed at 40 random moments, the whole path with real hosts
	SLUM_SSH_ROUNDS=40 $(VENV)/bin/pytest tests/test_ssh.py tests/e2e/test_hosts.py $(PYTEST_ARGS)

ssh-hosts-down:  ## remove them
	@$(PY) tests/ssh_hosts.py down

backup-demo: $(VENV)/.dev  ## lose a whole control plane and bring it back from S3 (on loopback, folders of its own)
	@$(PY) scripts/backup_demo.py

clean:  ## remove what make made here; runs nothing down (`slum down --services` does)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
