//! Memory, processor time and cores of a process, from `/proc`.

use std::fs;
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;

/// Resident memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resident {
    /// All of it.
    pub total: u64,
    /// The process's own.
    pub anonymous: u64,
    /// Pages of mapped files.
    pub file: u64,
    /// Shared memory, such as the KV pool.
    pub shared: u64,
}

/// The resident memory of process `pid`.
pub fn resident(pid: u32) -> Resident {
    parse_resident(&read(pid, "status"))
}

fn parse_resident(status: &str) -> Resident {
    let bytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).map(str::trim);
        kib.and_then(|kib| kib.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
    };
    Resident {
        total: bytes("VmRSS:"),
        anonymous: bytes("RssAnon:"),
        file: bytes("RssFile:"),
        shared: bytes("RssShmem:"),
    }
}

/// How many files, sockets and the like process `pid` has open.
pub fn handles(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// The processor time that process `pid` has used, in user and kernel mode.
///
/// From the scheduler's own clock of each thread: the counters in `stat` tick at 100 Hz.
pub fn cpu_time(pid: u32) -> Duration {
    let of = |task: u32| {
        let path = format!("/proc/{pid}/task/{task}/schedstat");
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(tasks(pid).into_iter().map(of).sum())
}

/// Confines process `pid`, with all of its threads and those to come, to `cores`.
pub fn pin(pid: u32, cores: &[usize]) {
    let mut set = CpuSet::new();
    cores.iter().for_each(|core| set.set(*core).expect("a core of this machine"));
    for task in tasks(pid) {
        let task = Pid::from_raw(task.try_into().expect("a thread id"));
        // A thread may have ended since it was listed.
        let _ = sched_setaffinity(task, &set);
    }
}

fn tasks(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"));
    let entries = entries.unwrap_or_else(|e| panic!("list the threads of {pid}: {e}"));
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn read(pid: u32, file: &str) -> String {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_read() {
        let status = "Name:\tx\nVmRSS:\t    2048 kB\nRssAnon:\t    1024 kB\nRssShmem:\t  1 kB\n";
        let expected = Resident { total: 2 << 20, anonymous: 1 << 20, file: 0, shared: 1024 };
        assert_eq!(parse_resident(status), expected);
    }

    #[test]
    fn this_process_has_memory_and_has_used_time() {
        assert!(resident(std::process::id()).total > 0);
        assert!(cpu_time(std::process::id()) > Duration::ZERO);
    }
}
