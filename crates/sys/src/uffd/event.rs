//! What a userfaultfd has to say: faults, and what the program did to its mappings.
//!
//! What     [`Uffd::read`] fills an [`EventBuffer`], which is then taken apart into [`Event`]s.
//! Why      one system call brings many messages. The buffer is fixed and the decoding allocates nothing,
//!          because a fault handler reads here.
//! Owns     the descriptors of forked children that arrive in messages: taken out with their event, or
//!          closed with the buffer.
//! Order    the kernel hands out waiting faults before events. A fault may thus stand before the event
//!          that explains it: read until [`ReadOutcome::Empty`] before believing that a page is gone.
//! Fails    [`ReadOutcome::Failed`]; messages that were not read stay in the kernel.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::general as raw;
use rustix::io::Errno;
use uhmm_addr::{VaRange, VirtAddr};
use uhmm_core::fault::Access;

use super::{Features, Uffd};
use crate::uapi::{MSG_ARG, MSG_BYTES};

/// Messages in one buffer.
pub const CAPACITY: usize = 32;

/// One thing that happened.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    Fault {
        /// What it touched: the exact address with [`Features::EXACT_ADDRESS`], else its page's.
        addr: VirtAddr,
        /// How.
        access: Access,
        /// Which thread, with [`Features::THREAD_ID`].
        thread: Option<u32>,
    },
    /// The process forked; this descriptor watches the child, in the same ranges.
    Fork(Uffd),
    /// A mapping went somewhere else. It is still registered there. Where [`Features::EVENT_UNMAP`] is
    /// enabled too, an [`Event::Unmap`] of the old place follows, after this one.
    Remap {
        /// Where it was.
        from: VirtAddr,
        /// Where it is.
        to: VirtAddr,
        /// Bytes.
        len: usize,
    },
    /// The pages are being taken away by madvise; the mapping stays. Comes *before* they go.
    Remove(VaRange),
    /// The mapping is gone, and the registration with it.
    Unmap(VaRange),
}

/// What a read brought.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadOutcome {
    /// So many messages are in the buffer.
    Events(usize),
    /// Nothing happened.
    Empty,
    /// The descriptor has ended.
    Closed,
    /// The read failed.
    Failed(Errno),
}

/// Room for [`CAPACITY`] messages, 1 KiB. Taking them apart is iterating; what is left when the buffer is
/// dropped is closed properly.
pub struct EventBuffer {
    bytes: [u8; CAPACITY * MSG_BYTES],
    /// Messages in it.
    filled: usize,
    /// The next one to take.
    next: usize,
    /// Of the descriptor it was read from.
    features: Features,
}

impl EventBuffer {
    /// An empty buffer.
    pub const fn new() -> Self {
        Self { bytes: [0; CAPACITY * MSG_BYTES], filled: 0, next: 0, features: Features::NONE }
    }

    /// Messages not yet taken.
    pub const fn remaining(&self) -> usize {
        self.filled - self.next
    }

    /// Takes the next message apart. `None` for one that this file does not know.
    fn take(&mut self) -> Option<Event> {
        let at = self.next * MSG_BYTES;
        self.next += 1;
        let message = &self.bytes[at..at + MSG_BYTES];
        let word = |index: usize| {
            let start = MSG_ARG + index * 8;
            let mut word = [0; 8];
            word.copy_from_slice(&message[start..start + 8]);
            word
        };
        let number = |index| u64::from_ne_bytes(word(index));
        let half = |index| {
            let [a, b, c, d, ..] = word(index);
            u32::from_ne_bytes([a, b, c, d])
        };
        let address = |index| VirtAddr::new(number(index) as usize);
        match u32::from(message[0]) {
            raw::UFFD_EVENT_PAGEFAULT => Some(Event::Fault {
                addr: address(1),
                access: access(number(0)),
                thread: self.features.contains(Features::THREAD_ID).then(|| half(2)),
            }),
            raw::UFFD_EVENT_FORK => {
                // SAFETY: the kernel made this descriptor for the one who reads the message. Each message
                // is taken once (`next` has moved on), so nobody else owns or closes it.
                let fd = unsafe { OwnedFd::from_raw_fd(half(0) as RawFd) };
                Some(Event::Fork(Uffd::from_fd(fd, self.features)))
            }
            raw::UFFD_EVENT_REMAP => {
                Some(Event::Remap { from: address(0), to: address(1), len: number(2) as usize })
            }
            raw::UFFD_EVENT_REMOVE => between(address(0), address(1)).map(Event::Remove),
            raw::UFFD_EVENT_UNMAP => between(address(0), address(1)).map(Event::Unmap),
            _ => None,
        }
    }
}

fn access(flags: u64) -> Access {
    if flags & u64::from(raw::UFFD_PAGEFAULT_FLAG_WP) != 0 {
        Access::WriteProtected
    } else if flags & u64::from(raw::UFFD_PAGEFAULT_FLAG_WRITE) != 0 {
        Access::Write
    } else {
        Access::Read
    }
}

fn between(start: VirtAddr, end: VirtAddr) -> Option<VaRange> {
    VaRange::covering(start, end.get().checked_sub(start.get())?)
}

impl Iterator for EventBuffer {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        while self.next < self.filled {
            if let Some(event) = self.take() {
                return Some(event);
            }
        }
        None
    }
}

impl Drop for EventBuffer {
    fn drop(&mut self) {
        // Dropping a fork event closes the child's descriptor.
        self.for_each(drop);
    }
}

impl Default for EventBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl core::fmt::Debug for EventBuffer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("EventBuffer").field("remaining", &self.remaining()).finish_non_exhaustive()
    }
}

impl Uffd {
    /// Reads what has happened, without waiting. A buffer that still holds messages keeps them: then
    /// nothing is read, and the outcome counts what is left.
    pub fn read(&self, buffer: &mut EventBuffer) -> ReadOutcome {
        if buffer.remaining() > 0 {
            return ReadOutcome::Events(buffer.remaining());
        }
        buffer.filled = 0;
        buffer.next = 0;
        buffer.features = self.features;
        match rustix::io::read(&self.fd, &mut buffer.bytes[..]) {
            Ok(0) => ReadOutcome::Closed,
            Ok(bytes) => {
                buffer.filled = bytes / MSG_BYTES;
                ReadOutcome::Events(buffer.filled)
            }
            Err(Errno::AGAIN) => ReadOutcome::Empty,
            Err(errno) => ReadOutcome::Failed(errno),
        }
    }
}
