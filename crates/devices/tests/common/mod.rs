//! What several tests of devices need.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use uhmm_addr::ByteSize;

/// A directory that is gone with its owner.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    /// A fresh directory under `parent`.
    pub(crate) fn new(parent: &str) -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(parent).join(format!("uhmm-test-{}-{serial}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a program; its output, or what it complained about.
pub(crate) fn output(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| error.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// A block device over a file. Goes away when the last descriptor of it does.
pub(crate) struct LoopDevice {
    pub(crate) path: PathBuf,
    _directory: Scratch,
}

impl LoopDevice {
    /// `None`, with a line that says why, where this machine makes none.
    pub(crate) fn new(size: ByteSize) -> Option<Self> {
        let directory = Scratch::new("/var/tmp");
        let backing = directory.file("disk");
        std::fs::File::create(&backing).unwrap().set_len(size.bytes()).unwrap();
        match output("losetup", &["--find", "--show", &backing.display().to_string()]) {
            Ok(path) => Some(Self { path: path.into(), _directory: directory }),
            Err(reason) => {
                println!("skipped: no block device: losetup: {reason}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = output("losetup", &["--detach", &self.path.display().to_string()]);
    }
}

/// A small file system in memory.
pub(crate) struct SmallFileSystem(pub(crate) Scratch);

impl SmallFileSystem {
    /// `None`, with a line that says why, where this user may not mount.
    pub(crate) fn new(options: &str) -> Option<Self> {
        let directory = Scratch::new("/var/tmp");
        let at = directory.0.display().to_string();
        match output("mount", &["-t", "tmpfs", "-o", options, "tmpfs", &at]) {
            Ok(_) => Some(Self(directory)),
            Err(reason) => {
                println!("skipped: no small file system: mount: {reason}");
                None
            }
        }
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = output("umount", &["--lazy", &self.0.0.display().to_string()]);
    }
}
