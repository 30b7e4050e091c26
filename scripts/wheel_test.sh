#!/bin/sh
# Builds the wheel, installs it alone and moves blocks with it: wheel_test.sh PYTHON
# What a user gets is the wheel, not the checkout: a package that is missing from it shows here.
set -eu
python=$(pwd)/$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .
rm -rf build
# --target: the wheel's own files and nothing of the checkout; dependencies come from the venv.
"$python" -m pip install --quiet --no-deps --target "$work/site" "$work"/polarcache-*.whl
cd "$work"
PYTHONPATH="$work/site" "$python" - <<'END'
import pkgutil
from importlib import import_module

import polarcache

polarcache.__path__ = [path for path in polarcache.__path__ if "/site" in path]
names = [m.name for m in pkgutil.walk_packages(polarcache.__path__, "polarcache.")]
engines = []
for name in names:
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        # What an engine loads from us inherits from classes of the engine.
        if error.name not in ("lmcache", "sglang", "vllm"):
            raise
        engines.append(name)
        continue
    assert "/site/" in module.__file__, module.__file__
print(f"wheel: {len(names) - len(engines)} modules import; these need their engine: {engines}")
END
