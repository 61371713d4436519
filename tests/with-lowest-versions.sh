#!/bin/sh
# Runs the suite with the oldest version that pyproject.toml admits of each dependency users install.
set -eu
cd "$(dirname "$0")/.."
venv=.venv-lowest
[ -x $venv/bin/python ] || "${PYTHON:-python3}" -m venv $venv
$venv/bin/pip install --quiet --upgrade 'pip>=25.1'
lowest=$($venv/bin/python - <<'PYTHON'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
groups = [project["dependencies"], *project["optional-dependencies"].values()]
wanted = {item for group in groups for item in group if not item.startswith("papaours-auth[")}
print(*sorted(item.replace(">=", "==") for item in wanted))
PYTHON
)
echo "== $lowest"
# shellcheck disable=SC2086 - one word a requirement
$venv/bin/pip install --quiet --editable '.[all]' $lowest --group test
# Starlette's oldest test client names what the newest anyio deprecates.
$venv/bin/python -m pytest -n auto --dist worksteal -q -W 'ignore:The anyio.abc.BlockingPortal alias is deprecated:DeprecationWarning'
