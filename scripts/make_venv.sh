#!/bin/sh
# Makes a virtual environment where Debian splits venv off: make_venv.sh PYTHON DIRECTORY
set -eu
python=$1
directory=$2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "PolarCache needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
    exit 1
}
[ -x "$directory/bin/pip" ] && exit 0
"$python" -m venv --clear "$directory" 2>/dev/null && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv >/dev/null
    "$python" -m venv --clear "$directory" && exit 0
fi
if "$python" -m virtualenv --version >/dev/null 2>&1; then
    exec "$python" -m virtualenv "$directory"
fi
echo "This Python has no venv module. Install it: sudo apt-get install python3-venv" >&2
exit 1
