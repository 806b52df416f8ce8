//! Putting pages where they are missing, taking them, protecting them, and waking who waits.
//!
//! What     one method of [`Uffd`] for each request, and `decode`, which turns what the kernel said into a
//!          [`Progress`].
//! Why      the kernel reports in two places: an error number, and a field that counts bytes. On an error
//!          that field holds either the bytes done or the *negated error*; read as a count, that would be
//!          2^64 bytes done. It is decoded in one place, and a negative count is no page, ever.
//! Owns     nothing. No method tries again, but for one answer that is not to be believed at once: the kernel
//!          looks for the mapping before it looks whether an event waits, and a request that meets an mremap
//!          half way is told ENOENT. The next one is told of the event. So [`Stop::Unmapped`] is what the
//!          kernel says twice, and means that no event about it is unread.
//! Whose    filling and poisoning do not check *which* descriptor watches the destination: the wrong one
//!          fills as well, but wakes only who waits at itself. `UFFDIO_MOVE` insists on its own. Callers
//!          keep them apart.
//! Fails    as [`Stop`] says. Two quirks of the kernel show through:
//!          - a request that stops part way says EAGAIN whatever stopped it, which is indistinguishable
//!            from "an event is pending" ([`Stop::Pending`]); the reason is told by the next call, which
//!            stops at that page at once;
//!          - `UFFDIO_MOVE` says ENOENT both for a hole in the source and for a source or destination
//!            that is not mapped: [`Stop::Hole`] means "look it up again" as well.

use core::ptr::NonNull;

use rustix::io::Errno;
use uhmm_addr::{PageCount, VaRange, VirtAddr};
use uhmm_core::host::{Install, Progress, Stop};

use super::Uffd;
use super::register::raw_range;
use crate::uapi;

/// Which request it was, as far as the meaning of its errors depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Request {
    /// Copy, zero, poison: something is put into the destination.
    Fill,
    /// Frames change places.
    Move,
    /// A page of the page cache is mapped.
    Continue,
    /// Protection is set or lifted; it counts nothing.
    Protect,
}

/// What became of a request on `wanted` pages: `result` is what the call returned, `count` the field in
/// which the kernel counts bytes (zero when it wrote nothing there).
fn decode(request: Request, result: Result<(), Errno>, count: i64, wanted: PageCount) -> Progress {
    let Err(errno) = result else {
        return Progress::complete(wanted);
    };
    let done = match usize::try_from(count) {
        Ok(bytes) => PageCount::in_bytes(bytes).at_most(wanted),
        Err(_) => PageCount::ZERO,
    };
    let stop = match errno {
        Errno::AGAIN => Stop::Pending,
        Errno::EXIST => Stop::Present,
        Errno::BUSY => Stop::Busy,
        Errno::NOENT if request == Request::Move => Stop::Hole,
        Errno::NOENT => Stop::Unmapped,
        // The page that should be mapped is not in the page cache.
        Errno::FAULT if request == Request::Continue => Stop::Hole,
        Errno::INVAL => Stop::Refused,
        Errno::NOMEM => Stop::NoMemory,
        Errno::SRCH => Stop::Exiting,
        Errno::NOSPC if request == Request::Fill => Stop::Exiting,
        other => Stop::Errno(other.raw_os_error()),
    };
    Progress::stopped(done, stop)
}

/// Asks once more if there is no mapping; see the module's header.
fn settled(mut ask: impl FnMut() -> Progress) -> Progress {
    match ask() {
        told if told.stop == Stop::Unmapped => ask(),
        told => told,
    }
}

const fn dont_wake(wake: bool) -> u64 {
    if wake { 0 } else { uapi::MODE_DONTWAKE }
}

impl Uffd {
    /// Fills the absent pages of `dst` with a copy of as many bytes at `src`, each page atomically.
    /// Works on read-only mappings too.
    ///
    /// # Safety
    /// `src` must be valid for reads of `dst.bytes()` bytes. Pages of it that this very caller would have
    /// to resolve must be present: the kernel waits for them. The bytes must be what the users of `dst`
    /// are to find.
    pub unsafe fn copy(&self, dst: VaRange, src: NonNull<u8>, how: Install, wake: bool) -> Progress {
        let protect = match how {
            Install::Writable => 0,
            Install::Tracked => uapi::MODE_COPY_WP,
        };
        settled(|| {
            let mut arg = uapi::uffdio_copy {
                dst: dst.start().get() as u64,
                src: src.as_ptr().expose_provenance() as u64,
                len: dst.bytes() as u64,
                mode: protect | dont_wake(wake),
                copy: 0,
            };
            // SAFETY: the structure is the request's. The kernel reads `src` within the length the caller
            // vouches for, and writes to pages that no one can have read before, because they were absent.
            let result = unsafe { self.request::<{ uapi::UFFDIO_COPY }, _>(&mut arg) };
            decode(Request::Fill, result, arg.copy, dst.pages())
        })
    }

    /// Makes the absent pages of `dst` zero.
    pub fn zero(&self, dst: VaRange, wake: bool) -> Progress {
        settled(|| {
            let mut arg = uapi::uffdio_zeropage { range: raw_range(dst), mode: dont_wake(wake), zeropage: 0 };
            // SAFETY: the structure is the request's; only absent pages of a registered range change, and
            // what they become is what the system itself would have made them.
            let result = unsafe { self.request::<{ uapi::UFFDIO_ZEROPAGE }, _>(&mut arg) };
            decode(Request::Fill, result, arg.zeropage, dst.pages())
        })
    }

    /// Moves `pages` frames from `src` to the absent pages at `dst`, each page atomically. `dst` must be
    /// registered with this descriptor; both mappings must be anonymous, writable and of one protection.
    ///
    /// A move that stops part way says [`Stop::Pending`] whatever stopped it; see the module's header.
    ///
    /// # Safety
    /// The moved pages are absent at `src` afterwards: the caller must own them or have shut their users
    /// out, and must know where they went. No Rust reference to either range may exist.
    pub unsafe fn move_pages(&self, dst: VirtAddr, src: VirtAddr, pages: PageCount, wake: bool) -> Progress {
        let mut arg = uapi::uffdio_move {
            dst: dst.get() as u64,
            src: src.get() as u64,
            len: pages.bytes() as u64,
            mode: dont_wake(wake),
            move_: 0,
        };
        // SAFETY: the structure is the request's, and the caller answers for both ranges.
        let result = unsafe { self.request::<{ uapi::UFFDIO_MOVE }, _>(&mut arg) };
        decode(Request::Move, result, arg.move_, pages)
    }

    /// Maps the pages of a shared mapping that are in the page cache, and wakes who waits for them.
    pub fn continue_(&self, range: VaRange) -> Progress {
        settled(|| {
            let mut arg = uapi::uffdio_continue { range: raw_range(range), mode: 0, mapped: 0 };
            // SAFETY: the structure is the request's; only absent pages of a registered range change, and
            // they get the bytes that their file already has.
            let result = unsafe { self.request::<{ uapi::UFFDIO_CONTINUE }, _>(&mut arg) };
            decode(Request::Continue, result, arg.mapped, range.pages())
        })
    }

    /// Write-protects the present pages of `range` (`on`), or lifts that. `wake` counts only for lifting.
    pub fn write_protect(&self, range: VaRange, on: bool, wake: bool) -> Progress {
        let mode = match (on, wake) {
            (true, _) => uapi::MODE_WRITEPROTECT_WP,
            (false, true) => 0,
            (false, false) => uapi::MODE_WRITEPROTECT_DONTWAKE,
        };
        settled(|| {
            let mut arg = uapi::uffdio_writeprotect { range: raw_range(range), mode };
            // SAFETY: the structure is the request's, and no byte of the memory changes.
            let result = unsafe { self.request::<{ uapi::UFFDIO_WRITEPROTECT }, _>(&mut arg) };
            decode(Request::Protect, result, 0, range.pages())
        })
    }

    /// Makes any access to the absent pages of `range` raise SIGBUS, and wakes who waits for them.
    pub fn poison(&self, range: VaRange) -> Progress {
        settled(|| {
            let mut arg = uapi::uffdio_poison { range: raw_range(range), mode: 0, updated: 0 };
            // SAFETY: the structure is the request's; only absent pages of a registered range change.
            let result = unsafe { self.request::<{ uapi::UFFDIO_POISON }, _>(&mut arg) };
            decode(Request::Fill, result, arg.updated, range.pages())
        })
    }

    /// Wakes every thread that waits for a page of `range`. Whoever finds its page still missing faults
    /// once more.
    pub fn wake(&self, range: VaRange) {
        let mut arg = raw_range(range);
        // SAFETY: the structure is the request's, and no byte of the memory changes.
        let result = unsafe { self.request::<{ uapi::UFFDIO_WAKE }, _>(&mut arg) };
        debug_assert!(result.is_ok(), "waking a range of whole pages has no way to fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: PageCount = PageCount::new(8);

    fn stopped(request: Request, errno: Errno, count: i64) -> (usize, Stop) {
        let progress = decode(request, Err(errno), count, WANTED);
        (progress.done.get(), progress.stop)
    }

    #[test]
    fn success_is_the_whole_range() {
        assert_eq!(decode(Request::Fill, Ok(()), 8 * 4096, WANTED), Progress::complete(WANTED));
        assert_eq!(decode(Request::Protect, Ok(()), 0, WANTED), Progress::complete(WANTED));
    }

    #[test]
    fn part_of_the_way_is_pending_with_the_pages_done() {
        assert_eq!(stopped(Request::Move, Errno::AGAIN, 3 * 4096), (3, Stop::Pending));
        assert_eq!(stopped(Request::Fill, Errno::AGAIN, 0), (0, Stop::Pending));
    }

    #[test]
    fn a_negative_count_never_becomes_pages() {
        for request in [Request::Fill, Request::Move, Request::Continue, Request::Protect] {
            for errno in (1..134).map(Errno::from_raw_os_error) {
                for count in [-i64::from(errno.raw_os_error()), -4096, i64::MIN, -1] {
                    assert_eq!(stopped(request, errno, count).0, 0, "{request:?} {errno:?} {count}");
                }
            }
        }
    }

    #[test]
    fn a_count_never_exceeds_what_was_asked() {
        assert_eq!(stopped(Request::Fill, Errno::AGAIN, i64::MAX), (8, Stop::Pending));
        assert_eq!(stopped(Request::Fill, Errno::AGAIN, 4095), (0, Stop::Pending));
    }

    #[test]
    fn each_error_has_its_meaning() {
        for (request, errno, stop) in [
            (Request::Fill, Errno::EXIST, Stop::Present),
            (Request::Fill, Errno::NOENT, Stop::Unmapped),
            (Request::Fill, Errno::NOMEM, Stop::NoMemory),
            (Request::Fill, Errno::SRCH, Stop::Exiting),
            (Request::Fill, Errno::NOSPC, Stop::Exiting),
            (Request::Fill, Errno::FAULT, Stop::Errno(14)),
            (Request::Move, Errno::NOENT, Stop::Hole),
            (Request::Move, Errno::BUSY, Stop::Busy),
            (Request::Move, Errno::INVAL, Stop::Refused),
            (Request::Move, Errno::EXIST, Stop::Present),
            (Request::Continue, Errno::FAULT, Stop::Hole),
            (Request::Protect, Errno::NOENT, Stop::Unmapped),
        ] {
            assert_eq!(stopped(request, errno, -i64::from(errno.raw_os_error())), (0, stop), "{errno:?}");
        }
    }
}
