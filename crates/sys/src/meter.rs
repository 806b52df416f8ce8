//! How much memory is in use.
//!
//! What     [`Meter`] for this process, cheap enough to ask every few milliseconds; [`ProcMeter`] for another.
//! Why      a budget is held by measuring, not by adding up what we believe to have moved.
//! Owns     an open file of `/proc` each, which shows the process that opened it even after a fork. The number
//!          of the descriptor counts only in the descriptor table it was opened in.
//! Fails    when the process is gone or the descriptor was closed by somebody: never read that as "nothing".
//!
//! The kernel counts per CPU and adds up late, so that a number may be off by some dozens of pages per CPU.

use std::fs;
use std::io;

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, pread};
use uhmm_addr::{PAGE_SIZE, PageCount};

/// The memory of this process. Needs no allocation to read, and works in raw threads.
#[derive(Debug)]
pub struct Meter {
    statm: OwnedFd,
}

impl Meter {
    /// Opens the meter; it belongs to the process that opens it, and works as long as the thread lives that does.
    pub fn open() -> io::Result<Self> {
        // Of this thread, not of the process: that one shows nothing any more once its first thread has exited.
        let path = "/proc/thread-self/statm";
        let statm = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { statm })
    }

    /// Anonymous pages that are present: all that is resident without files and shared memory.
    pub fn resident_anonymous(&self) -> io::Result<PageCount> {
        let mut text = [0_u8; 256];
        let len = pread(&self.statm, &mut text, 0)?;
        let counts = parse_statm(&text[..len]).ok_or(Errno::INVAL)?;
        Ok(counts)
    }
}

/// `size resident shared ..`, in pages: resident less shared.
fn parse_statm(text: &[u8]) -> Option<PageCount> {
    let mut fields = text.split(|b| b.is_ascii_whitespace()).map(number);
    let _size = fields.next()??;
    let resident = fields.next()??;
    let shared = fields.next()??;
    Some(PageCount::new(resident).minus(PageCount::new(shared)))
}

/// The number that `digits` spell; `None` if they are no number or too many.
fn number(digits: &[u8]) -> Option<usize> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_usize, |sum, digit| {
        let digit = digit.checked_sub(b'0').filter(|d| *d < 10)?;
        sum.checked_mul(10)?.checked_add(usize::from(digit))
    })
}

/// The memory of another process.
#[derive(Clone, Debug)]
pub struct ProcMeter {
    path: String,
}

impl ProcMeter {
    /// A meter for the process `pid`. Nothing is opened: a later process of the same number is measured then.
    pub fn new(pid: u32) -> Self {
        Self { path: format!("/proc/{pid}/status") }
    }

    /// Anonymous pages that are present.
    pub fn resident_anonymous(&self) -> io::Result<PageCount> {
        let text = fs::read(&self.path)?;
        // A process that has exited but was not waited for has no such line any more.
        parse_status(&text).ok_or_else(|| Errno::SRCH.into())
    }
}

/// The line `RssAnon:     1234 kB`.
fn parse_status(text: &[u8]) -> Option<PageCount> {
    let value = text.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(b"RssAnon:"))?;
    let kib = number(value.trim_ascii().strip_suffix(b" kB")?.trim_ascii())?;
    Some(PageCount::new(kib / (PAGE_SIZE / 1024)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;

    #[test]
    fn both_meters_see_memory_come() {
        let (meter, other) = (Meter::open().unwrap(), ProcMeter::new(std::process::id()));
        let before = meter.resident_anonymous().unwrap();
        let mapping = Mapping::reserve(64 << 20, "uhmm meter").unwrap();
        mapping.populate().unwrap();
        // Other tests run at the same time and the kernel adds up late: 64 MiB leave room for both.
        let after = meter.resident_anonymous().unwrap();
        assert!(after.minus(before).get() > 8 << 10, "{before} {after}");
        assert!(other.resident_anonymous().unwrap().get() > 16 << 10);
    }

    #[test]
    fn what_is_no_number_is_not_guessed() {
        assert_eq!(parse_statm(b"100 50 20 1 0 3 0\n"), Some(PageCount::new(30)));
        assert_eq!(parse_statm(b"100 20 50 1\n"), Some(PageCount::ZERO));
        for text in [&b""[..], b"1 2", b"1 x 2", b"-1 2 3", b"1 99999999999999999999999 1"] {
            assert_eq!(parse_statm(text), None);
        }
        assert_eq!(parse_status(b"Name:\tx\nRssAnon:\t    1024 kB\n"), Some(PageCount::new(256)));
        assert_eq!(parse_status(b"Name:\tRssAnon: 1\n"), None);
        assert!(ProcMeter::new(0x7fff_ffff).resident_anonymous().is_err());
    }
}
