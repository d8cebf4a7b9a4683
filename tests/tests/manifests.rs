//! The manifests of `deploy/kubernetes`: rendered as an operator does it, and held against
//! Kubernetes' own schemas, against each other, and against the programs' flags.

use std::process::Command;

use baton_tests::binaries::{build_dir, program, repository};
use baton_tests::python;

/// The schemas' release that this test was written against.
const SCHEMAS: &str = "kubernetes-validate==1.37.0";

fn render(overlay: &str) -> String {
    let folder = repository().join("deploy/kubernetes/overlays").join(overlay);
    let output = Command::new("kubectl").arg("kustomize").arg(&folder).output();
    let output = output.expect("run kubectl, 1.21 or later");
    assert!(output.status.success(), "{overlay}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn the_manifests_are_what_kubernetes_and_the_programs_take() {
    let dir = tempfile::tempdir().expect("a folder");
    for name in ["baton-gateway", "baton-worker", "baton-coordinator", "baton"] {
        program(name);
    }
    let mut arguments = vec![build_dir().to_str().expect("UTF-8").to_owned()];
    for (overlay, expected) in [
        ("cpu-single-node", &["--kv-memory=256MiB", "--threads=2", "maxReplicas: 1"][..]),
        ("ha", &["etcd-2=http://etcd-2.etcd:2380", "name: baton-postgres", "minReplicas: 2"]),
    ] {
        let rendered = render(overlay);
        // Patches go by position: each must have met what it was meant for.
        for text in expected {
            assert!(rendered.contains(text), "{overlay} lacks {text}:\n{rendered}");
        }
        assert!(!rendered.contains("- null"), "{overlay}");
        let path = dir.path().join(format!("{overlay}.yaml"));
        std::fs::write(&path, rendered).expect("write it");
        arguments.push(path.to_str().expect("UTF-8").to_owned());
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    println!("{}", python::drive(SCHEMAS, "manifests/validate.py", &arguments).await);
}
