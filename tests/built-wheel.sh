#!/bin/sh
# Builds the wheel and runs the suite against it, where there is no src/ to fall back on.
# Usage: tests/built-wheel.sh PYTHON (one that has `build`)
set -eu
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --wheel --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --upgrade 'pip>=25.1'
wheel=$(echo "$work"/dist/*.whl)
(cd "$root" && "$work/venv/bin/pip" install --quiet "$wheel[all]" --group test)

for what in pyproject.toml conftest.py README.md docs tests examples; do cp -R "$root/$what" "$work/"; done
cd "$work"
venv/bin/python -c 'import papaours_auth, sys; sys.exit("/src/" in papaours_auth.__file__)'
venv/bin/python -m pytest -n auto --dist worksteal -q -p no:cacheprovider
rm -rf examples  # the demonstration must find its own
venv/bin/papaours-auth demo >demo.log 2>&1 || { cat demo.log; exit 1; }
echo "the built wheel passes: $(basename "$wheel")"
