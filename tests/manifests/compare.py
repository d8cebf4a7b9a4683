"""Holds the chart against the Kustomize manifests, object by object.

Usage: compare.py RELEASE KUSTOMIZED=CHART...

Whatever is not listed here as a difference must be equal.
"""

import json
import sys

from objects import load, without_release

# Names that have a prefix of their own where no release gives one.
NAMES = {"baton-coordinator": "coordinator", "baton-nothing-else": "nothing-else"}
# Kinds whose labels nothing selects by: the chart puts a release's on them.
UNLABELLED = ["NetworkPolicy", "PodDisruptionBudget", "Role", "RoleBinding", "ServiceAccount"]


def kustomized(path):
    """Without namespaces, which Helm's user makes and names."""
    objects = {}
    for thing in load(path):
        if thing["kind"] == "Namespace":
            continue
        rename(thing["metadata"])
        thing["metadata"].pop("namespace", None)
        if thing["kind"] == "RoleBinding":
            rename(thing["roleRef"])
            for subject in thing["subjects"]:
                subject.pop("namespace", None)
                rename(subject)
        if pod := thing["spec"].get("template", {}).get("spec") if "spec" in thing else None:
            if name := pod.get("serviceAccountName"):
                pod["serviceAccountName"] = NAMES[name]
        objects[thing["kind"], thing["metadata"]["name"]] = thing
    return objects


def rename(named):
    named["name"] = NAMES.get(named["name"], named["name"])


def chart(path, release):
    objects = {}
    for thing in load(path):
        name = thing["metadata"]["name"]
        assert name.startswith(f"{release}-"), f"{name} could be another release's"
        if template := thing.get("spec", {}).get("template"):
            assert template["metadata"]["labels"]["app.kubernetes.io/instance"] == release, name
            pod = template["spec"]
            for container in pod.get("initContainers", []) + pod["containers"]:
                assert container.pop("imagePullPolicy") == "IfNotPresent"
                if container["name"] == "coordinator":
                    # Several releases share a namespace.
                    container["args"].remove(f"--kubernetes-selector=baton.dev/pool,app.kubernetes.io/instance={release}")
        thing = without_release(thing, release)
        if thing["kind"] in UNLABELLED:
            del thing["metadata"]["labels"]
        if thing["kind"] == "Role":
            # A chart knows its pools.
            (scale,) = [rule for rule in thing["rules"] if rule["resources"] == ["statefulsets/scale"]]
            assert scale.pop("resourceNames") == ["decode", "prefill"]
        objects[thing["kind"], thing["metadata"]["name"]] = thing
    return objects


def differences(left, right, at=""):
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            yield from differences(left.get(key), right.get(key), f"{at}.{key}")
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for n, pair in enumerate(zip(left, right)):
            yield from differences(*pair, f"{at}[{n}]")
    elif left != right:
        yield f"{at}: {json.dumps(left)} in the overlay, {json.dumps(right)} in the chart"


def main():
    release = sys.argv[1]
    for pair in sys.argv[2:]:
        left, right = pair.split("=")
        ours, theirs = kustomized(left), chart(right, release)
        found = [f"{key} is in one only" for key in sorted(ours.keys() ^ theirs.keys())]
        for key in sorted(ours.keys() & theirs.keys()):
            found += [f"{'/'.join(key)}{it}" for it in differences(ours[key], theirs[key])]
        assert not found, f"{pair}:\n" + "\n".join(found)
        print(f"{pair}: {len(ours)} objects are equal")


main()
