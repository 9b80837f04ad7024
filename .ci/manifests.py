"""Writes and checks what runs the service elsewhere: cluster/kuberay and cluster/ray-up.yaml.

    python .ci/manifests.py --write          write deployment.yaml of each overlay
    python .ci/manifests.py --schemas DIR    check everything; DIR has Kubernetes' JSON schemas

An overlay's deployment.yaml is a file of cluster/ with the overlay's overrides.yaml.

Every manifest is checked against its schema, and every deployment file as `specprefill check` does.
Overlays are rendered where `kubectl` is installed; elsewhere their parts are checked one by one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from specprefill.deployment.checked_yaml import InvalidFile
from specprefill.deployment.file import load, parse

ROOT = Path(__file__).resolve().parent.parent
KUBERAY = ROOT / "cluster" / "kuberay"
BASES = {"demo": ROOT / "cluster" / "local.yaml", "gpu": ROOT / "cluster" / "gpu-8b-70b.yaml"}
RAY_UP = ROOT / "cluster" / "ray-up.yaml"
DEFINITIONS = "_definitions.json"
SHOWN_FAULTS = 20
# Kinds whose schema's file has another group than `core`.
GROUPS = {"PodDisruptionBudget": "policy-v1", "NetworkPolicy": "networking-v1"}

Mapping = dict[str, Any]


def main() -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the overlays' deployment files")
    what.add_argument("--schemas", type=Path, metavar="DIR", help="check, with these schemas")
    args = parser.parse_args()
    if args.write:
        for overlay in BASES:
            (KUBERAY / overlay / "deployment.yaml").write_text(deployment_text(overlay))
        return 0
    faults = [*stale_files(), *manifest_faults(args.schemas), *ray_up_faults()]
    for fault in faults[:SHOWN_FAULTS]:
        print(fault, file=sys.stderr)
    rendered = "" if shutil.which("kubectl") else " (not rendered: kubectl is not installed)"
    print(f"manifests: {len(faults)} faults{rendered}")
    return 1 if faults else 0


def deployment_text(overlay: str) -> str:
    """Return an overlay's deployment file: its base with its overrides."""
    base = yaml.safe_load(BASES[overlay].read_text())
    overrides = yaml.safe_load((KUBERAY / overlay / "overrides.yaml").read_text())
    head = (
        f"# Written by `make manifests` from cluster/{BASES[overlay].name} and overrides.yaml.\n"
        "# Do not edit.\n"
    )
    return head + yaml.safe_dump(merge(base, overrides), sort_keys=False, width=100)


def merge(base: Any, over: Any) -> Any:
    """Return `base` changed by `over`: mappings by key, lists of named mappings by name."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}
    if _is_named(base) and _is_named(over):
        by_name = {each["name"]: each for each in over}
        known = {each["name"] for each in base}
        changed = [merge(each, by_name.get(each["name"], {})) for each in base]
        return changed + [each for name, each in by_name.items() if name not in known]
    return over


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(e, dict) and "name" in e for e in value)


def stale_files() -> Iterator[str]:
    """Yield the deployment files that differ from what --write would write, or are invalid."""
    for overlay in BASES:
        path = KUBERAY / overlay / "deployment.yaml"
        if path.read_text() != deployment_text(overlay):
            yield f"{path.relative_to(ROOT)}: stale; run `make manifests`"
        try:
            load(path)
        except InvalidFile as error:
            yield str(error)


def manifest_faults(schemas: Path) -> Iterator[str]:
    """Yield what is wrong with the manifests of cluster/kuberay."""
    registry = _registry(schemas)
    for origin, manifest in _manifests():
        kind = manifest.get("kind")
        if kind == "RayService":
            schema = json.loads((ROOT / ".ci" / "rayservice.schema.json").read_text())
            yield from _embedded_faults(origin, manifest["spec"].get("serveConfigV2"))
        else:
            name = f"{str(kind).lower()}-{GROUPS.get(str(kind), 'v1')}.json"
            schema = json.loads((schemas / name).read_text())
        for error in Draft7Validator(schema, registry=registry).iter_errors(manifest):
            place = ".".join(map(str, error.absolute_path))
            yield f"{origin}: {kind}: {place}: {error.message[:300]}"


def _embedded_faults(origin: str, text: str | None) -> Iterator[str]:
    if text is None:
        yield f"{origin}: RayService without serveConfigV2"
        return
    try:
        parse(text, f"{origin}: serveConfigV2")
    except InvalidFile as error:
        yield str(error)


def _manifests() -> Iterator[tuple[str, Mapping]]:
    """Yield every manifest of every overlay, with its origin."""
    for overlay in BASES:
        folder = KUBERAY / overlay
        for manifest in yaml.safe_load_all(_rendered(folder)):
            yield f"cluster/kuberay/{overlay}", manifest


def _rendered(folder: Path) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is not None:
        command = [kubectl, "kustomize", str(folder)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    service = yaml.safe_load((folder / "rayservice.yaml").read_text())
    service["spec"]["serveConfigV2"] = (folder / "deployment.yaml").read_text()
    base = [path.read_text() for path in sorted((KUBERAY / "base").glob("[!k]*.yaml"))]
    return "\n---\n".join([yaml.safe_dump(service), *base])


def _registry(schemas: Path) -> Registry[Any]:
    definitions = json.loads((schemas / DEFINITIONS).read_text())
    resource = Resource.from_contents(definitions, default_specification=DRAFT7)
    return Registry().with_resource(f"/api/{DEFINITIONS}", resource)


def ray_up_faults() -> Iterator[str]:
    """Yield what Ray's own schema refuses in cluster/ray-up.yaml."""
    from ray import autoscaler

    schema = json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load(RAY_UP.read_text())
    for error in Draft7Validator(schema).iter_errors(config):
        place = ".".join(map(str, error.absolute_path))
        yield f"cluster/ray-up.yaml: {place}: {error.message[:300]}"


if __name__ == "__main__":
    sys.exit(main())
