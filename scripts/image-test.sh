#!/bin/sh
# Builds the container image and runs it for real: make image-test
#
# Needs no container daemon: buildah, podman, runc and debootstrap, which apt brings when root runs
# this on Debian. The base image is a minimal Debian made here, so no image registry is asked.
# pip's variables (PIP_FIND_LINKS, PIP_CERT, ...) reach the build; local paths in them are mounted.
#
#   PYTHON          a Python with PolarCache installed, for the client side   [.venv/bin/python]
#   IMAGE_TEST_DIR  where images and the base are kept between runs
#   TORCH           the torch that the image gets                             [the Containerfile's]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=${IMAGE_TEST_DIR:-/var/tmp/polarcache-image-test}
suite=bookworm
base=localhost/polarcache-base:$suite
image=localhost/polarcache:test
container=polarcache-image-test
volume=polarcache-image-test-state
export PYTHONSAFEPATH=1
# Health checks are asked for below, not run by a timer of systemd.
export DISABLE_HC_SYSTEMD=true
export BUILDAH_ISOLATION=chroot

say() { echo "image-test: $*"; }
fail() {
    say "FAILED: $*" >&2
    pod logs "$container" 2>&1 | tail -n 40 >&2 || true
    exit 1
}
storage() {
    tool=$1
    shift
    "$tool" --storage-driver=vfs --root "$work/storage" --runroot "$work/run" "$@"
}
pod() { storage podman --runtime runc --cgroup-manager cgroupfs --events-backend file "$@"; }
is_running() { [ "$(pod inspect --format '{{.State.Running}}' "$container")" = true ]; }
clean_up() {
    pod rm --force --time 0 "$container" >/dev/null 2>&1 || true
    pod volume rm "$volume" >/dev/null 2>&1 || true
}

install_tools() {
    missing=
    for tool in buildah podman runc debootstrap; do
        command -v "$tool" >/dev/null || missing="$missing $tool"
    done
    [ -z "$missing" ] && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "image-test: install first:$missing" >&2
        exit 1
    fi
    say "installing$missing"
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing \
        >/dev/null
}

make_base() {
    pod image exists "$base" && return
    say "making the base image: Debian $suite with python3"
    rm -rf "$work/rootfs"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        "$suite" "$work/rootfs" >"$work/debootstrap.log" 2>&1 ||
        { tail -n 20 "$work/debootstrap.log" >&2; exit 1; }
    # Packages must not start their daemons while the image is built.
    printf '#!/bin/sh\nexit 101\n' >"$work/rootfs/usr/sbin/policy-rc.d"
    chmod 755 "$work/rootfs/usr/sbin/policy-rc.d"
    rm -rf "$work/rootfs/var/cache/apt/archives" "$work/rootfs/var/lib/apt/lists"
    mkdir -p "$work/rootfs/var/cache/apt/archives/partial" "$work/rootfs/var/lib/apt/lists/partial"
    tar -C "$work/rootfs" -c . | pod import --quiet - "$base" >/dev/null
    rm -rf "$work/rootfs"
}

build() {
    # No layers are kept: the plain storage driver would copy the whole image for each.
    set -- --build-arg "BASE=$base"
    [ -z "${TORCH:-}" ] || set -- "$@" --build-arg "TORCH=$TORCH"
    paths=
    for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CERT PIP_DEFAULT_TIMEOUT; do
        value=$(printenv "$name") || continue
        set -- "$@" --build-arg "$name=$value"
        for word in $value; do
            paths="$paths ${word#file://}"
        done
    done
    for path in $paths; do
        case $path in
        /*) [ ! -e "$path" ] || set -- "$@" --volume "$path:$path:ro" ;;
        esac
    done
    say "building $image"
    pod rmi --force "$image" >/dev/null 2>&1 || true
    storage buildah bud --format docker --isolation chroot --network host \
        --file deploy/Containerfile --tag "$image" "$@" . >"$work/build.log" 2>&1 ||
        { tail -n 60 "$work/build.log" >&2; exit 1; }
    pod image inspect --format '{{.Size}}' "$image" |
        awk '{ printf "image-test: image of %.2f GB\n", $1 / 1e9 }'
}

start() {
    port=$("$python" -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')
    endpoint=grpc://127.0.0.1:$port
    pod run --detach --name "$container" --network host \
        --read-only --read-only-tmpfs=false --tmpfs /tmp --volume "$volume:/var/lib/polarcache" \
        --cap-drop all --security-opt no-new-privileges --memory 1g \
        --ulimit nofile=1024:1024 --ulimit nproc=1000:1000 \
        --env POLARCACHE_PORT="$port" --env POLARCACHE_ENDPOINT="$endpoint" \
        --env POLARCACHE_MEMORY=256MiB --env POLARCACHE_REDIS_MEMORY=128MiB \
        "$image" >/dev/null
    tries=0
    until pod healthcheck run "$container" >/dev/null 2>&1; do
        tries=$((tries + 1))
        is_running || fail "it ended"
        [ "$tries" -lt 60 ] || fail "not healthy after $tries health checks"
        sleep 1
    done
    say "healthy: $(pod exec "$container" polarcache ping)"
}

stop() {
    pod kill --signal TERM "$container" >/dev/null
    tries=0
    while is_running; do
        tries=$((tries + 1))
        [ "$tries" -lt 60 ] || fail "still there 60 s after SIGTERM"
        sleep 1
    done
    code=$(pod inspect --format '{{.State.ExitCode}}' "$container")
    [ "$code" = 0 ] || fail "exit code $code after SIGTERM"
    pod logs "$container" 2>&1 | grep -q draining || fail "it did not drain"
    pod logs "$container" 2>&1 | grep -q stopped || fail "it did not stop in order"
    say "SIGTERM: drained, exit code 0"
    pod rm "$container" >/dev/null
}

check_confinement() {
    user=$(pod exec "$container" id -u)
    [ "$user" = 10001 ] || fail "it runs as user $user"
    if pod exec "$container" touch /opt/probe 2>/dev/null; then
        fail "the root file system is writable"
    fi
    caps=$(pod exec "$container" grep CapEff /proc/1/status | cut -f 2)
    [ "$caps" = 0000000000000000 ] || fail "it has capabilities $caps"
    # Version 2 of control groups, then version 1.
    limit=$(pod exec "$container" cat /sys/fs/cgroup/memory.max 2>/dev/null) ||
        limit=$(pod exec "$container" cat /sys/fs/cgroup/memory/memory.limit_in_bytes)
    [ "$limit" = 1073741824 ] || fail "its memory limit is $limit"
    say "user 10001, read-only, no capabilities, memory limit 1 GiB"
}

mkdir -p "$work"
install_tools
make_base
build
clean_up
trap clean_up EXIT
start
check_confinement
"$python" tests/deploy/round_trip.py "$endpoint" || fail "the round trip"
stop
start
"$python" tests/deploy/round_trip.py "$endpoint" --again || fail "blocks were lost by a restart"
stop
say "passed"
