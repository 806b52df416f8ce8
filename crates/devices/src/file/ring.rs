//! Batches through io_uring.
//!
//! What     [`Rings`]: a few rings made when the device is opened, each taken by one batch at a time.
//! Why      a disk is fast only with many requests under way; a ring gives it 64 at once with one system
//!          call, from any thread, with no thread of our own.
//! Owns     the rings and the lock flag of each. A flag is only ever tried: a batch that finds every ring
//!          taken is the caller's to do without (rule R7: nobody waits for a lock here).
//! Fails    never by itself. What a ring did not do is finished with positioned calls, which know the reason.
//!          A ring that the kernel no longer serves is retired.
//!
//! A ring does not survive a fork: its memory is not in the child. The process number tells.

use std::cell::UnsafeCell;
use std::fmt;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use rustix::process::{Pid, getpid};
use uhmm_core::device::Transfer;

use super::{Direction, Job, fail_piece, follows, positioned};
use crate::admit;

/// Requests of one ring under way.
const DEPTH: usize = 64;
/// Longer transfers are cut into requests of this many bytes.
const PIECE: usize = 1 << 20;
/// Neighbouring transfers that go in one request.
const VECTOR: usize = 16;
/// How often an overloaded kernel is asked again before a ring is given up.
const PATIENCE: usize = 10_000;

/// The rings of one device.
pub(super) struct Rings {
    slots: Box<[Slot]>,
    maker: Pid,
}

struct Slot {
    /// Set by who uses the ring; never cleared again for a ring that is retired.
    taken: AtomicBool,
    retired: AtomicBool,
    ring: UnsafeCell<Ring>,
}

struct Ring {
    uring: ManuallyDrop<IoUring>,
    /// For each request under way, where its bytes are in RAM.
    vectors: Box<[[Vector; VECTOR]; DEPTH]>,
}

/// The kernel's `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Vector {
    base: *mut u8,
    len: usize,
}

// SAFETY: the ring is reached only by who has set `taken`, one thread at a time.
unsafe impl Sync for Slot {}
// SAFETY: the pointers in `vectors` are the kernel's to follow, while a batch is under way; the rest moves freely.
unsafe impl Send for Ring {}

impl Rings {
    /// `count` rings on the file `fd`; `None` if this kernel or a filter refuses io_uring.
    pub(super) fn new(count: usize, fd: BorrowedFd<'_>) -> Option<Self> {
        let slots = (0..count).map(|_| Slot::new(fd)).collect::<Option<Box<[_]>>>()?;
        (!slots.is_empty()).then(|| Self { slots, maker: getpid() })
    }

    /// Whether there is a ring that works, in this process.
    pub(super) fn usable(&self) -> bool {
        self.is_here() && self.slots.iter().any(|slot| !slot.retired.load(Ordering::Relaxed))
    }

    /// Whether this is the process that made the rings.
    fn is_here(&self) -> bool {
        getpid() == self.maker
    }

    /// Carries out the batch; `false`, with nothing done, if no ring is free.
    pub(super) fn carry(&self, job: Job<'_>, batch: &mut [Transfer]) -> bool {
        if !self.is_here() {
            return false;
        }
        let free =
            |slot: &&Slot| !slot.taken.load(Ordering::Relaxed) && !slot.taken.swap(true, Ordering::Acquire);
        let Some(slot) = self.slots.iter().find(free) else { return false };
        // SAFETY: this thread has just set `taken`, so that it alone reaches the ring until it clears it.
        let ring = unsafe { &mut *slot.ring.get() };
        match Batch::new(job, batch).run(ring) {
            Ok(()) => slot.taken.store(false, Ordering::Release),
            Err(Retired) => slot.retired.store(true, Ordering::Relaxed),
        }
        true
    }
}

impl fmt::Debug for Rings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rings of {DEPTH}", self.slots.len())
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        if self.is_here() {
            for slot in &mut self.slots {
                // The kernel takes a ring down in its own time; the file is to be free now.
                let _ = slot.ring.get_mut().uring.submitter().unregister_files();
                // SAFETY: dropped once, here, and never used again. In a child made by fork the rings are left
                // alone instead: where their memory was, there may be somebody else's now.
                unsafe { ManuallyDrop::drop(&mut slot.ring.get_mut().uring) }
            }
        }
    }
}

impl Slot {
    fn new(fd: BorrowedFd<'_>) -> Option<Self> {
        let mut builder = IoUring::builder();
        builder.dontfork();
        // Cooperative completion spares interrupts; Linux before 5.19 does not know it.
        let ring = builder.clone().setup_coop_taskrun().build(DEPTH as u32);
        let ring = ring.or_else(|_| builder.build(DEPTH as u32)).ok()?;
        ring.submitter().register_files(&[fd.as_raw_fd()]).ok()?;
        Some(Self {
            taken: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            ring: UnsafeCell::new(Ring {
                uring: ManuallyDrop::new(ring),
                vectors: Box::new([[Vector { base: ptr::null_mut(), len: 0 }; VECTOR]; DEPTH]),
            }),
        })
    }
}

/// The kernel does not serve this ring any more. The batch is done all the same.
struct Retired;

/// What one request carries: a part of one transfer, or several whole transfers.
#[derive(Clone, Copy)]
struct Piece {
    /// The first transfer.
    transfer: usize,
    /// How many there are.
    count: usize,
    /// Bytes from the start of the first one.
    offset: usize,
    len: usize,
}

/// A batch on its way through a ring.
struct Batch<'a> {
    job: Job<'a>,
    transfers: &'a mut [Transfer],
    /// The first byte that is in no piece yet.
    next: (usize, usize),
    pieces: [Piece; DEPTH],
    /// A bit for each of `pieces` that is with the kernel, or on its way there.
    under_way: u64,
}

impl<'a> Batch<'a> {
    fn new(job: Job<'a>, transfers: &'a mut [Transfer]) -> Self {
        let pieces = [Piece { transfer: 0, count: 0, offset: 0, len: 0 }; DEPTH];
        Self { job, transfers, next: (0, 0), pieces, under_way: 0 }
    }

    fn run(mut self, ring: &mut Ring) -> Result<(), Retired> {
        let mut refusals = 0;
        loop {
            let more = self.queue(ring);
            let waiting = self.under_way.count_ones() as usize;
            if waiting == 0 {
                return Ok(());
            }
            let want = if more { waiting.div_ceil(2) } else { waiting };
            if let Some(awake) = self.job.awake.filter(|_| !more)
                && ring.uring.submit().is_ok()
                && awake.wait(|| {
                    self.reap(ring);
                    self.under_way == 0
                })
            {
                return Ok(());
            }
            let waiting = self.under_way.count_ones() as usize;
            let entered = ring.uring.submit_and_wait(want.min(waiting));
            self.reap(ring);
            match entered.map_err(|error| Errno::from_io_error(&error)) {
                Ok(_) | Err(Some(Errno::INTR)) => {}
                Err(Some(Errno::AGAIN | Errno::BUSY | Errno::NOMEM)) if refusals < PATIENCE => {
                    refusals += 1;
                    rustix::thread::sched_yield();
                }
                Err(_) => {
                    self.leave(ring);
                    return Err(Retired);
                }
            }
        }
    }

    /// Queues pieces until the ring is full; `false` when the batch has no more.
    fn queue(&mut self, ring: &mut Ring) -> bool {
        let mut submission = ring.uring.submission();
        while self.under_way != u64::MAX {
            let Some(piece) = self.next_piece() else { return false };
            let slot = self.under_way.trailing_ones() as usize;
            let transfers = &self.transfers[piece.transfer..piece.transfer + piece.count];
            let offset = transfers[0].page().offset() + piece.offset as u64;
            let vector = &mut ring.vectors[slot];
            for (part, transfer) in vector.iter_mut().zip(transfers) {
                let base = transfer.ram().as_ptr().wrapping_add(piece.offset);
                *part = Vector { base, len: piece.len.min(transfer.bytes()) };
            }
            let (file, parts, count) = (types::Fixed(0), vector.as_ptr().cast(), piece.count as u32);
            let entry = match self.job.direction {
                Direction::Read => opcode::Readv::new(file, parts, count).offset(offset).build(),
                Direction::Write => opcode::Writev::new(file, parts, count).offset(offset).build(),
            };
            // SAFETY: the transfer's maker promised that its RAM stays accessible until the batch is done, and
            // `run` returns only when the kernel has answered, or never got, every piece. The registered file
            // stays with the ring, and so does the vector, which nobody changes while its bit is set.
            if unsafe { submission.push(&entry.user_data(slot as u64)) }.is_err() {
                self.finish(piece, 0);
                continue;
            }
            self.pieces[slot] = piece;
            self.under_way |= 1 << slot;
        }
        true
    }

    fn next_piece(&mut self) -> Option<Piece> {
        loop {
            let (index, offset) = self.next;
            let transfer = self.transfers.get_mut(index)?;
            let len = (transfer.bytes().saturating_sub(offset)).min(PIECE);
            if len == 0 || !admit(self.job.pages, transfer) {
                self.next = (index + 1, 0);
                continue;
            }
            if offset + len < transfer.bytes() || offset > 0 {
                self.next = (index, offset + len);
                return Some(Piece { transfer: index, count: 1, offset, len });
            }
            let mut piece = Piece { transfer: index, count: 1, offset: 0, len };
            while let [before, after, ..] = &self.transfers[index + piece.count - 1..]
                && follows(self.job, before, after)
                && piece.count < VECTOR
                && piece.len + after.bytes() <= PIECE
            {
                piece.len += after.bytes();
                piece.count += 1;
            }
            self.next = (index + piece.count, 0);
            return Some(piece);
        }
    }

    /// Takes every answer that is there.
    fn reap(&mut self, ring: &mut Ring) {
        for answer in ring.uring.completion() {
            let slot = answer.user_data() as usize % DEPTH;
            self.under_way &= !(1 << slot);
            self.finish(self.pieces[slot], usize::try_from(answer.result()).unwrap_or(0));
        }
    }

    /// Finishes a piece of which `done` bytes are done.
    fn finish(&mut self, piece: Piece, done: usize) {
        let transfers = &mut self.transfers[piece.transfer..piece.transfer + piece.count];
        let [transfer] = transfers else { return positioned::finish_run(self.job, transfers, done) };
        let offset = transfer.page().offset() + piece.offset as u64;
        let ram = transfer.ram().as_ptr().wrapping_add(piece.offset);
        let Some(ram) = NonNull::new(ram) else { return };
        if let Err(error) = positioned::finish(self.job, offset, ram, piece.len, done) {
            fail_piece(transfer, piece.offset, error);
        }
    }

    /// Does the rest without the ring, which gets no system call any more: what the kernel has taken it still
    /// answers, and what it has not taken it will never see.
    fn leave(&mut self, ring: &mut Ring) {
        let never_seen = ring.uring.submission().len();
        while self.under_way.count_ones() as usize > never_seen {
            rustix::thread::sched_yield();
            self.reap(ring);
        }
        while self.under_way != 0 {
            let slot = self.under_way.trailing_zeros() as usize;
            self.under_way &= !(1 << slot);
            self.finish(self.pieces[slot], 0);
        }
        while let Some(piece) = self.next_piece() {
            self.finish(piece, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{FromRawFd, OwnedFd};
    use std::path::Path;

    use uhmm_addr::ByteSize;
    use uhmm_testdev::device_suite::{Ram, read, write};

    use super::*;
    use crate::FileDevice;

    /// Puts another file where the ring's descriptor is, as a program that closes what it does not know does.
    fn break_ring(slot: &mut Slot) {
        let null = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: the descriptor is the ring's, which keeps it open; the borrowed copy is never dropped.
        let mut ring =
            ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(slot.ring.get_mut().uring.as_raw_fd()) });
        rustix::io::dup2(&null, &mut ring).unwrap();
    }

    #[test]
    fn a_broken_ring_is_retired_and_nothing_is_lost() {
        let options = FileDevice::options().rings(2);
        let mut device = options.temporary(Some(Path::new("/var/tmp")), Some(ByteSize::mib(8))).unwrap();
        let Some(rings) = &mut device.rings else {
            println!("skipped: io_uring is refused here");
            return;
        };
        break_ring(&mut rings.slots[0]);
        let mut ram = Ram::new(1024);
        (0..1024).for_each(|i| ram.stamp(i, 2 * i as u64 + 1));
        let list: Vec<_> = (0..300).map(|i| (i, 1 + i % 2, 4 * i as u64)).collect();
        write(&device, &ram, &list);
        assert!(device.uses_io_uring(), "one of two is left");
        if let Some(rings) = &mut device.rings {
            break_ring(&mut rings.slots[1]);
        }
        let target = Ram::new(1024);
        read(&device, &target, &list);
        assert!(!device.uses_io_uring());
        read(&device, &target, &list);
        list.iter().for_each(|&(first, ..)| assert_eq!(target.stamp_of(first), Some(2 * first as u64 + 1)));
    }
}
