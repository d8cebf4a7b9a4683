"""A double of nodes: runs the pods that a real scheduler binds to them.

What a kubelet, a container runtime and the network do for a pod, as far as Baton's manifests ask for
it: init containers, then the container, each in the root file system of its image, as its user, with
its volumes, read-only where it says so; service accounts' tokens; startup, readiness and liveness
probes; restarts; preStop, SIGTERM and SIGKILL in their time. A pod's process ends with this one.

Unlike a real one: all pods share one network, of which each has an address, which stands in its
arguments in the place of 0.0.0.0; init containers have the machine's. Names of Services are lines of
/etc/hosts, from the EndpointSlices of the real controller; a Service without a selected pod that is
ready has none. Authorities to trust are the machine's, which may be behind a proxy. Policies of the network
and limits of resources do nothing.
"""

import base64
import http.client
import json
import os
import re
import shutil
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import grpc

# Of which the network's namespace has all addresses.
NETWORK = "10.78.0."
SERVER_SIDE = "application/apply-patch+yaml"
STRATEGIC = "application/strategic-merge-patch+json"
MERGE = "application/merge-patch+json"


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Refused(Exception):
    """The API server's answer, with its status."""

    def __init__(self, status, text):
        super().__init__(f"{status}: {text}")
        self.status = status


class Api:
    """An administrator at the API server."""

    def __init__(self, kubeconfig):
        config = json.loads(Path(kubeconfig).read_text())
        cluster = config["clusters"][0]["cluster"]
        self.server = cluster["server"]
        self.token = config["users"][0]["user"]["token"]
        self.tls = ssl.create_default_context(cafile=cluster["certificate-authority"])

    def call(self, method, path, body=None, kind="application/json"):
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.server + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=15, context=self.tls) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            try:
                text = json.loads(text)["message"]
            except (ValueError, KeyError):
                pass
            raise Refused(error.code, text) from None

    def get(self, path):
        return self.call("GET", path)

    def items(self, path):
        return self.get(path)["items"]


def register(api, name, labels, more_room=()):
    """Makes a node that is ready, as its kubelet would."""
    labels = labels | {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
    api.call("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": labels}})
    room = {"cpu": "16", "memory": "64Gi", "pods": "110", "ephemeral-storage": "100Gi"}
    room |= dict(more_room)
    ready = {"type": "Ready", "status": "True", "reason": "Double"}
    status = {"capacity": room, "allocatable": room, "conditions": [ready]}
    api.call("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, STRATEGIC)
    # The API server's own, of a new node, which a controller takes away that does not run.
    api.call("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": None}}, MERGE)


class Nodes:
    """Several nodes of one namespace's pods.

    `images` has for each image's name the folder of its root file system, and its environment.
    """

    def __init__(self, api, namespace, names, images, outside, folder):
        self.api, self.namespace, self.images, self.outside = api, namespace, images, outside
        self.folder = Path(folder)
        self.names = set(names)
        self.base = f"/api/v1/namespaces/{namespace}"
        self.hosts = self.folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        self.pods = {}
        # What came of containers that were told to end.
        self.ended = []
        self.addresses = iter(range(2, 250))
        self.stopped = False
        for number, name in enumerate(names):
            register(api, name, {"topology.kubernetes.io/zone": f"zone-{number}"})
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.stopped:
            try:
                self.look()
                self.name()
            except (OSError, Refused) as error:
                print(f"node: {error}", flush=True)
            time.sleep(0.2)

    def look(self):
        there = set()
        for pod in self.api.items(f"{self.base}/pods"):
            uid = pod["metadata"]["uid"]
            there.add(uid)
            if pod["spec"].get("nodeName") not in self.names:
                continue
            if uid not in self.pods:
                if "deletionTimestamp" in pod["metadata"]:
                    self.delete(pod)
                    continue
                address = f"{NETWORK}{next(self.addresses)}"
                self.pods[uid] = Pod(self, pod, address)
            elif "deletionTimestamp" in pod["metadata"]:
                self.pods[uid].end(pod["metadata"].get("deletionGracePeriodSeconds", 30))
        for uid in set(self.pods) - there:
            self.pods.pop(uid).kill()

    def delete(self, pod):
        """Says that nothing of a pod runs any more."""
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        try:
            self.api.call("DELETE", f"{self.base}/pods/{pod['metadata']['name']}", body)
        except Refused as error:
            if error.status not in (404, 409):
                raise

    def name(self):
        """Writes the names of Services down."""
        lines = ["127.0.0.1 localhost"]
        slices = self.api.items(
            f"/apis/discovery.k8s.io/v1/namespaces/{self.namespace}/endpointslices"
        )
        for found in slices:
            service = found["metadata"]["labels"]["kubernetes.io/service-name"]
            for endpoint in found.get("endpoints") or []:
                if not endpoint.get("conditions", {}).get("ready"):
                    continue
                names = [service]
                if "hostname" in endpoint:
                    names.append(f"{endpoint['hostname']}.{service}")
                for name in names:
                    full = f"{name}.{self.namespace}"
                    lines.append(f"{endpoint['addresses'][0]} {name} {full} {full}.svc")
        text = "\n".join(lines) + "\n"
        if text != self.hosts.read_text():
            self.hosts.write_text(text)

    def of(self, component):
        """The pods of a component that are not about to end, by name."""
        label = "app.kubernetes.io/component"
        pods = [pod for pod in list(self.pods.values()) if pod.grace is None]
        pods = [pod for pod in pods if pod.labels.get(label) == component]
        return sorted(pods, key=lambda pod: pod.name)

    def stop(self):
        self.stopped = True
        self.thread.join()
        for pod in list(self.pods.values()):
            pod.kill()


class Pod:
    """One pod: a thread, and at most one process at a time."""

    def __init__(self, nodes, pod, address):
        self.nodes, self.api = nodes, nodes.api
        self.metadata, self.spec = pod["metadata"], pod["spec"]
        self.name, self.labels = self.metadata["name"], self.metadata.get("labels", {})
        self.node, self.address = self.spec["nodeName"], address
        self.folder = nodes.folder / "pods" / self.metadata["uid"]
        (self.folder / "logs").mkdir(parents=True)
        self.process = None
        # Their folders, by name: made once, whatever is run in the pod afterwards.
        self.volumes = {}
        self.restarts = 0
        self.started_at = now()
        self.grace = None
        self.told = None
        self.uid = self.spec.get("securityContext", {}).get("runAsUser", 0)
        self.group = self.spec.get("securityContext", {}).get("runAsGroup", 0)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    # What its owner asks for.

    def end(self, grace):
        self.grace = grace if self.grace is None else min(self.grace, grace)

    def kill(self):
        self.grace = 0
        process = self.process
        if process and process.poll() is None:
            process.kill()
            process.wait()

    def run_in(self, *command):
        """Runs a command in the container, as `kubectl exec` does."""
        container = self.spec["containers"][0]
        done = subprocess.run(
            self.command(container, command),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    # Its life.

    def run(self):
        try:
            for container in self.spec.get("initContainers", []):
                while not self.initialize(container):
                    self.tell(container=None, state="waiting", reason="Init:Error")
                    if self.pause(2):
                        return self.gone()
            container = self.spec["containers"][0]
            while self.grace is None:
                self.live(container)
                if self.grace is None:
                    self.restarts += 1
                    self.tell(container, "waiting", reason="CrashLoopBackOff")
                    self.pause(min(10, self.restarts))
        except Exception as error:
            print(f"node: {self.name}: {error!r}", flush=True)
            raise
        self.gone()

    def pause(self, seconds):
        """Waits, and says whether the pod is to end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.grace is None:
            time.sleep(0.1)
        return self.grace is not None

    def gone(self):
        shutil.rmtree(self.folder / "volumes", ignore_errors=True)
        self.nodes.delete({"metadata": self.metadata})

    def initialize(self, container):
        self.tell(container=None, state="waiting", reason="PodInitializing")
        self.begin(container, ["nsenter", f"--net={self.nodes.outside}"])
        while self.process.poll() is None:
            if self.grace is not None:
                self.process.terminate()
            time.sleep(0.1)
        return self.process.returncode == 0 or self.grace is not None

    def live(self, container):
        """From a container's start to its end."""
        self.begin(container)
        self.started_at = now()
        probes = {
            name: Probe(self, container, container[f"{name}Probe"])
            for name in ("startup", "readiness", "liveness")
            if f"{name}Probe" in container
        }
        started = "startup" not in probes
        while self.grace is None:
            if self.process.poll() is not None:
                return
            if not started:
                verdict = probes["startup"].ask()
                started = verdict is True
                if verdict is False:
                    print(f"node: {self.name}: its startup probe failed", flush=True)
                    break
                ready = False
            else:
                ready = "readiness" not in probes or probes["readiness"].ask() is True
                if "liveness" in probes and probes["liveness"].ask() is False:
                    print(f"node: {self.name}: its liveness probe failed", flush=True)
                    break
            self.tell(container, "running", ready=ready, started=started)
            time.sleep(0.1)
        grace = self.grace
        if grace is None:
            grace = self.spec.get("terminationGracePeriodSeconds", 30)
        until = time.monotonic() + grace
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        self.tell(container, "running", ready=False, started=True)
        time.sleep(min(sleep, grace))
        self.process.terminate()
        while self.process.poll() is None:
            if time.monotonic() > until:
                print(f"node: {self.name}: killed after {grace} s", flush=True)
                self.process.kill()
            time.sleep(0.05)
        self.nodes.ended.append((self.name, self.process.returncode))

    # Its container.

    def begin(self, container, within=()):
        command = self.command(container, container["command"] + container.get("args", []))
        command = [*within, *command]
        place = self.folder / "logs" / f"{container['name']}.{self.restarts}"
        with place.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def command(self, container, words):
        """What runs these words in a container's file system, environment and rights."""
        root, _ = self.nodes.images[container["image"]]
        env = self.environment(container)
        words = [self.expand(word, env).replace("0.0.0.0", self.address) for word in words]
        mounts = [f"mount --bind {root} {root}"]
        given = {
            "/proc": "/proc",
            "/dev": "/dev",
            "/etc/hosts": self.nodes.hosts,
            "/etc/resolv.conf": "/etc/resolv.conf",
            # Whom this machine trusts.
            "/etc/ssl/certs/ca-certificates.crt": "/etc/ssl/certs/ca-certificates.crt",
        }
        for place, source in given.items():
            at = Path(f"{root}{place}")
            at.parent.mkdir(parents=True, exist_ok=True)
            if Path(source).is_dir():
                at.mkdir(exist_ok=True)
            else:
                at.touch()
            mounts.append(f"mount --bind {source} {at}")
        for mount in container.get("volumeMounts", []):
            at = Path(f"{root}{mount['mountPath']}")
            at.mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {self.volume(mount['name'])} {at}")
            if mount.get("readOnly"):
                mounts.append(f"mount -o remount,bind,ro {at}")
        rights = container.get("securityContext", {})
        if rights.get("readOnlyRootFilesystem"):
            mounts.append(f"mount -o remount,bind,ro {root}")
        groups = self.spec.get("securityContext", {}).get("fsGroup", self.group)
        script = " && ".join(mounts) + ' && exec "$@"'
        return [
            "unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh",
            "setpriv", "--no-new-privs",
            "env", "-i", *(f"{name}={value}" for name, value in env.items()),
            "/usr/sbin/chroot", f"--userspec={self.uid}:{self.group}", f"--groups={groups}", str(root),
            *words,
        ]  # fmt: skip

    def environment(self, container):
        server = self.api.server.removeprefix("https://").split(":")
        _, image = self.nodes.images[container["image"]]
        env = image | {"KUBERNETES_SERVICE_HOST": server[0], "KUBERNETES_SERVICE_PORT": server[1]}
        for variable in container.get("env", []):
            source = variable.get("valueFrom")
            if source is None:
                value = self.expand(variable.get("value", ""), env)
            elif "fieldRef" in source:
                fields = {
                    "status.podIP": self.address,
                    "metadata.name": self.name,
                    "metadata.namespace": self.nodes.namespace,
                }
                value = fields[source["fieldRef"]["fieldPath"]]
            else:
                value = self.secret(source["secretKeyRef"])
            if value is not None:
                env[variable["name"]] = value
        return env

    def secret(self, wanted):
        try:
            secret = self.api.get(f"{self.nodes.base}/secrets/{wanted['name']}")
        except Refused:
            if wanted.get("optional"):
                return None
            raise
        return base64.b64decode(secret["data"][wanted["key"]]).decode()

    @staticmethod
    def expand(text, env):
        return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda it: env.get(it[1], it[0]), text)

    def volume(self, name):
        """The folder of a volume."""
        if name not in self.volumes:
            self.volumes[name] = self.make(name)
        return self.volumes[name]

    def make(self, name):
        volume = next(it for it in self.spec["volumes"] if it["name"] == name)
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            claim = self.api.get(f"{self.nodes.base}/persistentvolumeclaims/{claim}")
            assert claim["status"]["phase"] == "Bound", claim["status"]
            folder = self.nodes.folder / "claims" / claim["spec"]["volumeName"]
        else:
            folder = self.folder / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        if "projected" in volume:
            self.project(volume["projected"], folder)
        elif "emptyDir" in volume or "persistentVolumeClaim" in volume:
            group = self.spec.get("securityContext", {}).get("fsGroup")
            if group is None:
                folder.chmod(0o777)
            else:
                os.chown(folder, 0, group)
                folder.chmod(0o2775)
        else:
            raise ValueError(f"a volume of another kind: {volume}")
        return folder

    def project(self, projected, folder):
        for source in projected["sources"]:
            if "serviceAccountToken" in source:
                wanted = source["serviceAccountToken"]
                account = self.spec["serviceAccountName"]
                bound = {"kind": "Pod", "apiVersion": "v1", "name": self.name}
                bound["uid"] = self.metadata["uid"]
                spec = {"expirationSeconds": wanted["expirationSeconds"], "boundObjectRef": bound}
                path = f"{self.nodes.base}/serviceaccounts/{account}/token"
                token = self.api.call("POST", path, {"spec": spec})
                (folder / wanted["path"]).write_text(token["status"]["token"])
            elif "configMap" in source:
                wanted = source["configMap"]
                found = self.api.get(f"{self.nodes.base}/configmaps/{wanted['name']}")
                for item in wanted["items"]:
                    (folder / item["path"]).write_text(found["data"][item["key"]])
            else:
                for item in source["downwardAPI"]["items"]:
                    (folder / item["path"]).write_text(self.nodes.namespace)

    # What the API server knows of it.

    def tell(self, container, state, ready=False, started=False, reason=None):
        said = (state, ready, started, reason, self.restarts)
        if said == self.told:
            return
        initialized = container is not None
        inner = {"running": {"startedAt": self.started_at}}
        if state == "waiting":
            inner = {"waiting": {"reason": reason}}
        shown = container or self.spec["containers"][0]
        conditions = {
            "Initialized": initialized,
            "ContainersReady": ready,
            "Ready": ready,
        }
        status = {
            "phase": "Running" if initialized else "Pending",
            "startTime": self.metadata["creationTimestamp"],
            "hostIP": "127.0.0.1",
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "conditions": [
                {"type": name, "status": str(value), "lastTransitionTime": now()}
                for name, value in conditions.items()
            ],
            "containerStatuses": [
                {
                    "name": shown["name"],
                    "image": shown["image"],
                    "imageID": "",
                    "ready": ready,
                    "started": started,
                    "restartCount": self.restarts,
                    "state": inner,
                }
            ],
        }
        body = {"metadata": {"uid": self.metadata["uid"]}, "status": status}
        try:
            self.api.call("PATCH", f"{self.nodes.base}/pods/{self.name}/status", body, STRATEGIC)
            self.told = said
        except (Refused, OSError) as error:
            if not isinstance(error, Refused) or error.status not in (404, 409):
                print(f"node: {self.name}: {error}", flush=True)


class Probe:
    """One probe, asked in its period."""

    def __init__(self, pod, container, probe):
        self.pod, self.probe = pod, probe
        self.ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        self.timeout = probe.get("timeoutSeconds", 1)
        self.period = probe.get("periodSeconds", 10)
        self.due = time.monotonic() + probe.get("initialDelaySeconds", 0)
        self.failures = 0
        self.verdict = None

    def ask(self):
        """True after a success, False after as many failures as it allows, else as before."""
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + self.period
            if self.answers():
                self.failures, self.verdict = 0, True
            else:
                self.failures += 1
                if self.failures >= self.probe.get("failureThreshold", 3):
                    self.verdict = False
        return self.verdict

    def answers(self):
        if "grpc" in self.probe:
            wanted = self.probe["grpc"]
            service = wanted.get("service", "").encode()
            request = b"\x0a" + bytes([len(service)]) + service if service else b""
            with grpc.insecure_channel(f"{self.pod.address}:{wanted['port']}") as channel:
                check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
                try:
                    # HealthCheckResponse: field 1 is SERVING, 1.
                    return check(request, timeout=self.timeout) == b"\x08\x01"
                except grpc.RpcError:
                    return False
        wanted = self.probe["httpGet"]
        port = self.ports.get(wanted["port"], wanted["port"])
        connection = http.client.HTTPConnection(self.pod.address, port, timeout=self.timeout)
        try:
            connection.request("GET", wanted["path"])
            return 200 <= connection.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
