"""Holds rendered manifests against Kubernetes' schemas, against each other, and against the programs.

Usage: validate.py PROGRAMS FILE...

PROGRAMS is the folder of the programs; each FILE is what `kubectl kustomize` made of an overlay, or,
as RELEASE=FILE, what Helm made of the chart.
"""

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
from objects import load, without_release

# What the launcher asks of the API server: coordinator/src/launch/kubernetes.
NEEDS = {("apps", "statefulsets"): {"list", "watch"}, ("apps", "statefulsets/scale"): {"get", "patch"}, ("", "pods"): {"list", "watch"}}
VERSIONS = ["1.33", "1.37"]


def matches(selector, labels):
    """Whether a label selector selects these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for term in selector.get("matchExpressions", []):
        value = labels.get(term["key"])
        good = {
            "Exists": value is not None,
            "In": value in term.get("values", []),
            "NotIn": value not in term.get("values", []),
        }[term["operator"]]
        if not good:
            return False
    return True


def flag(args, name):
    return next(arg.split("=", 1)[1] for arg in args if arg.startswith(f"{name}="))


def monitors(monitor, services, gateway, https):
    """The one kind that is not Kubernetes' own: that it finds a port to read from, and may read."""
    spec, group = monitor["spec"], monitor["apiVersion"]
    assert group == "monitoring.coreos.com/v1", monitor
    assert spec.keys() == {"jobLabel", "selector", "endpoints"}, monitor
    found = [it for it in services if matches(spec["selector"], it["metadata"]["labels"])]
    # Alerts and dashboard ask for this job.
    assert {it["metadata"]["labels"][spec["jobLabel"]] for it in found} == {"baton"}, monitor
    (ports,) = [{port["name"] for port in it["spec"]["ports"]} for it in found]
    guarded = "--guard-all" in gateway["args"]
    (key,) = [it["valueFrom"]["secretKeyRef"] for it in gateway["env"] if it["name"] == "VLLM_API_KEY"]
    for endpoint in spec["endpoints"]:
        extra = ({"scheme", "tlsConfig"} if https else set()) | ({"authorization"} if guarded else set())
        assert endpoint.keys() == {"port", "path", "interval"} | extra and endpoint["port"] in ports, endpoint
        if guarded:
            assert endpoint["authorization"] == {"credentials": {"name": key["name"], "key": key["key"]}}, endpoint
        assert endpoint.get("scheme", "http") == ("https" if https else "http"), endpoint


def probe(container, kind, ports):
    """The port that a probe asks, and how."""
    asked = container[kind]
    (how,) = asked.keys() & {"grpc", "httpGet", "tcpSocket"}
    port = asked[how]["port"]
    assert port in ports or port in ports.values(), f"{kind} asks {port}"
    return how, asked[how]


def check(path, programs):
    release, _, file = path.rpartition("=")
    objects = load(file)
    services = [thing for thing in objects if thing["kind"] == "Service"]
    gateway = next(it for it in objects if it["kind"] == "Deployment" and it["metadata"]["name"].endswith("gateway"))
    gateway = gateway["spec"]["template"]["spec"]["containers"][0]
    https = any(arg.startswith("--ssl-certfile=") for arg in gateway["args"])
    for thing in objects:
        if thing["kind"] == "ServiceMonitor":
            monitors(thing, services, gateway, https)
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(thing, version, strict=True)
    if release:
        objects = [without_release(thing, release) for thing in objects]
    kinds = lambda *names: [thing for thing in objects if thing["kind"] in names]
    name = lambda thing: thing["metadata"]["name"]
    workloads = kinds("Deployment", "StatefulSet")
    pods = {name(it): it["spec"]["template"]["metadata"]["labels"] for it in workloads}
    ports, starts = {}, []

    for it in workloads:
        who, spec = name(it), it["spec"]["template"]["spec"]
        assert matches(it["spec"]["selector"], pods[who]), f"{who} does not select its pods"
        others = [other for other in pods if other != who and matches(it["spec"]["selector"], pods[other])]
        assert not others, f"{who} selects pods of {others}"
        assert spec["securityContext"]["runAsNonRoot"], who
        token = spec.get("automountServiceAccountToken", True)
        assert token == (who == "coordinator"), f"{who}: only the coordinator talks to the API"
        for container in spec.get("initContainers", []) + spec["containers"]:
            inside = container["securityContext"]
            assert inside["readOnlyRootFilesystem"] and inside["capabilities"]["drop"] == ["ALL"], who
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            volumes = {it["name"] for it in spec.get("volumes", [])}
            volumes |= {it["metadata"]["name"] for it in it["spec"].get("volumeClaimTemplates", [])}
            assert mounted <= volumes, f"{who}: {mounted - volumes} are no volumes"
        main = spec["containers"][0]
        ports[who] = {port["name"]: port["containerPort"] for port in main["ports"]}
        program = main["command"][0]
        (ready, asked), (live, _) = [probe(main, kind, ports[who]) for kind in ["readinessProbe", "livenessProbe"]]
        # A connection says nothing of the program behind it, except by TLS, which kubelets do not speak.
        tls = any(it["name"] == "BATON_CLUSTER_TLS_CA" for it in main.get("env", []))
        assert tls or "tcpSocket" not in [ready, live], f"{who} is not asked whether it answers"
        if ready == "httpGet" and who == "gateway":
            schemes = {main[kind]["httpGet"].get("scheme", "HTTP") for kind in ["readinessProbe", "livenessProbe"]}
            assert schemes == {"HTTPS" if https else "HTTP"}, f"{who} is asked by {schemes}"
        if ready == "grpc":
            service = {"baton-worker": "baton.v1.Worker", "baton-coordinator": "baton.v1.Coordinator"}
            assert asked["service"] == service[program], who
        if program.startswith("baton"):
            # Flags that it does not have, or values that it does not take, are refused before.
            command = [str(programs / program), *main["args"], "--help"]
            ran = subprocess.run(command, capture_output=True, text=True)
            assert ran.returncode == 0, f"{who}: {ran.stderr}"
        if "baton.dev/pool" in pods[who]:
            pool = pods[who]["baton.dev/pool"]
            assert it["kind"] == "StatefulSet" and "replicas" not in it["spec"], who
            assert it["metadata"]["labels"]["baton.dev/pool"] == pool == flag(main["args"], "--role")
            model = it["metadata"]["annotations"]["baton.dev/model"]
            assert model == flag(main["args"], "--served-model-name"), who
            assert it["spec"]["podManagementPolicy"] == "Parallel", who
            starts.append(main["startupProbe"]["periodSeconds"] * main["startupProbe"]["failureThreshold"])
        if any(arg.startswith("--drain-timeout=") for arg in main["args"]):
            grace = spec["terminationGracePeriodSeconds"]
            waits = main.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            assert grace > waits + int(flag(main["args"], "--drain-timeout")), who
        for term in spec["topologySpreadConstraints"]:
            assert matches(term["labelSelector"], pods[who]), who

    services = {name(it): it for it in kinds("Service")}
    for who, service in services.items():
        selected = [it for it in pods if matches({"matchLabels": service["spec"]["selector"]}, pods[it])]
        assert len(selected) == 1, f"service {who} selects {selected}"
        known = ports[selected[0]]
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            assert target in known or target in known.values(), f"service {who}: {target}"
    for it in kinds("StatefulSet"):
        assert services[it["spec"]["serviceName"]]["spec"]["clusterIP"] == "None", name(it)
    for it in kinds("PodDisruptionBudget"):
        assert [who for who in pods if matches(it["spec"]["selector"], pods[who])] == [name(it)]
    assert len(kinds("PodDisruptionBudget")) == len(workloads)
    for it in kinds("HorizontalPodAutoscaler"):
        assert it["spec"]["scaleTargetRef"]["name"] == "gateway", "pools are the coordinator's"

    (role,), (binding,) = kinds("Role"), kinds("RoleBinding")
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"] for group in rule["apiGroups"] for resource in rule["resources"]
    }
    assert allowed == NEEDS, f"the Role allows {allowed}"
    for rule in role["rules"]:
        pools = {who for who in pods if "baton.dev/pool" in pods[who]}
        assert set(rule.get("resourceNames", pools)) == pools, rule
    coordinator = next(it for it in workloads if name(it) == "coordinator")["spec"]["template"]["spec"]
    patience = int(flag(coordinator["containers"][0]["args"], "--launch-timeout"))
    assert patience > max(starts), f"a launch is given up after {patience} s, while a worker may take {max(starts)}"
    account = coordinator["serviceAccountName"]
    assert [it["name"] for it in binding["subjects"]] == [account] == [name(it) for it in kinds("ServiceAccount")]

    # Who must reach whom, by the policies alone.
    def reaches(client, server, port):
        policies = [it for it in kinds("NetworkPolicy") if matches(it["spec"]["podSelector"], pods[server])]
        assert policies, f"{server} is open to everybody"
        return any(
            any(entry["port"] == port for entry in rule.get("ports", [{"port": port}]))
            and ("from" not in rule or (client and any(matches(it["podSelector"], pods[client]) for it in rule["from"])))
            for policy in policies for rule in policy["spec"].get("ingress", [])
        )

    workers = [who for who in pods if "baton.dev/pool" in pods[who]]
    wanted = {(None, "gateway", 8000), ("gateway", "coordinator", 7700), ("coordinator", "coordinator", 7700), ("etcd", "etcd", 2380)}
    wanted |= {(client, server, 7000) for server in workers for client in ["gateway", "coordinator", *workers]}
    wanted |= {(client, "etcd", 2379) for client in pods}
    for server in pods:
        for port in ports[server].values():
            for client in [None, *pods]:
                open_to = (client, server, port) in wanted or (None, server, port) in wanted
                assert reaches(client, server, port) == open_to, f"{client} to {server}:{port}: {not open_to}"
    # NCCL takes any port, between those who speak it.
    args = {name(it): it["spec"]["template"]["spec"]["containers"][0]["args"] for it in workloads}
    speak = {who for who in workers if "nccl" in flag(args[who], "--transports").split(",")}
    for server in pods:
        for client in [None, *pods]:
            open_to = client in speak and server in speak
            assert reaches(client, server, 40000) == open_to, f"{client} to {server} by NCCL: {not open_to}"
    return len(objects), {name(it): it for it in objects if it["kind"] != "Namespace"}


def main():
    programs = Path(sys.argv[1])
    for path in sys.argv[2:]:
        count, _ = check(path, programs)
        print(f"{path}: {count} objects")


main()
