#!/usr/bin/env bash
# Which lines of the package no test runs: tests/coverage.sh [argument of pytest ...]
#
# Counts what runs in other processes, too: the ranks that torchrun starts, commands, workers that load data
# (pyproject.toml, [tool.coverage]).  Needs coverage 7.10 or newer.  A process that a test kills writes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -c 'import coverage; assert coverage.version_info >= (7, 10), "pip install --upgrade coverage"'
python -m coverage erase
status=0
python -m coverage run -m pytest "$@" || status=$?  # a failing test is no reason not to report
python -m coverage combine --quiet
python -m coverage report
exit $status
