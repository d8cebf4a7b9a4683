//! What a cluster must not leave behind.

use std::fs;
use std::path::Path;

/// Environment variable that every process of a test carries, and hands to its own children: the
/// test's folder.
pub const MARK: &str = "BATON_TEST_DIR";

/// Processes that carry the mark of `dir`, as `pid command line`.
pub fn processes(dir: &Path) -> Vec<String> {
    let mark = format!("{MARK}={}", dir.display()).into_bytes();
    let entries = fs::read_dir("/proc").expect("list /proc");
    let numbered = entries.flatten().filter(|entry| {
        entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit())
    });
    numbered
        .filter(|entry| {
            // A process that ended meanwhile, or a zombie, reads as empty.
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark)
        })
        .map(|entry| {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            format!("{} {command}", entry.file_name().to_string_lossy())
        })
        .collect()
}

/// Named shared-memory files of Baton. There must never be one, not even of a running cluster:
/// the KV pool lives in a memfd so that nothing stays when its owner is killed.
pub fn shared_memory() -> Vec<String> {
    let entries = fs::read_dir("/dev/shm").expect("list /dev/shm");
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("baton"))
        .collect()
}

/// Asserts that a stopped cluster left no process, no shared-memory file and no temporary file.
pub fn assert_none(dir: &Path) {
    let processes = processes(dir);
    assert!(processes.is_empty(), "processes left behind: {processes:#?}");
    let shared = shared_memory();
    assert!(shared.is_empty(), "shared-memory files left behind: {shared:?}");
    let temporary: Vec<_> = fs::read_dir(dir.join("tmp"))
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    assert!(temporary.is_empty(), "temporary files left behind: {temporary:?}");
}
