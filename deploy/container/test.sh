#!/usr/bin/env bash
# Builds the image, runs it as it should be run, and looks: at what is in it, its health, a score,
# a stop, and a return from kill -9. Needs root on Debian, no container engine and no registry: what
# is missing is installed, and the base image is made of the distribution's own packages.
#
#   PYTHON   a Python that has moorage's client, to score from outside; default: .venv's
#   VARIANT  cpu or tpu; that for TPUs runs on the CPU here; default: cpu
#   FOLDER   where the base, images and containers are kept between runs
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-$PWD/.venv/bin/python}
VARIANT=${VARIANT:-cpu}
FOLDER=${FOLDER:-${XDG_CACHE_HOME:-$HOME/.cache}/moorage-image}
BASE=localhost/moorage-base
IMAGE=localhost/moorage:test
NAME=moorage-test
SERVER=127.0.0.1:18470
HEALTH=127.0.0.1:18480

skipped() { echo "SKIPPED: $1. The image was neither built nor run."; exit 0; }
failed() { echo "FAILED: $1" >&2; exit 1; }
step() { printf '%4d s  %s\n' "$SECONDS" "$1"; }
engine() { podman --runtime runc --cgroup-manager cgroupfs "$@"; }
# Limits that a machine whose own are lower can give; no timer, for which there may be no systemd.
run() {
  local cpu=()
  [ "$VARIANT" = cpu ] || cpu=(--env JAX_PLATFORMS=cpu)
  engine run --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --no-healthcheck "${cpu[@]}" "$@"
}
inside() { run --rm --network none --entrypoint "" "$IMAGE" "$@"; }

tools() {
  [ "$(id -u)" = 0 ] || skipped "only root may build here"
  local wanted=(buildah podman runc debootstrap openssl) missing=() tool
  for tool in "${wanted[@]}"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || skipped "no ${missing[*]}, and no apt-get to install them"
    { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } \
      >"$FOLDER/apt.log" 2>&1 || skipped "apt-get cannot install ${missing[*]} ($FOLDER/apt.log)"
    step "installed ${missing[*]}"
  fi
  "$PYTHON" -c 'import moorage' 2>/dev/null || failed "$PYTHON has no moorage: make, or set PYTHON"
}

# Images and containers of our own, apart from those of the machine.
storage() {
  export CONTAINERS_STORAGE_CONF=$FOLDER/storage.conf
  printf '[storage]\ndriver = "%s"\ngraphroot = "%s"\nrunroot = "%s"\n' \
    "${STORAGE_DRIVER:-overlay}" "$FOLDER/storage" /run/moorage-image >"$CONTAINERS_STORAGE_CONF"
}

base() {
  buildah inspect --type image "$BASE" >/dev/null 2>&1 && return
  local root=$FOLDER/root mirror release container
  # shellcheck disable=SC2016 # apt's own placeholders
  read -r mirror release < <(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' \
    'Identifier: Packages' 'Component: main') || skipped "apt has no sources"
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
    "$release" "$root" "$mirror" >"$FOLDER/debootstrap.log" 2>&1 \
    || skipped "debootstrap has no $release ($FOLDER/debootstrap.log)"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$root" / >/dev/null
  buildah config --env PATH=/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah commit --quiet --rm "$container" "$BASE" >/dev/null
  rm -rf "$root"
  step "made a base of $release"
}

image() {
  local mounts=() file
  for file in /etc/ssl/certs /etc/pip.conf; do  # what this machine needs to reach its index
    [ -e "$file" ] && mounts+=(--volume "$file:$file:ro")
  done
  buildah bud --isolation chroot --network host --pull-never --format docker "${mounts[@]}" \
    --build-arg "BASE=$BASE" --build-arg "VARIANT=$VARIANT" --tag "$IMAGE" . >"$FOLDER/build.log" 2>&1 \
    || { tail -30 "$FOLDER/build.log" >&2; failed "the build ($FOLDER/build.log)"; }
  engine image prune --force >/dev/null
  local bytes
  bytes=$(engine image inspect --format '{{.Size}}' "$IMAGE")
  step "built the image for $VARIANT: $((bytes / 1000000)) MB with its base"
}

contents() {
  local found
  # shellcheck disable=SC2016 # the container's shell expands it
  found=$(inside sh -c 'for name in gcc cc g++ make pip pip3 git; do command -v $name; done
    find / -xdev \( -name "pip" -o -name "pip-*" -o -name "*.whl" \) -not -path "/proc/*" 2>/dev/null
    python -c "import pip" 2>/dev/null && echo "import pip"; true')
  [ -z "$found" ] || failed "the image has what only builds need: $found"
  [ "$(inside id -u)" = 10001 ] || failed "the image runs as user $(inside id -u)"
  inside python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("libtpu"))' \
    && found=tpu || found=cpu
  [ "$found" = "$VARIANT" ] || failed "the image for $VARIANT is one for $found"
  step "no compiler and no pip in it; its user is 10001"
}

# Its own settings listen beyond loopback without TLS or tokens: it has to refuse that.
refusal() {
  local said
  said=$(run --rm --network none "$IMAGE" 2>&1) && failed "it serves all the world: $said"
  grep -q "neither TLS nor tokens" <<<"$said" || failed "it does not start: $said"
  step "it does not listen beyond loopback without TLS or tokens"
}

# Its HEALTHCHECK asks at its own port: in a network of its own.
healthcheck() {
  run --detach --name "$NAME" --network none --read-only --cap-drop=ALL "$IMAGE" \
    serve --config /etc/moorage/moorage.toml --listen 127.0.0.1:8470 >/dev/null
  engine exec "$NAME" python -m moorage_server.probe --wait 60 127.0.0.1:8480 \
    || { engine logs "$NAME" >&2; failed "its health"; }
  local check
  mapfile -t check < <(engine image inspect --format '{{range .HealthCheck.Test}}{{println .}}{{end}}' \
    "$IMAGE" | sed '1d;/^$/d')  # the first says that it is a command
  [ ${#check[@]} -gt 0 ] || failed "it has no HEALTHCHECK"
  engine exec "$NAME" "${check[@]}" || failed "its HEALTHCHECK, ${check[*]}"
  stop
  step "its HEALTHCHECK is good, and it ends with 0 after SIGTERM"
}

# What an operator mounts: models, settings, a certificate and a token.
mounts() {
  rm -rf "$FOLDER/models" "$FOLDER/settings"
  cp -r tests/golden "$FOLDER/models"
  mkdir "$FOLDER/settings"
  cp deploy/container/settings.toml "$FOLDER/settings/moorage.toml"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
    -subj /CN=moorage -addext subjectAltName=IP:127.0.0.1 \
    -keyout "$FOLDER/settings/tls.key" -out "$FOLDER/settings/tls.crt" 2>/dev/null
  MOORAGE_TOKEN=$(openssl rand -hex 16)
  echo "test load $MOORAGE_TOKEN" >"$FOLDER/settings/tokens"
  export MOORAGE_TOKEN MOORAGE_TLS_CA=$FOLDER/settings/tls.crt
  chmod -R a+rX "$FOLDER/models" "$FOLDER/settings"
}

start() {
  run --detach --name "$NAME" --network host --read-only --cap-drop=ALL \
    --security-opt no-new-privileges --memory 4g \
    --volume "$FOLDER/models:/models:ro" --volume "$FOLDER/settings:/etc/moorage:ro" \
    --volume moorage-test-cache:/var/cache/moorage --volume moorage-test-state:/var/lib/moorage \
    "$IMAGE" >/dev/null
  local service
  for service in "" ready; do
    engine exec "$NAME" python -m moorage_server.probe --wait 60 "$HEALTH" $service || {
      engine logs "$NAME" >&2; failed "its health"; }
  done
}

stop() {
  local code
  engine stop --time 30 "$NAME" >/dev/null
  code=$(engine inspect --format '{{.State.ExitCode}}' "$NAME")
  [ "$code" = 0 ] || { engine logs "$NAME" >&2; failed "it ended with $code after SIGTERM"; }
  engine rm --volumes "$NAME" >/dev/null
}

clean() {
  engine rm --force --ignore --volumes "$NAME" >/dev/null 2>&1 || true
  engine volume rm --force moorage-test-cache moorage-test-state >/dev/null 2>&1 || true
}

serving() {
  mounts
  start
  engine exec --user 0 "$NAME" touch /opt/x 2>/dev/null && failed "its root can be written"
  step "it is healthy and ready, with a read-only root and no capabilities"
  MOORAGE_TOKEN=not-the-one-of-the-file "$PYTHON" deploy/container/score.py "$SERVER" load \
    2>/dev/null && failed "it takes any token"
  "$PYTHON" deploy/container/score.py "$SERVER" load
  step "by TLS and with its token a model was loaded, and scored as transformers does"
  engine kill --signal KILL "$NAME" >/dev/null
  engine rm --force --volumes "$NAME" >/dev/null
  start
  "$PYTHON" deploy/container/score.py "$SERVER" restored
  step "after kill -9 a new container has the model again, and scores the same"
  stop
  step "it ended with 0 after SIGTERM"
}

mkdir -p "$FOLDER"
tools
storage
trap clean EXIT
clean
base
image
contents
refusal
healthcheck
serving
echo "PASSED: the image was built and run."
