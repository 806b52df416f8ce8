//! Who uses a file.
//!
//! What     [`holders`], the processes that have a file open, and how much of it each has mapped.
//! Why      "busy" alone sends people looking; the answer names whom to ask.
//! Owns     nothing. A snapshot, of the processes that this user may look into.
//! Fails    never: what cannot be read is left out.

use core::fmt;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

/// A process that has a store open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// What it is called.
    pub name: String,
    /// The parts of the file that it has mapped, as first and end byte.
    pub mapped: Vec<(u64, u64)>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

/// Several holders, for a message.
pub(super) fn listed(holders: &[Holder]) -> String {
    let all: Vec<String> = holders.iter().map(Holder::to_string).collect();
    if all.is_empty() { "a process of another user".to_owned() } else { all.join(", ") }
}

/// Who has `file` open.
pub(super) fn holders(file: impl AsFd) -> Vec<Holder> {
    let Ok(wanted) = rustix::fs::fstat(file) else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let device = format!("{:02x}:{:02x}", rustix::fs::major(wanted.st_dev), rustix::fs::minor(wanted.st_dev));
    let device = device.as_str();
    let mut found = Vec::new();
    for process in processes.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else { continue };
        let open = fs::read_dir(process.path().join("fd")).is_ok_and(|mut files| {
            // The link is followed: it names the open file, whatever became of its path.
            files.any(|file| {
                let stat = file.and_then(|file| fs::metadata(file.path()));
                stat.is_ok_and(|stat| stat.ino() == wanted.st_ino && stat.dev() == wanted.st_dev)
            })
        });
        let maps = fs::read_to_string(process.path().join("maps")).unwrap_or_default();
        let mapped: Vec<(u64, u64)> =
            maps.lines().filter_map(|line| mapped(line, device, wanted.st_ino)).collect();
        if open || !mapped.is_empty() {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(Holder { pid, name: name.trim_end().to_owned(), mapped });
        }
    }
    found.sort_by_key(|holder| holder.pid);
    found
}

/// Which part of the file a line of `/proc/PID/maps` is about:
/// `7f8a1000-7f8a2000 rw-s 00200000 fd:01 1234    /pmem.img`.
fn mapped(line: &str, device: &str, inode: u64) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let offset = hex(words.nth(1)?)?;
    let same_device = words.next()? == device;
    let found: u64 = words.next()?.parse().ok()?;
    let len = hex(end)?.checked_sub(hex(start)?)?;
    (same_device && found == inode).then_some((offset, offset + len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_a_file_is_found() {
        let path = std::env::temp_dir().join(format!("uhmm-holders-{}", std::process::id()));
        let file = fs::File::create(&path).unwrap();
        let found = holders(&file);
        fs::remove_file(&path).unwrap();
        assert_eq!(found.iter().map(|holder| holder.pid).collect::<Vec<_>>(), [std::process::id()]);
        assert!(listed(&found).starts_with("process "), "{found:?}");
    }

    #[test]
    fn a_line_says_which_part() {
        let line = "7f8a1000-7f8a3000 rw-s 00200000 fd:01 1234    /a b";
        assert_eq!(mapped(line, "fd:01", 1234), Some((0x20_0000, 0x20_2000)));
        assert_eq!(mapped(line, "fd:01", 1235), None);
        assert_eq!(mapped(line, "00:0e", 1234), None);
        assert_eq!(mapped("nonsense", "fd:01", 1), None);
    }
}
