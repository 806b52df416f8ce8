//! Transfers with `pread`, `pwrite`, `preadv` and `pwritev`.
//!
//! What     [`carry`], a whole batch, neighbouring transfers in one call; [`finish`], one piece, to its end.
//! Why      the least latency for a single page, the fallback where io_uring is refused, and the one place
//!          that knows how interrupted and partial calls go on.
//! Fails    per transfer. Nothing here allocates or waits for anything but the file.

use std::array;
use std::io::{IoSlice, IoSliceMut};
use std::ptr::NonNull;
use std::slice;

use rustix::io::Errno;
use uhmm_addr::PAGE_SIZE;
use uhmm_core::device::{Transfer, TransferError};

use super::{Direction, Job, fail_piece, failure, follows};
use crate::{admit, fits};

/// Transfers in one vectored call.
const VECTOR: usize = 64;
/// How often a call that is told to try again does so.
const RETRIES: usize = 1000;

/// Carries out a batch.
pub(super) fn carry(job: Job<'_>, mut batch: &mut [Transfer]) {
    while let [first, ..] = batch {
        if !admit(job.pages, first) {
            batch = &mut batch[1..];
            continue;
        }
        let (run, rest) = batch.split_at_mut(run_length(job, batch));
        match run {
            [only] => whole(job, only, 0),
            several => vectored(job, several),
        }
        batch = rest;
    }
}

/// Whether [`carry`] does this batch with one call.
pub(super) fn is_one_request(job: Job<'_>, batch: &[Transfer]) -> bool {
    match batch {
        [] | [_] => true,
        [first, ..] => fits(job.pages, first.page(), first.pages()) && run_length(job, batch) == batch.len(),
    }
}

/// How many transfers from the first on, which fits, follow each other on the device, at most [`VECTOR`].
fn run_length(job: Job<'_>, batch: &[Transfer]) -> usize {
    let neighbours = batch.iter().zip(batch.iter().skip(1)).take(VECTOR - 1);
    1 + neighbours.take_while(|(before, after)| follows(job, before, after)).count()
}

/// One call for all of `run`, then one by one what it left.
fn vectored(job: Job<'_>, run: &mut [Transfer]) {
    let Some(first) = run.first() else { return };
    let offset = first.page().offset();
    let moved = match job.direction {
        Direction::Read => {
            let mut parts: [IoSliceMut<'_>; VECTOR] = array::from_fn(|_| IoSliceMut::new(&mut []));
            for (part, transfer) in parts.iter_mut().zip(&*run) {
                // SAFETY: the transfer's maker promised that these bytes may be written and that nobody else
                // accesses them until the batch is done.
                *part = IoSliceMut::new(unsafe {
                    slice::from_raw_parts_mut(transfer.ram().as_ptr(), transfer.bytes())
                });
            }
            rustix::io::preadv(job.fd, &mut parts[..run.len()], offset)
        }
        Direction::Write => {
            let mut parts = [IoSlice::new(&[]); VECTOR];
            for (part, transfer) in parts.iter_mut().zip(&*run) {
                // SAFETY: the transfer's maker promised that these bytes can be read until the batch is done.
                *part =
                    IoSlice::new(unsafe { slice::from_raw_parts(transfer.ram().as_ptr(), transfer.bytes()) });
            }
            rustix::io::pwritev(job.fd, &parts[..run.len()], offset)
        }
    };
    finish_run(job, run, moved.unwrap_or(0));
}

/// Finishes neighbouring transfers, of which `done` bytes in all are done. Each gets the outcome that is its
/// own, whatever stopped the call that did the first part.
pub(super) fn finish_run(job: Job<'_>, run: &mut [Transfer], mut done: usize) {
    for transfer in run {
        let part = done.min(transfer.bytes());
        done -= part;
        whole(job, transfer, part);
    }
}

/// Finishes `transfer`, of which `done` bytes are done.
fn whole(job: Job<'_>, transfer: &mut Transfer, done: usize) {
    if let Err(error) = finish(job, transfer.page().offset(), transfer.ram(), transfer.bytes(), done) {
        fail_piece(transfer, 0, error);
    }
}

/// Copies `len` bytes between `offset` in the file and `ram`; the first `done` are done already.
///
/// Goes on from whole pages, since direct access takes no other offset: a call that got less than a page
/// further has met the end.
pub(super) fn finish(
    job: Job<'_>,
    offset: u64,
    ram: NonNull<u8>,
    len: usize,
    mut done: usize,
) -> Result<(), TransferError> {
    let mut retries = 0;
    while done < len {
        let start = done - done % PAGE_SIZE;
        let at = ram.as_ptr().wrapping_add(start);
        let moved = match job.direction {
            // SAFETY: `start < len`, and the bytes belong to a transfer whose maker promised that they may be
            // written and that nobody else accesses them until the batch is done.
            Direction::Read => rustix::io::pread(
                job.fd,
                unsafe { slice::from_raw_parts_mut(at, len - start) },
                offset + start as u64,
            ),
            // SAFETY: as above, for reading.
            Direction::Write => rustix::io::pwrite(
                job.fd,
                unsafe { slice::from_raw_parts(at, len - start) },
                offset + start as u64,
            ),
        };
        match moved {
            Ok(moved) if start + moved > done => done = start + moved,
            Ok(_) => return Err(TransferError::Short(u32::try_from(done).unwrap_or(u32::MAX))),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if retries < RETRIES => {
                retries += 1;
                rustix::thread::sched_yield();
            }
            Err(errno) => return Err(failure(errno)),
        }
    }
    Ok(())
}
