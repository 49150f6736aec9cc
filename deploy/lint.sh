#!/usr/bin/env bash
# Checks what the deployments are written in, each with its own tool: hadolint, shellcheck and
# kubernetes-validate, which the extra `dev` has, kubectl and systemd-analyze. It names what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

KUBERNETES=1.37
EXPOSURE=25  # tenths; 21 by systemd 252, and newer ones look at more

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
  local all file
  all=$(mktemp)
  if command -v kubectl >/dev/null; then
    kubectl kustomize deploy/kubernetes >"$all"
  else
    echo "SKIPPED, no kubectl: kustomization.yaml"
    for file in deploy/kubernetes/*.yaml; do
      [ "${file##*/}" = kustomization.yaml ] || { echo ---; cat "$file"; }
    done >"$all"
  fi
  kubernetes-validate -k "$KUBERNETES" --strict --quiet "$all"
  rm "$all"
}

unit() {  # the paths of the installed server are not there: any other complaint counts
  local said
  said=$(systemd-analyze verify deploy/systemd/moorage.service 2>&1 \
    | grep -v 'Command /opt/moorage/bin/.* is not executable' || true)
  [ -z "$said" ] || { echo "$said" >&2; return 1; }
  systemd-analyze security --offline=yes --threshold="$EXPOSURE" --no-pager \
    deploy/systemd/moorage.service | tail -1
}

with hadolint hadolint Dockerfile
with shellcheck shellcheck .ci/run deploy/lint.sh deploy/container/test.sh
with kubernetes-validate manifests
with systemd-analyze unit
