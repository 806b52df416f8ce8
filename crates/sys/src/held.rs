//! Pages that are held: what is in their frames can be read when they are mapped nowhere any more.
//!
//! What     [`HeldPages`]: the frames of a range of private memory, and a buffer into which
//!          [`HeldPages::refresh`] copies what is in them at that moment.
//! Why      one mapping can take another one's place in one step, and the pages of the other go with it. Copied before
//!          that, they lack what was stored meanwhile: where memory cannot be watched, nobody can be kept from storing.
//!          A frame that is held outlives its mapping, and then has every store that there was.
//! How      a buffer that is registered with a ring of io_uring: the one pin that a process can take by itself. A store
//!          goes to the frame that was pinned, whatever happens beside it: a fork copies the page for the child, and
//!          neither reclaim nor compaction moves it (`FOLL_PIN | FOLL_LONGTERM | FOLL_WRITE`). The ring writes from the
//!          frames, not from the addresses. Where nobody may store, a copy will do ([`HeldPages::copied`]).
//! Owns     the pins, until it is dropped; the ring; the buffer, which is ours.
//! Needs    io_uring, and Linux 6.5 to hold pages of a file's mapping. Pins count as locked memory (`RLIMIT_MEMLOCK`).
//! Fails    making one fails with the kernel's error: no io_uring, no memory, pages that are not there or may not be
//!          written. It copies once to show that this works; afterwards want of memory is waited out.

use core::ptr::NonNull;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use uhmm_addr::VaRange;

use crate::mapping::Mapping;
use crate::memfd::Memfd;

/// The frames of a range, and a copy of what is in them.
pub struct HeldPages {
    /// `None` where nobody can store to the pages.
    ring: Option<IoUring>,
    range: VaRange,
    buffer: Mapping,
    file: Memfd,
}

impl core::fmt::Debug for HeldPages {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("HeldPages").field("range", &self.range).finish_non_exhaustive()
    }
}

impl HeldPages {
    /// Holds the pages of `range`, private and writable. One that is absent or shared by fork becomes the process's own,
    /// as by a store.
    pub fn hold(range: VaRange) -> io::Result<Self> {
        let mut held = Self::with_buffer(range)?;
        let mut builder = IoUring::builder();
        let ring = builder.dontfork().build(1)?;
        let pages = remote(range);
        // SAFETY: the kernel pins what is there, or fails. It reaches the frames, not the addresses, so that these may
        // mean something else before the buffer is unregistered.
        unsafe { ring.submitter().register_buffers(&[pages]) }?;
        held.ring = Some(ring);
        held.refresh()?;
        Ok(held)
    }

    /// A copy of the pages of `range`, to which nobody may store as long as this is used.
    pub fn copied(range: VaRange) -> io::Result<Self> {
        let held = Self::with_buffer(range)?;
        let local = libc::iovec { iov_base: held.buffer.as_ptr().as_ptr().cast(), iov_len: range.bytes() };
        // SAFETY: the kernel writes to the buffer, which is ours, and only reads the rest, if it is there.
        let copied = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote(range), 1, 0) };
        if usize::try_from(copied) == Ok(range.bytes()) { Ok(held) } else { Err(Errno::FAULT.into()) }
    }

    fn with_buffer(range: VaRange) -> io::Result<Self> {
        let file = Memfd::create("uhmm-held", range.bytes() as u64, None)?;
        let buffer = file.map()?;
        buffer.dont_fork()?;
        // A copy finds its memory there.
        buffer.populate()?;
        Ok(Self { ring: None, range, buffer, file })
    }

    /// The pages.
    pub fn range(&self) -> VaRange {
        self.range
    }

    /// What was in the frames when they were last looked at, as long as the range.
    pub fn contents(&self) -> NonNull<u8> {
        self.buffer.as_ptr()
    }

    /// Copies what is in the frames now.
    ///
    /// # Errors
    /// If the kernel does not serve the ring any more.
    pub fn refresh(&mut self) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let mut done = 0;
        while done < self.range.bytes() {
            let from = self.range.start().get() + done;
            let rest = (self.range.bytes() - done) as u32;
            let file = types::Fd(self.file.fd().as_raw_fd());
            let entry = opcode::WriteFixed::new(file, core::ptr::without_provenance(from), rest, 0);
            // SAFETY: the source is a registered buffer; the file is ours, and open until this is over.
            unsafe { ring.submission().push(&entry.offset(done as u64).build()) }
                .map_err(io::Error::other)?;
            let written = loop {
                if let Some(entry) = ring.completion().next() {
                    break entry.result();
                }
                match ring.submit_and_wait(1).map_err(|error| error.raw_os_error()) {
                    Ok(_) => {}
                    Err(Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {
                        std::thread::yield_now();
                    }
                    Err(number) => return Err(io::Error::from_raw_os_error(number.unwrap_or(libc::EIO))),
                }
            };
            match written {
                1.. => done += written.cast_unsigned() as usize,
                0 => return Err(io::ErrorKind::WriteZero.into()),
                _ if matches!(-written, libc::EINTR | libc::EAGAIN | libc::ENOMEM) => {
                    std::thread::yield_now()
                }
                _ => return Err(io::Error::from_raw_os_error(-written)),
            }
        }
        Ok(())
    }
}

impl Drop for HeldPages {
    fn drop(&mut self) {
        if let Some(ring) = &self.ring {
            // The kernel takes a ring down in its own time; the pages are to be free now.
            let _ = ring.submitter().unregister_buffers();
        }
    }
}

fn remote(range: VaRange) -> libc::iovec {
    libc::iovec {
        iov_base: core::ptr::with_exposed_provenance_mut(range.start().get()),
        iov_len: range.bytes(),
    }
}

#[cfg(test)]
mod tests;
