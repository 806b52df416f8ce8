//! Who uses a file.
//!
//! What     [`holders`], the processes that hold the lock of a byte of a file, and how much of it each has mapped.
//! Why      "busy" alone sends people looking; the answer names whom to ask. That a process has the file open says
//!          nothing: the one that asks has as well.
//! Owns     nothing. A snapshot, of the processes that this user may look into.
//! Source   locks of open files name no process (`F_OFD_GETLK`), but `/proc/PID/fdinfo` shows each with its file
//!          (`show_fd_locks`).
//! Fails    never: what cannot be read is left out.

use core::fmt;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

/// A process that holds a lock of a store.
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
        let name = self.name.escape_debug();
        match self.pid == std::process::id() {
            true => write!(f, "process {} ({name}), this one", self.pid),
            false => write!(f, "process {} ({name})", self.pid),
        }
    }
}

/// Several holders, for a message.
pub(crate) fn listed(holders: &[Holder]) -> String {
    let all: Vec<String> = holders.iter().map(Holder::to_string).collect();
    if all.is_empty() { "a process of another user".to_owned() } else { all.join(", ") }
}

/// Who holds the lock of `byte` of `file`.
pub(crate) fn holders(file: impl AsFd, byte: u64) -> Vec<Holder> {
    let Ok(wanted) = rustix::fs::fstat(file) else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let device = format!("{:02x}:{:02x}", rustix::fs::major(wanted.st_dev), rustix::fs::minor(wanted.st_dev));
    let device = device.as_str();
    let mut found = Vec::new();
    for process in processes.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else { continue };
        let holds = fs::read_dir(process.path().join("fd")).is_ok_and(|files| {
            // The link is followed: it names the open file, whatever became of its path.
            files.flatten().any(|file| {
                let is_it = fs::metadata(file.path())
                    .is_ok_and(|stat| stat.ino() == wanted.st_ino && stat.dev() == wanted.st_dev);
                let info = process.path().join("fdinfo").join(file.file_name());
                is_it && fs::read_to_string(info).is_ok_and(|info| info.lines().any(|line| locks(line, byte)))
            })
        });
        if !holds {
            continue;
        }
        let maps = fs::read_to_string(process.path().join("maps")).unwrap_or_default();
        let mapped: Vec<(u64, u64)> =
            maps.lines().filter_map(|line| mapped(line, device, wanted.st_ino)).collect();
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        found.push(Holder { pid, name: name.trim_end().to_owned(), mapped });
    }
    found.sort_by_key(|holder| holder.pid);
    found
}

/// Whether a line of `/proc/PID/fdinfo/FD` says that the open file has this byte locked:
/// `lock: 1: OFDLCK  ADVISORY  READ -1 fd:01:1234 2305843009213693952 2305843009213693952`.
fn locks(line: &str, byte: u64) -> bool {
    let Some(lock) = line.strip_prefix("lock:").filter(|lock| !lock.contains("->")) else { return false };
    let mut words = lock.split_ascii_whitespace().rev();
    let (end, start) = (words.next(), words.next());
    let number = |word: Option<&str>| word.and_then(|word| word.parse::<u64>().ok());
    let end = if end == Some("EOF") { Some(u64::MAX) } else { number(end) };
    number(start).zip(end).is_some_and(|(start, end)| start <= byte && byte <= end)
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
    use uhmm_sys::filelock::{self, FileLock, Kind};

    use super::*;

    #[test]
    fn a_process_that_holds_a_byte_is_found_and_one_that_has_the_file_open_is_not() {
        let path = std::env::temp_dir().join(format!("uhmm-holders-{}", std::process::id()));
        let file = fs::File::create(&path).unwrap();
        assert_eq!(holders(&file, 1 << 60), []);
        let own = filelock::reopened(file.as_fd()).unwrap();
        let lock = FileLock::try_acquire(own, 1 << 60, Kind::Shared).unwrap();
        let found = holders(&file, 1 << 60);
        assert_eq!(found.iter().map(|holder| holder.pid).collect::<Vec<_>>(), [std::process::id()]);
        assert!(listed(&found).ends_with("), this one"), "{found:?}");
        assert_eq!(holders(&file, (1 << 60) + 1), []);
        drop(lock);
        assert_eq!(holders(&file, 1 << 60), []);
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_name_is_written_on_one_line() {
        let holder = Holder { pid: 1, name: "a\n\x1b[2J".into(), mapped: Vec::new() };
        assert_eq!(holder.to_string(), "process 1 (a\\n\\u{1b}[2J)");
    }

    #[test]
    fn a_line_says_which_byte() {
        let line = "lock:\t1: OFDLCK  ADVISORY  READ -1 fd:01:1234 7 9";
        assert!(locks(line, 7) && locks(line, 9) && !locks(line, 6) && !locks(line, 10));
        assert!(locks("lock:\t1: POSIX  ADVISORY  WRITE 77 fd:01:1234 0 EOF", 1 << 60));
        assert!(!locks("lock:\t1: -> OFDLCK ADVISORY WRITE -1 fd:01:1234 0 EOF", 1));
        assert!(!locks("pos:\t0", 0) && !locks("lock:\tnonsense", 0));
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
