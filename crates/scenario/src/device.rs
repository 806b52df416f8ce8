//! A device, as a program has it: a descriptor and its requests.
//!
//! What    [`Device`], which makes requests about pages of the window and says what was answered.
//! ABI     the kernel's `lib/test_hmm_uapi.h`.
//! Owns    its descriptor, and a buffer for the data, which is mapped and given to no device.

use std::ffi::{CString, c_int};

use crate::memory::{Errno, Memory, PAGE, checked};
use crate::operation::{Pages, Request};

/// Devices below this number are private, the others coherent.
pub(crate) const PRIVATE: u64 = 2;
/// What a buffer holds before a request.
const UNTOUCHED: u8 = 0xa5;
/// An address at which nothing is mapped.
const NOWHERE: u64 = 0x1000;

/// `struct hmm_dmirror_cmd`.
#[repr(C)]
#[derive(Default)]
struct Command {
    addr: u64,
    ptr: u64,
    npages: u64,
    cpages: u64,
    faults: u64,
}

/// What was answered.
pub(crate) struct Answer {
    pub(crate) done: Result<(u64, u64), Errno>,
    /// What is in the buffer, if anything was put there.
    pub(crate) data: Option<Vec<u8>>,
}

/// An open device.
pub(crate) struct Device {
    file: c_int,
}

impl Device {
    pub(crate) fn open(number: u64) -> Result<Self, Errno> {
        let path = CString::new(format!("/dev/hmm_dmirror{number}")).map_err(|_| Errno(libc::EINVAL))?;
        // SAFETY: a path.
        let file = unsafe { libc::open(path.as_ptr(), libc::O_RDWR) };
        checked(file)?;
        Ok(Self { file })
    }

    /// Asks for `request`, with `data` in the buffer if the device is to write.
    pub(crate) fn ask(&self, request: Request, pages: Pages, nowhere: bool, data: Option<Vec<u8>>) -> Answer {
        let len = match request {
            Request::Snapshot => pages.count as usize,
            _ => pages.count as usize * PAGE,
        };
        let mut buffer = data.unwrap_or_else(|| vec![UNTOUCHED; len]);
        let before = buffer.clone();
        let ptr = if nowhere { NOWHERE } else { buffer.as_mut_ptr().expose_provenance() as u64 };
        let addr = Memory::address(pages.first) as u64;
        let mut command = Command { addr, ptr, npages: pages.count, ..Command::default() };
        // SAFETY: the device reads and writes the command, and what it says about the buffer is true.
        let done = checked(unsafe { libc::ioctl(self.file, number(request), &raw mut command) });
        let buffer = std::hint::black_box(buffer);
        Answer {
            done: done.map(|()| (command.cpages, command.faults)),
            data: (buffer != before).then_some(buffer),
        }
    }
}

impl Device {
    /// Closes this process's descriptor, in a process that has no other use for it.
    pub(crate) fn close(&self) {
        // SAFETY: the descriptor is ours.
        unsafe { libc::close(self.file) };
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.close();
    }
}

/// `_IOWR('H', n, struct hmm_dmirror_cmd)`.
const fn number(request: Request) -> libc::c_ulong {
    let n = match request {
        Request::Read => 0,
        Request::Write => 1,
        Request::Migrate => 2,
        Request::Back => 3,
        Request::Snapshot => 4,
        Request::Exclusive => 5,
        Request::CheckExclusive => 6,
        Request::Release => 7,
    };
    0xc028_4800 + n
}
