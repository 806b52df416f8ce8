//! Learning that a file changed.
//!
//! What     [`Watch`], a descriptor that becomes readable when one file was written or its times were set; [`Bell`],
//!          one that becomes readable when another thread says so.
//! Why      labels are changed by whoever has the right to; those who use the file meanwhile must learn of it.
//!          The kernel tells of files that have a name alone, so that users of others tell each other.
//! Owns     an inotify descriptor; an eventfd.
//! Fails    with the kernel's error, and where a user has too many, with the limit: of inotify descriptors
//!          (`fs.inotify.max_user_instances`, `EMFILE`; each watch has one) or of watches (`fs.inotify.max_user_watches`,
//!          `ENOSPC`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

/// Tells of changes of one file.
#[derive(Debug)]
pub struct Watch {
    fd: OwnedFd,
}

impl Watch {
    /// Watches the open file `file`, whatever becomes of its name.
    pub fn new(file: BorrowedFd<'_>) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            // A process that has too many files open has no room for another copy of this one either.
            .map_err(|errno| match (errno, file.try_clone_to_owned()) {
                (Errno::MFILE, Ok(_)) => too_many("inotify descriptors", "max_user_instances"),
                _ => errno.into(),
            })?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // A write through a mapping is not seen; setting the times is.
        inotify::add_watch(&fd, path, WatchFlags::MODIFY | WatchFlags::ATTRIB).map_err(
            |errno| match errno {
                Errno::NOSPC => too_many("inotify watches", "max_user_watches"),
                errno => errno.into(),
            },
        )?;
        Ok(Self { fd })
    }

    /// Whether anything happened since the last call.
    pub fn changed(&self) -> bool {
        let mut buffer = [0; 4096];
        let mut any = false;
        loop {
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(0) | Err(Errno::AGAIN) => return any,
                Ok(_) => any = true,
                Err(Errno::INTR) => {}
                // It cannot tell any more: look.
                Err(_) => return true,
            }
        }
    }
}

/// The user has as many as he may have.
fn too_many(what: &str, limit: &str) -> io::Error {
    let value = std::fs::read_to_string(format!("/proc/sys/fs/inotify/{limit}")).unwrap_or_default();
    let value = match value.trim() {
        "" => "unknown",
        value => value,
    };
    let why = format!(
        "the user has as many {what} as the limit allows, {value}; sysctl fs.inotify.{limit} raises it"
    );
    io::Error::new(io::ErrorKind::QuotaExceeded, why)
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Wakes a thread that waits for descriptors.
#[derive(Debug)]
pub struct Bell {
    fd: OwnedFd,
}

impl Bell {
    /// One that has not rung.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Makes it readable. May be called in a signal handler.
    pub fn ring(&self) {
        // Full, it is readable as well.
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
    }

    /// Whether it rang since the last call.
    pub fn rang(&self) -> bool {
        rustix::io::read(&self.fd, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filelock::reopened;

    #[test]
    fn writes_and_times_are_seen() {
        let path = std::env::temp_dir().join(format!("uhmm-watch-{}", std::process::id()));
        let file = std::fs::File::create_new(&path).unwrap();
        let watch = Watch::new(file.as_fd()).unwrap();
        assert!(!watch.changed());
        rustix::io::pwrite(&file, b"x", 0).unwrap();
        assert!(watch.changed() && !watch.changed());
        let other = std::fs::File::from(reopened(file.as_fd()).unwrap());
        other.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert!(watch.changed());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_limit_is_named_with_its_value() {
        let value = std::fs::read_to_string("/proc/sys/fs/inotify/max_user_instances").unwrap();
        let told = too_many("inotify descriptors", "max_user_instances").to_string();
        let end = format!("{}; sysctl fs.inotify.max_user_instances raises it", value.trim());
        assert!(told.ends_with(&end), "{told}");
    }

    #[test]
    fn a_bell_rings_once() {
        let bell = Bell::new().unwrap();
        assert!(!bell.rang());
        bell.ring();
        bell.ring();
        assert!(bell.rang() && !bell.rang());
    }
}
