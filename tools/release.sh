#!/usr/bin/env bash
# The sdist, the wheel made of it, and a try of both in fresh environments: tools/release.sh FOLDER. Uploads nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$1"
folder=$(cd "$1" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

echo "== tools"
python3 -m venv "$folder/tools"
tools=$folder/tools/bin
mapfile -t wanted < <(python3 -c 'import tomllib
for text in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["release"]: print(text)')
"$tools/pip" install --constraint constraints.txt "${wanted[@]}"

echo "== Dockerfiles"
"$tools/hadolint" docker/*.Dockerfile

echo "== sdist, and the wheel made of it"
PIP_CONSTRAINT=$PWD/constraints.txt "$tools/python" -m build --outdir "$folder/dist" . > "$folder/build.log"

echo "== manylinux"
"$tools/auditwheel" show "$folder"/dist/*.whl
PATH=$tools:$PATH "$tools/auditwheel" repair --wheel-dir "$folder/wheels" "$folder"/dist/*.whl

echo "== smoke test"
python3 -m venv "$folder/fresh"
"$folder/fresh/bin/pip" install --constraint constraints.txt "$folder"/wheels/*.whl
cp tools/wheel_smoke.py "$folder/"
(cd "$folder" && fresh/bin/python wheel_smoke.py)
ls "$folder/wheels" "$folder"/dist/*.tar.gz
