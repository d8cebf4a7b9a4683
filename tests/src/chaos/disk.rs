//! A small disk that can be full: a tmpfs. Mounting one needs root.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted disk; unmounted on drop.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts a disk of so many mebibytes at a new folder.
    pub fn mount(path: &Path, mebibytes: usize) -> Self {
        fs::create_dir_all(path).expect("create the folder to mount at");
        let options = format!("size={mebibytes}m");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "baton-chaos"])
            .arg(path)
            .status()
            .expect("run mount");
        assert!(mounted.success(), "mount a tmpfs: run as root");
        Self { path: path.to_owned() }
    }

    /// Fills it to the last byte.
    pub fn fill(&self) {
        let mut file = File::create(self.filler()).expect("create a file");
        let block = vec![0; 64 << 10];
        while file.write_all(&block).is_ok() {}
        while file.write_all(&block[..1]).is_ok() {}
    }

    /// Frees what [`Self::fill`] took.
    pub fn free(&self) {
        fs::remove_file(self.filler()).expect("remove the file");
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that still writes a log there must not keep the disk.
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}
