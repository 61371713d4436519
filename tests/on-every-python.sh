#!/bin/sh
# Runs the suite on every supported Python that is on this machine: on the PATH, or where pyenv keeps them.
# Each has its own environment, .venv-3.x. Says which were not found; fails if any suite fails.
set -eu
cd "$(dirname "$0")/.."
failed=
for version in 3.11 3.12 3.13; do
	python=
	for candidate in "$(command -v "python$version" || true)" \
		"${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/"python$version"; do
		# A pyenv shim may be there and know no interpreter: ask it.
		if [ -x "$candidate" ] && "$candidate" -c '' 2>/dev/null; then python=$candidate; break; fi
	done
	if [ -z "$python" ]; then
		echo "== Python $version is not on this machine: not run"
		continue
	fi
	echo "== Python $version"
	make --no-print-directory test PYTHON="$python" VENV=".venv-$version" ARGS=-q || failed="$failed $version"
done
[ -z "$failed" ] || { echo "== failed on:$failed"; exit 1; }
