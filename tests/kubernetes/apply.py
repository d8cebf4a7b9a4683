"""Applies Baton's manifests to a real Kubernetes and lives with them; nodes are a double (node.py).

Usage: apply.py KUBECONFIG FOLDER BATON IMAGE ETCD OUTSIDE CHECK...

FOLDER is for files of the nodes; BATON and ETCD are the root file systems of the images, IMAGE is what
`buildah inspect` says of the first; OUTSIDE is the network from which models are fetched, a file of
/proc. Each check is an overlay of deploy/kubernetes that is applied to a namespace of its own, and
prints a line for all that was seen; the exit code is 1 if one did not hold.
"""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml
from node import MERGE, SERVER_SIDE, Api, Nodes, Refused, register

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
# All that there were.
BEDS = []
PATHS = {
    "Deployment": "apps/v1/namespaces/{}/deployments",
    "HorizontalPodAutoscaler": "autoscaling/v2/namespaces/{}/horizontalpodautoscalers",
    "Namespace": "v1/namespaces",
    "NetworkPolicy": "networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "PodDisruptionBudget": "policy/v1/namespaces/{}/poddisruptionbudgets",
    "Role": "rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "Secret": "v1/namespaces/{}/secrets",
    "Service": "v1/namespaces/{}/services",
    "ServiceAccount": "v1/namespaces/{}/serviceaccounts",
    "StatefulSet": "apps/v1/namespaces/{}/statefulsets",
}


def path(kind, namespace):
    path = PATHS[kind].format(namespace)
    return f"/api/{path}" if path.startswith("v1/") else f"/apis/{path}"


def eventually(what, within, look):
    """What `look` returns, once it is something; it may raise AssertionError until then."""
    until = time.monotonic() + within
    while True:
        try:
            found = look()
            if found:
                return found
            why = found
        except (AssertionError, OSError, KeyError, IndexError) as error:
            why = repr(error)
        if time.monotonic() > until:
            raise AssertionError(f"not within {within} s: {what}; at last: {why}")
        time.sleep(0.2)


class Bed:
    """An overlay in its namespace."""

    def __init__(self, api, overlay, names, nodes, secrets=()):
        self.api, self.overlay, self.namespace = api, overlay, f"baton-{overlay}"
        images, outside, folder = nodes
        folder = Path(folder) / overlay
        folder.mkdir(parents=True)
        for number in range(3):
            volume = {
                "metadata": {"name": f"{overlay}-{number}"},
                "spec": {
                    "capacity": {"storage": "2Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "hostPath": {"path": str(folder / "claims" / f"{overlay}-{number}")},
                },
            }
            api.call("POST", "/api/v1/persistentvolumes", volume)
        self.objects = self.render()
        self.secrets = secrets
        self.apply()
        self.nodes = None
        BEDS.append(self)
        if names:
            self.nodes = Nodes(api, self.namespace, names, images, outside, folder)

    def render(self):
        folder = ROOT / "deploy/kubernetes/overlays" / self.overlay
        text = subprocess.run(
            ["kubectl", "kustomize", folder], capture_output=True, check=True
        ).stdout
        objects = [it for it in yaml.safe_load_all(text) if it]
        # As `namespace: …` in an overlay of one's own.
        for it in objects:
            owner = "name" if it["kind"] == "Namespace" else "namespace"
            assert it["metadata"][owner] == "baton", it["metadata"]
            it["metadata"][owner] = self.namespace
            for subject in it.get("subjects", []):
                subject["namespace"] = self.namespace
        return objects

    def apply(self):
        """As `kubectl apply --server-side --validate=strict`."""
        first = [it for it in self.objects if it["kind"] == "Namespace"]
        for name, data in self.secrets:
            first.append({"apiVersion": "v1", "kind": "Secret", "stringData": data,
                          "metadata": {"name": name, "namespace": self.namespace}})  # fmt: skip
        for it in first + [it for it in self.objects if it["kind"] != "Namespace"]:
            query = "fieldManager=operator&fieldValidation=Strict"
            at = f"{path(it['kind'], self.namespace)}/{it['metadata']['name']}?{query}"
            self.api.call("PATCH", at, it, SERVER_SIDE)

    def ready(self, within=240):
        """Waits until all that was applied is there, and says how many pods."""

        def look():
            pods = 0
            for kind in ("Deployment", "StatefulSet"):
                for it in self.api.items(path(kind, self.namespace)):
                    wanted, status = it["spec"]["replicas"], it["status"]
                    have = (status.get("readyReplicas", 0), status.get("updatedReplicas", 0))
                    name = it["metadata"]["name"]
                    assert status.get("observedGeneration") == it["metadata"]["generation"], name
                    assert have == (wanted, wanted), f"{name}: {have} of {wanted}"
                    assert status.get("replicas", 0) == wanted, f"{name}: {status}"
                    pods += wanted
            names = self.nodes.hosts.read_text().split()
            for it in self.api.items(path("Service", self.namespace)):
                assert it["metadata"]["name"] in names, f"no name yet: {it['metadata']['name']}"
            return pods

        return eventually("everything is ready", within, look)

    def gateways(self):
        """Addresses that the Service has."""
        at = f"/apis/discovery.k8s.io/v1/namespaces/{self.namespace}/endpointslices"
        slices = self.api.items(f"{at}?labelSelector=kubernetes.io/service-name%3Dgateway")
        return [
            f"http://{endpoint['addresses'][0]}:{found['ports'][0]['port']}"
            for found in slices
            for endpoint in found.get("endpoints") or []
            if endpoint["conditions"]["ready"]
        ]

    def baton(self, *args):
        """`kubectl exec deploy/coordinator -- baton …`."""
        code, out, err = self.nodes.of("coordinator")[0].run_in("baton", *args)
        assert code == 0, f"baton {' '.join(args)}: {code}\n{out}\n{err}"
        return out

    def patch(self, kind, name, body):
        self.api.call("PATCH", f"{path(kind, self.namespace)}/{name}", body, MERGE)

    def restart(self, kind, name):
        """`kubectl rollout restart`."""
        annotations = {"kubectl.kubernetes.io/restartedAt": str(time.time())}
        template = {"metadata": {"annotations": annotations}}
        self.patch(kind, name, {"spec": {"template": template}})
        self.ready()

    def evict(self, pod):
        """`kubectl drain`, for one pod: whether it may go."""
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
        try:
            self.api.call("POST", f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction", body)
            return True
        except Refused as error:
            assert error.status == 429, error
            return False

    def remove(self):
        """`kubectl delete namespace`, to the end."""
        began = time.monotonic()
        self.api.call("DELETE", f"/api/v1/namespaces/{self.namespace}")
        # Kubernetes looks again after half of the longest grace period, the gateways' eleven minutes:
        # so long the empty namespace stays.
        pods = f"/api/v1/namespaces/{self.namespace}/pods"
        eventually("all pods are gone", 120, lambda: not self.api.items(pods))
        took = time.monotonic() - began
        # etcd ends by the signal that it was sent.
        bad = [it for it in self.nodes.ended if it[1] != (-15 if it[0].startswith("etcd-") else 0)]
        assert not bad, f"ended otherwise than well: {bad}"
        ended, names = len(self.nodes.ended), self.nodes.names
        self.stop()
        for name in names:
            self.api.call("DELETE", f"/api/v1/nodes/{name}")
        return f"all pods are gone after {took:.0f} s; all {ended} that ended since the start ended well"

    def stop(self):
        """Ends whatever runs."""
        if self.nodes:
            self.nodes.stop()
            self.nodes = None


class Unanswered(OSError):
    """A chat's error."""


def ask(gateway):
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 16,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{gateway}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        raise Unanswered(
            f"{error.code} retry-after={error.headers['Retry-After']} {text}"
        ) from None


class Traffic:
    """A client that asks one gateway of the Service after the other, and never again."""

    def __init__(self, bed):
        self.bed, self.good, self.bad, self.stopped = bed, 0, [], False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        turn = 0
        while not self.stopped:
            turn += 1
            try:
                gateways = self.bed.gateways()
                assert gateways, "no gateway is ready"
                answer = ask(gateways[turn % len(gateways)])
                assert answer == ANSWER, answer
                self.good += 1
            except (OSError, AssertionError, Refused, http.client.HTTPException) as error:
                self.bad.append(repr(error))
            time.sleep(0.05)

    def end(self, may=lambda bad: False):
        """Ends it; each failure must be one that `may` be."""
        eventually("chats are answered", 30, lambda: self.good > 3)
        assert self.thread.is_alive(), "the client has ended"
        self.stopped = True
        self.thread.join()
        bad = [bad for bad in self.bad if not may(bad)]
        assert not bad, f"{len(bad)} of {self.good + len(self.bad)}: {bad[:3]}"
        return f"{self.good} chats meanwhile, all answered"


def say(what):
    print(f"ok     {what}", flush=True)


def single_node(api, *nodes):
    """All on one node: install, scale, crash, roll, uninstall."""
    began = time.monotonic()
    bed = Bed(api, "cpu-single-node", ["node-a"], nodes)
    pods = bed.ready()
    took = time.monotonic() - began
    gateway = eventually("the Service has a gateway", 30, bed.gateways)[0]
    assert ask(gateway) == ANSWER
    say(f"applied: {len(bed.objects)} objects, {pods} pods ready after {took:.0f} s; it answers")

    bed.apply()
    assert bed.ready(10) == pods
    say("applied again: nothing changes")

    status = bed.baton("status")
    seen = ["coordinator (leads)", "decode-0", "gateway", "prefill-0"]
    assert all(it in status for it in seen), status
    traffic = Traffic(bed)
    bed.baton("scale", "--pool", "decode", "2")
    names = [pod.name for pod in bed.nodes.of("decode")]
    assert names == ["decode-0", "decode-1"], names
    bed.apply()
    bed.ready()
    assert len(bed.nodes.of("decode")) == 2, "applying again has not undone it"
    bed.baton("scale", "--pool", "decode", "1")
    say(f"kubectl exec … baton scale 2, applied again, scale 1: {traffic.end()}")

    traffic = Traffic(bed)
    worker = bed.nodes.of("decode")[0]
    worker.process.kill()
    began = time.monotonic()
    eventually("it runs again", 60, lambda: worker.restarts == 1)
    eventually("it answers again", 60, lambda: ask(bed.gateways()[0]) == ANSWER)
    took = time.monotonic() - began
    traffic.end(lambda bad: re.search("retry-after=[1-9]|no gateway", bad))
    bed.ready()
    say(
        f"the only decode worker killed: serves again after {took:.1f} s; {traffic.good} chats"
        f" answered, {len(traffic.bad)} told when to come again, or there was no ready gateway"
    )

    for kind, name in ("Deployment", "gateway"), ("Deployment", "coordinator"):
        traffic = Traffic(bed)
        bed.restart(kind, name)
        say(f"kubectl rollout restart {name}: {traffic.end()}")
    bed.baton("scale", "--pool", "prefill", "2")
    bed.baton("scale", "--pool", "decode", "2")
    for name in "prefill", "decode":
        traffic = Traffic(bed)
        bed.restart("StatefulSet", name)
        say(f"kubectl rollout restart {name}, of two: {traffic.end()}")

    traffic = Traffic(bed)
    api.call("DELETE", f"/api/v1/namespaces/{bed.namespace}/pods/etcd-0")
    time.sleep(5)
    bed.ready()
    time.sleep(5)
    say(f"the only etcd deleted, and started again on its volume: {traffic.end()}")
    assert "decode-1" in bed.baton("status"), bed.baton("status")
    say(f"kubectl delete namespace: {bed.remove()}")


def ha(api, *nodes):
    """Three nodes in three zones: spread, budgets, the loss of a node."""
    secrets = [("baton-postgres", {"url": "none"})]
    began = time.monotonic()
    bed = Bed(api, "ha", ["node-a", "node-b", "node-c"], nodes, secrets)
    # Without metrics nobody raises it: what the autoscaler does at its least size.
    bed.patch("Deployment", "gateway", {"spec": {"replicas": 2}})
    bed.ready()
    for pool in "prefill", "decode":
        bed.baton("scale", "--pool", pool, "2")
    pods = bed.ready()
    took = time.monotonic() - began
    for component in "etcd", "coordinator", "gateway", "prefill", "decode":
        there = bed.nodes.of(component)
        assert len({pod.node for pod in there}) == len(there), f"{component} shares a node"
    assert ask(bed.gateways()[0]) == ANSWER
    say(
        f"applied: {len(bed.objects)} objects, {pods} pods ready, no two of a kind on a node; {took:.0f} s"
    )

    traffic = Traffic(bed)
    node = "node-b"
    left = [pod for pod in list(bed.nodes.pods.values()) if pod.node == node]
    api.call("PATCH", f"/api/v1/nodes/{node}", {"spec": {"unschedulable": True}}, MERGE)
    refused = 0
    for pod in left:
        until = time.monotonic() + 120
        while not bed.evict(pod.name):
            assert time.monotonic() < until, f"{pod.name} may not go"
            refused += 1
            time.sleep(0.5)
        if pod.labels["app.kubernetes.io/component"] == "etcd":
            other = next(it for it in bed.nodes.of("etcd") if it.node != node)
            assert not bed.evict(other.name), "two of three members may go"
    eventually("the node is empty", 120, lambda: not any(
        pod.node == node and pod.process.poll() is None for pod in list(bed.nodes.pods.values())))  # fmt: skip
    say(f"kubectl drain {node}, {len(left)} pods: budgets held {refused} times; {traffic.end()}")
    api.call("PATCH", f"/api/v1/nodes/{node}", {"spec": {"unschedulable": None}}, MERGE)
    bed.ready()
    say(f"kubectl delete namespace: {bed.remove()}")


def gpu_pools(api, *nodes):
    """Where pods go; none is run, for want of a GPU."""
    register(api, "node-cpu", {})
    register(api, "node-gpu", {"nvidia.com/gpu.present": "true"}, {"nvidia.com/gpu": "2"})
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    api.call("PATCH", "/api/v1/nodes/node-gpu", {"spec": {"taints": [taint]}}, MERGE)
    bed = Bed(api, "gpu-pools", [], nodes)

    def bound():
        pods = api.items(f"/api/v1/namespaces/{bed.namespace}/pods")
        places = {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod["spec"].get("nodeName")
                  for pod in pods}  # fmt: skip
        assert len(places) == 5 and all(places.values()), places
        return places

    places = eventually("all pods are bound", 60, bound)
    workers = {places.pop("prefill"), places.pop("decode")}
    assert workers == {"node-gpu"}, workers
    assert set(places.values()) == {"node-cpu"}, places
    say(
        f"applied: {len(bed.objects)} objects; workers are bound to a node with GPUs, others are not"
    )
    for name in "node-cpu", "node-gpu":
        api.call("DELETE", f"/api/v1/nodes/{name}")


CHECKS = {"cpu-single-node": single_node, "gpu-pools": gpu_pools, "ha": ha}


def main():
    kubeconfig, folder, baton, image, etcd, outside = sys.argv[1:7]
    # Pods end with this process, also where it is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    api = Api(kubeconfig)
    version = api.get("/version")["gitVersion"]
    print(f"Kubernetes {version}, with a double of nodes", flush=True)
    variables = json.loads(Path(image).read_text())["OCIv1"]["config"]["Env"]
    variables = dict(variable.split("=", 1) for variable in variables)
    images = {
        "baton:0.1.0": (baton, variables),
        "quay.io/coreos/etcd:v3.5.21": (etcd, {"PATH": "/usr/local/bin:/usr/bin"}),
    }
    held = True
    for name in sys.argv[7:] or CHECKS:
        try:
            CHECKS[name](api, images, outside, folder)
        except (AssertionError, OSError, Refused) as error:
            held = False
            print(f"FAILED {name}: {error!r}", flush=True)
            break
        finally:
            for bed in BEDS:
                bed.stop()
    sys.exit(not held)


main()
