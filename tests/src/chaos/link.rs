//! A network between two namespaces that can be slow, lossy or cut: `tests/chaos/link.py`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::binaries::repository;

/// A running link. Its namespace goes when it is dropped.
#[derive(Debug)]
pub struct Link {
    name: String,
    subnet: u32,
    process: Child,
    commands: Option<ChildStdin>,
}

impl Link {
    /// Makes a namespace and a link to it. Needs root.
    pub fn start() -> Self {
        let subnet = std::process::id() % 250 + 1;
        let name = format!("bt{}", std::process::id());
        let mut process = Command::new("python3")
            .arg(repository().join("tests/chaos/link.py"))
            .args([name.clone(), format!("10.77.{subnet}.1"), format!("10.77.{subnet}.2")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run python3");
        let commands = process.stdin.take();
        let mut ready = String::new();
        let stdout = process.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut ready).expect("read of the link");
        assert_eq!(ready, "ready\n", "the link does not start: it needs root, ip and /dev/net/tun");
        Self { name, subnet, process, commands }
    }

    /// The namespace at the far end.
    pub fn namespace(&self) -> &str {
        &self.name
    }

    /// The address of this end.
    pub fn near(&self) -> String {
        format!("10.77.{}.1", self.subnet)
    }

    /// The address of the far end.
    pub fn far(&self) -> String {
        format!("10.77.{}.2", self.subnet)
    }

    /// Tells the link how to be: `delay MILLISECONDS PERCENT`, `cut` or `heal`.
    pub fn tell(&mut self, command: &str) {
        let pipe = self.commands.as_mut().expect("a pipe to the link");
        writeln!(pipe, "{command}").expect("tell the link");
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.commands = None;
        let _ = self.process.wait();
    }
}
