#!/usr/bin/env bash
# A newcomer's path from a clone to a report, timed: tools/newcomer.sh FOLDER [REPOSITORY]. FOLDER must not exist.
set -euo pipefail
folder=$1
repository=${2:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
begun=$SECONDS
step() { echo "== $1 ($((SECONDS - begun)) s)"; }

step "clone"
git clone --quiet "$repository" "$folder"
cd "$folder"

step "make demo"
make demo

step "tokenspeed serve"
.venv/bin/tokenspeed serve --chat-template plain --port 0 2> serve.log &
server=$!
trap 'kill $server 2> /dev/null; wait $server 2> /dev/null || true' EXIT
until address=$(grep -om1 'http://[0-9.:]*' serve.log); do kill -0 $server; sleep 0.2; done
until curl --silent --fail --output /dev/null "$address/health"; do kill -0 $server; sleep 0.2; done

step "curl"
curl --silent --show-error --fail "$address/v1/completions" -H 'content-type: application/json' \
  -d '{"prompt": "The three primary colors are", "max_tokens": 8, "temperature": 0}'
echo

step "a client in Python"
PIP_CONSTRAINT=constraints.txt .venv/bin/pip install --quiet --disable-pip-version-check openai
.venv/bin/python - "$address" << 'END'
import sys

from openai import OpenAI

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")
asked = [{"role": "user", "content": "Name a color."}]
for event in client.chat.completions.create(model="gemma-3-270m", messages=asked, max_tokens=16, stream=True):
    print(event.choices[0].delta.content or "", end="")
print()
END

step "bench serve"
.venv/bin/tokenspeed bench serve --base-url "$address" --concurrency 4 --num-requests 16 --input-len 128 --output-len 32 \
  --ignore-eos --record results.json --record-id newcomer

step "bench report"
PIP_CONSTRAINT=constraints.txt .venv/bin/pip install --quiet --disable-pip-version-check matplotlib
.venv/bin/tokenspeed bench report results.json --out report
ls report/*.svg report/*.png

step "end of the server"
kill $server
wait $server
trap - EXIT
step "done"
