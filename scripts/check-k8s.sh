#!/usr/bin/env bash
# Checks ops/k8s against the schemas of Kubernetes, KEDA and the Prometheus operator with kubeconform, strictly: unknown
# fields fail. Needs Go and Python 3; downloads what it checks with into .cache/k8s.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=$PWD/.cache/k8s
mkdir -p "$cache/schemas"
export GOBIN=$cache/bin GOFLAGS=-mod=mod
[ -x "$GOBIN/kubeconform" ] || go install github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0
crds=()
for module in github.com/kedacore/keda/v2@v2.21.0 github.com/prometheus-operator/prometheus-operator@v0.85.0; do
  crds+=("$(cd "$cache" && go mod download -json "$module" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')")
done
[ -x "$cache/venv/bin/python" ] || python3 -m venv "$cache/venv"
"$cache/venv/bin/pip" install --quiet kubernetes-validate==1.37.0 pyyaml
versions=$("$cache/venv/bin/python" - "$cache/schemas" \
  "${crds[0]}/config/crd/bases/keda.sh_scaledobjects.yaml" \
  "${crds[1]}/example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml" <<'PYTHON'
# Lays the schemas out as kubeconform looks for them.
import json, pathlib, sys
import kubernetes_validate, yaml

out = pathlib.Path(sys.argv[1])
builtin = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
versions = sorted((d for d in builtin.glob("v1.*-local-strict")), key=lambda d: int(d.name.split(".")[1]))
for version in (versions[0], versions[-1]):
    folder = out / version.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("_definitions", "deployment-apps-v1", "service-v1", "poddisruptionbudget-policy-v1"):
        text = (version / f"{name}.json").read_text()
        (folder / f"{name}.json").write_text(text.replace("/api/_definitions.json", f"file://{folder}/_definitions.json"))
    print(version.name)


def closed(schema):
    """Kubernetes drops unknown fields of a custom resource; here they are mistakes."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            closed(value)
    elif isinstance(schema, list):
        for value in schema:
            closed(value)
    return schema


for path in sys.argv[2:]:
    spec = yaml.safe_load(pathlib.Path(path).read_text())["spec"]
    for version in spec["versions"]:
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        name = f'{spec["names"]["kind"].lower()}-{spec["group"].split(".")[0]}-{version["name"]}.json'
        (out / name).write_text(json.dumps(closed(schema)))
PYTHON
)
for version in $versions; do
  echo "check-k8s: $version"
  "$GOBIN/kubeconform" -strict -summary \
    -schema-location "$cache/schemas/$version/{{.ResourceKind}}{{.KindSuffix}}.json" \
    -schema-location "$cache/schemas/{{.ResourceKind}}{{.KindSuffix}}.json" ops/k8s/*.yaml
done
