//! The manifests of `deploy/kubernetes` and the chart of `deploy/helm`: rendered as an operator does
//! it, and held against Kubernetes' own schemas, against each other, and against the programs' flags.

use std::path::Path;
use std::process::Command;

use baton_tests::binaries::{build_dir, program, repository};
use baton_tests::python;
use tempfile::TempDir;

/// The schemas' release that this test was written against.
const SCHEMAS: &str = "kubernetes-validate==1.37.0";
/// Helm 4.2.3 as a library.
const HELM: &str = "helm-python-sdk==0.2.2";
/// The release's name.
const RELEASE: &str = "demo";

/// What Kustomize makes of a folder, and the values by which the chart makes the same.
const KUSTOMIZED: [(&str, &str, &str); 5] = [
    ("base", "deploy/kubernetes/base", ""),
    (
        "cpu-single-node",
        "deploy/kubernetes/overlays/cpu-single-node",
        "values-cpu-single-node.yaml",
    ),
    ("ha", "deploy/kubernetes/overlays/ha", "values-ha.yaml"),
    ("gpu-pools", "deploy/kubernetes/overlays/gpu-pools", "values-gpu-pools.yaml"),
    (
        "monitored",
        "tests/manifests/monitored",
        r#"values-ha.yaml+{"serviceMonitor": {"enabled": true}}"#,
    ),
];

/// What the chart can do besides, and what is there then.
const VALUES: [(&str, &str, &[&str]); 9] = [
    ("tls", r#"{"clusterTlsSecret": "baton-tls"}"#, &[]),
    (
        "elsewhere",
        r#"{"etcd": {"enabled": false, "urls": ["https://etcd.example:2379"]}, "cluster": "second",
            "extraEnv": [{"name": "BATON_ETCD_CA", "value": "/etcd/ca.crt"}],
            "extraVolumes": [{"name": "etcd", "secret": {"secretName": "etcd-ca"}}],
            "extraVolumeMounts": [{"name": "etcd", "mountPath": "/etcd"}],
            "networkPolicies": {"enabled": true}}"#,
        &[],
    ),
    (
        "unified",
        r#"{"pools": {"prefill": null, "decode": null, "chat": {"role": "unified", "threads": 8,
            "model": {"name": "big", "path": "big.gguf", "fetch": [], "claim": "models"},
            "extraArgs": ["--max-running=8"]}},
            "coordinator": {"extraArgs": ["--planner=dry-run", "--planner-pool=unified=1..4"]}}"#,
        &[],
    ),
    (
        "slow",
        r#"{"worker": {"startSeconds": 1200}, "pools": {"decode": {"startSeconds": 3000}}}"#,
        &["failureThreshold: 1200", "failureThreshold: 3000", "--launch-timeout=3600"],
    ),
    (
        "nccl",
        r#"{"worker": {"transports": "nccl,grpc"},
            "pools": {"vectors": {"role": "pooling", "transports": "grpc"}}}"#,
        &["name: demo-nccl", r#"values: ["decode","prefill"]"#],
    ),
    (
        "member",
        r#"{"etcd": {"replicas": 3, "initialClusterState": "existing"}}"#,
        &["--initial-cluster-state=$(STATE)", "name: STATE\n              value: existing"],
    ),
    (
        "https",
        r#"{"gateway": {"tlsSecret": "web"}, "serviceMonitor": {"enabled": true}}"#,
        &[
            "--ssl-certfile=/gateway-tls/tls.crt",
            "--ssl-keyfile=/gateway-tls/tls.key",
            "secretName: web",
        ],
    ),
    (
        "guarded",
        r#"{"gateway": {"keysSecret": "web-keys", "extraArgs": ["--guard-all"]},
            "serviceMonitor": {"enabled": true}}"#,
        &["credentials: {name: web-keys, key: api-key}"],
    ),
    (
        "ipv6",
        r#"{"ipv6": true}"#,
        &[
            "--listen=[::]:8000\n            - --advertise=http://[$(POD_IP)]:8000",
            "--listen=[::]:7700\n            - --advertise=http://[$(POD_IP)]:7700",
            "--listen=[::]:7000\n            - --advertise=http://[$(POD_IP)]:7000",
            "--listen-client-urls=http://[::]:2379",
            "--listen-peer-urls=http://[::]:2380",
        ],
    ),
];

/// Values that mean nothing, and what Helm says of them.
const REFUSED: [(&str, &str); 11] = [
    (r#"{"gateway": {"replicas": 3}}"#, "'replicas' not allowed"),
    (r#"{"pools": {"decode": {"role": "decoder"}}}"#, "at '/pools/decode/role'"),
    (r#"{"pools": {"etcd": {"role": "decode"}}}"#, "invalid propertyName 'etcd'"),
    (r#"{"etcd": {"enabled": false}}"#, "at '/etcd/urls'"),
    (r#"{"etcd": {"replicas": 2}}"#, "at '/etcd/replicas'"),
    (r#"{"worker": {"kvMemory": "1 GB"}}"#, "at '/worker/kvMemory'"),
    (r#"{"worker": {"kvMemory": "1TiB"}}"#, "at '/worker/kvMemory'"),
    (r#"{"etcd": {"initialClusterState": "old"}}"#, "at '/etcd/initialClusterState'"),
    (r#"{"gateway": {"extraArgs": ["--ssl-cert-reqs=2"]}}"#, "at '/gateway/extraArgs/0'"),
    (r#"{"worker": {"extraArgs": ["--kv-memory 1GiB", "x"]}}"#, "at '/worker/extraArgs/1'"),
    (r#"{"model": {"path": "/models/m.gguf"}}"#, "at '/model/path'"),
];

fn kustomize(folder: &str) -> String {
    let output = Command::new("kubectl").arg("kustomize").arg(repository().join(folder)).output();
    let output = output.expect("run kubectl, 1.21 or later");
    assert!(output.status.success(), "{folder}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Writes what Helm makes of each case to the folder.
async fn helm(dir: &TempDir, cases: &[(String, &str)]) {
    let chart = repository().join("deploy/helm/baton");
    let cases: Vec<String> =
        cases.iter().map(|(name, values)| format!("{name}={values}")).collect();
    let mut arguments = vec![text(&chart), RELEASE, text(dir.path())];
    arguments.extend(cases.iter().map(String::as_str));
    println!("{}", python::drive(HELM, "manifests/render.py", &arguments).await);
}

#[tokio::test]
async fn the_manifests_are_what_kubernetes_and_the_programs_take() {
    let dir = tempfile::tempdir().expect("a folder");
    for name in ["baton-gateway", "baton-worker", "baton-coordinator", "baton"] {
        program(name);
    }
    let cases = KUSTOMIZED.iter().map(|(name, _, values)| (format!("{name}-chart"), *values));
    let cases = cases.chain(VALUES.map(|(name, values, _)| (name.to_owned(), values)));
    helm(&dir, &cases.collect::<Vec<_>>()).await;

    let programs = build_dir();
    let mut valid = vec![text(&programs).to_owned()];
    let mut equal = vec![RELEASE.to_owned()];
    for (name, folder, _) in KUSTOMIZED {
        let rendered = kustomize(folder);
        // Patches go by position: each must have met what it was meant for.
        let expected: &[&str] = match name {
            "base" => &["--launch-timeout=900", "--drain-timeout=600", "name: STATE"],
            "cpu-single-node" => &["--kv-memory=256MiB", "--threads=2", "maxReplicas: 1"],
            "ha" => &["etcd-2=http://etcd-2.etcd:2380", "name: baton-postgres", "minReplicas: 2"],
            "gpu-pools" => &[
                "nvidia.com/gpu: 1",
                "nvidia.com/gpu.present: \"true\"",
                "image: baton-cuda:0.1.0\n",
            ],
            _ => &[],
        };
        for text in expected {
            assert!(rendered.contains(text), "{name} lacks {text}:\n{rendered}");
        }
        assert!(!rendered.contains("- null"), "{name}");
        let (ours, chart) = (dir.path().join(format!("{name}.yaml")), format!("{name}-chart.yaml"));
        std::fs::write(&ours, rendered).expect("write it");
        let chart = dir.path().join(chart);
        equal.push(format!("{}={}", ours.display(), chart.display()));
        valid.extend([text(&ours).to_owned(), format!("{RELEASE}={}", chart.display())]);
    }
    for (name, _, expected) in VALUES {
        let file = dir.path().join(format!("{name}.yaml"));
        let rendered = std::fs::read_to_string(&file).expect("what Helm rendered");
        for text in expected {
            assert!(rendered.contains(text), "{name} lacks {text}:\n{rendered}");
        }
        valid.push(format!("{RELEASE}={}", file.display()));
    }
    for (script, arguments) in [("manifests/validate.py", &valid), ("manifests/compare.py", &equal)]
    {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        println!("{}", python::drive(SCHEMAS, script, &arguments).await);
    }
}

/// Image, chart and programs are of one version.
/// Whether a file is left out of the context of an image's build: the last pattern that matches
/// counts. Of what patterns can be, these are the ones that the file uses.
fn ignored(file: &str, patterns: &str) -> bool {
    let lines = patterns.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut out = false;
    for line in lines {
        let (pattern, matched) = match line.strip_prefix('!') {
            Some(pattern) => (pattern, false),
            None => (line, true),
        };
        let inside = |folder: &str| file == folder || file.starts_with(&format!("{folder}/"));
        let matches = match (pattern.strip_prefix("**/"), pattern.strip_suffix("/*")) {
            (Some(name), _) => format!("/{file}/").contains(&format!("/{name}/")),
            (_, Some(folder)) => inside(folder),
            _ => inside(pattern),
        };
        if matches {
            out = matched;
        }
    }
    out
}

#[test]
fn an_image_s_build_has_the_files_that_programs_include() {
    let patterns =
        std::fs::read_to_string(repository().join(".dockerignore")).expect("it is there");
    assert!(ignored("docs/operate.md", &patterns) && ignored("gateway/target/x", &patterns));
    let root = repository().canonicalize().expect("a folder");
    let mut found = 0;
    let mut folders: Vec<_> =
        ["proto", "gateway", "worker", "coordinator"].map(|name| root.join(name)).into();
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(&folder).expect("a folder").flatten().map(|it| it.path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if path.extension().is_none_or(|end| end != "rs") {
                continue;
            }
            let source = std::fs::read_to_string(&path).expect("a source");
            let calls = source.split("include_str!(\"").chain(source.split("include_bytes!(\""));
            for file in calls.filter_map(|rest| rest.strip_prefix("../")?.split('"').next()) {
                let file = folder.join("..").join(file).canonicalize().expect(file);
                let file = text(file.strip_prefix(&root).expect("a file of the repository"));
                assert!(!ignored(file, &patterns), "{} includes {file}", path.display());
                found += 1;
            }
        }
    }
    assert!(found > 5, "{found}");
}

#[test]
fn the_version_is_the_same_everywhere() {
    let version = env!("CARGO_PKG_VERSION");
    for (file, line) in [
        ("deploy/helm/baton/Chart.yaml", format!("\nversion: {version}\n")),
        ("deploy/helm/baton/Chart.yaml", format!("\nappVersion: {version}\n")),
        ("deploy/kubernetes/base/kustomization.yaml", format!("newTag: {version}\n")),
        ("deploy/kubernetes/overlays/gpu-pools/kustomization.yaml", format!("newTag: {version}\n")),
    ] {
        let text = std::fs::read_to_string(repository().join(file)).expect("a file");
        assert!(text.contains(&line), "{file} has no line {line:?}");
    }
}

#[tokio::test]
async fn values_that_mean_nothing_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let cases = REFUSED.iter().enumerate();
    let cases: Vec<_> = cases.map(|(n, (values, _))| (format!("bad-{n}"), *values)).collect();
    helm(&dir, &cases).await;
    for (n, (values, expected)) in REFUSED.iter().enumerate() {
        let said = std::fs::read_to_string(dir.path().join(format!("bad-{n}.txt")));
        let said = said.expect("what Helm said");
        assert!(said.contains(expected), "{values}: {said}");
    }
}
