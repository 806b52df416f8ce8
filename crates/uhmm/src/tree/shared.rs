//! Statistics of a process tree, in memory that its processes share with the keeper.
//!
//! What     [`ProcessBlock`], what one process counts, a page of the shared file; [`Latency`], how long faults
//!          took; [`Totals`], the sum over all processes, living and dead, and the message that carries it.
//! Why      a process can be killed at any moment; what it has counted must be there afterwards, and counting
//!          must cost a fault handler one atomic addition.
//! Owns     nothing: a block belongs to one process at a time, by the keeper's word.
//! Fails    only decoding does, with a [`ProtocolError`].

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use uhmm_addr::{ByteSize, PAGE_SIZE};
use uhmm_core::stats::{Counter, Skip, Stats};

use super::protocol::{self, Buffer, ProtocolError};

/// The size of a block in the file of statistics.
pub const BLOCK_BYTES: u64 = PAGE_SIZE as u64;
/// Blocks in the file, and so processes that can live at a time in a tree.
pub const BLOCKS: u32 = 1 << 15;
/// The size of the file, nearly all of it a hole.
pub const STATS_FILE_BYTES: u64 = BLOCK_BYTES * BLOCKS as u64;

/// What one process counts. All bytes zero: nothing yet.
#[repr(C)]
#[derive(Debug, Default)]
pub struct ProcessBlock {
    /// Whose block it is; 0 for a free one.
    pub pid: AtomicU64,
    /// The most that was in RAM at a time.
    pub peak_resident_bytes: AtomicU64,
    /// How long threads waited for the answers to their faults, one after another and side by side.
    pub waiting_ns: AtomicU64,
    /// How often more than the budget was in RAM.
    pub over_budget: AtomicU64,
    /// Whether the process ended, or lost an allocation, because memory and device were full.
    pub out_of_memory: AtomicU64,
    /// How often the device had no room for a page.
    pub device_full: AtomicU64,
    _reserved: [AtomicU64; 2],
    /// The counters of its address space.
    pub stats: Stats,
    /// How long its faults took.
    pub latency: Latency,
}

const _: () = {
    assert!(core::mem::offset_of!(ProcessBlock, stats) == 64);
    assert!(size_of::<ProcessBlock>() <= BLOCK_BYTES as usize);
    assert!(align_of::<ProcessBlock>() <= 8);
};

impl ProcessBlock {
    /// The block that begins at `start`.
    ///
    /// # Safety
    /// `start` must be the first byte of a block in a mapping of the file of statistics: aligned, readable and
    /// writable for [`BLOCK_BYTES`], as long as `'a`, and accessed as a block only.
    pub unsafe fn at<'a>(start: NonNull<u8>) -> &'a Self {
        // SAFETY: the caller's promise; the block is made of atomics, for which all bytes are valid, and which
        // other processes may change meanwhile.
        unsafe { start.cast().as_ref() }
    }

    /// Notes that so much is in RAM now.
    pub fn note_resident(&self, now: ByteSize) {
        self.peak_resident_bytes.fetch_max(now.bytes(), Ordering::Relaxed);
    }

    /// Makes the block free again, with nothing counted.
    pub fn clear(&self) {
        for word in self.words() {
            word.store(0, Ordering::Relaxed);
        }
    }

    fn words(&self) -> &[AtomicU64] {
        let len = size_of::<Self>() / size_of::<AtomicU64>();
        // SAFETY: `Self` is `repr(C)` and consists of atomic 64-bit words throughout, so that it is an array of
        // them, without padding.
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(self).cast(), len) }
    }
}

/// Buckets of [`Latency`].
pub const BUCKETS: usize = 128;

/// How often something took how long: four buckets for every power of two of nanoseconds, up to 8 s.
#[repr(transparent)]
#[derive(Debug)]
pub struct Latency {
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Latency {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS] }
    }
}

impl Latency {
    /// Once more, `ns` nanoseconds.
    pub fn record(&self, ns: u64) {
        self.buckets[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts so far.
    pub fn snapshot(&self) -> Histogram {
        Histogram { counts: core::array::from_fn(|n| self.buckets[n].load(Ordering::Relaxed)) }
    }

    /// The time that a share of `q` (0 to 1) did not exceed; `None` if nothing was recorded.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        self.snapshot().quantile(q)
    }
}

const fn bucket_of(ns: u64) -> usize {
    if ns < 4 {
        return ns as usize;
    }
    let power = ns.ilog2();
    let quarter = (ns >> (power - 2)) & 3;
    let bucket = (power as usize - 1) * 4 + quarter as usize;
    if bucket < BUCKETS { bucket } else { BUCKETS - 1 }
}

/// The largest time of a bucket, in nanoseconds.
const fn bucket_end(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64;
    }
    let power = bucket / 4 + 1;
    let next = 4 + (bucket % 4) as u64 + 1;
    (next << (power - 2)) - 1
}

/// [`Latency`] at one moment, or of several processes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Histogram {
    counts: [u64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; BUCKETS] }
    }
}

impl Histogram {
    /// Everything in `other` as well.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts) {
            *mine = mine.saturating_add(theirs);
        }
    }

    /// How often anything was recorded.
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0, |sum: u64, count| sum.saturating_add(*count))
    }

    /// The time that a share of `q` (0 to 1) did not exceed, to a quarter of a power of two; `None` if nothing
    /// was recorded.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let total = self.total();
        if total == 0 {
            return None;
        }
        let wanted = ((total as f64 * q.clamp(0.0, 1.0)).ceil() as u64).clamp(1, total);
        let mut seen = 0_u64;
        let bucket = self.counts.iter().position(|count| {
            seen = seen.saturating_add(*count);
            seen >= wanted
        })?;
        Some(Duration::from_nanos(bucket_end(bucket)))
    }
}

/// What happened in a whole tree.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Totals {
    /// Processes that had an agent.
    pub processes: u64,
    /// The most that any one of them had in RAM at a time.
    pub peak_resident_bytes: u64,
    /// How long threads waited for the answers to their faults, all added up.
    pub waiting_ns: u64,
    /// How often more than the budget was in RAM.
    pub over_budget: u64,
    /// Processes that ended, or lost an allocation, because memory and device were full.
    pub out_of_memory: u64,
    /// How often the device had no room for a page.
    pub device_full: u64,
    /// Processes that ended because uhmm failed in them, or that were refused.
    pub failed: u64,
    /// Pages of the device in use.
    pub device_pages: u64,
    /// The process that lost a page first, as far as is known; 0 if none was lost.
    pub lost_by: u64,
    /// The address of that page.
    pub first_lost: u64,
    /// By [`Counter`].
    counters: [u64; Counter::ALL.len()],
    /// By [`Skip`].
    skipped: [u64; Skip::ALL.len()],
    /// How long faults took.
    pub latency: Histogram,
}

const SCALARS: usize = 10;

impl Totals {
    /// Words of the message.
    pub(super) const WORDS: usize = SCALARS + Counter::ALL.len() + Skip::ALL.len() + BUCKETS;

    /// What `counter` counted.
    pub const fn get(&self, counter: Counter) -> u64 {
        self.counters[counter as usize]
    }

    /// Every reason for which pages were skipped, with their number.
    pub fn skipped(&self) -> impl Iterator<Item = (Skip, u64)> {
        Skip::ALL.into_iter().map(|skip| (skip, self.skipped[skip as usize])).filter(|(_, n)| *n > 0)
    }

    /// Adds what one process counted: sums, and the largest of the peaks.
    pub fn fold(&mut self, block: &ProcessBlock) {
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
        self.peak_resident_bytes = self.peak_resident_bytes.max(load(&block.peak_resident_bytes));
        add(&mut self.waiting_ns, load(&block.waiting_ns));
        add(&mut self.over_budget, load(&block.over_budget));
        add(&mut self.out_of_memory, load(&block.out_of_memory));
        add(&mut self.device_full, load(&block.device_full));
        if let (0, Some(address)) = (self.lost_by, block.stats.first_lost()) {
            self.lost_by = load(&block.pid);
            self.first_lost = address.get() as u64;
        }
        for counter in Counter::ALL {
            add(&mut self.counters[counter as usize], block.stats.get(counter));
        }
        for (reason, pages) in block.stats.skipped().iter() {
            add(&mut self.skipped[reason as usize], pages);
        }
        self.latency.merge(&block.latency.snapshot());
    }

    /// The message's bytes, in `buffer`.
    pub fn encode<'b>(&self, buffer: &'b mut Buffer) -> &'b [u8] {
        let scalars = [
            self.processes,
            self.peak_resident_bytes,
            self.waiting_ns,
            self.over_budget,
            self.out_of_memory,
            self.device_full,
            self.failed,
            self.device_pages,
            self.lost_by,
            self.first_lost,
        ];
        let all = scalars.iter().chain(&self.counters).chain(&self.skipped).chain(&self.latency.counts);
        let mut fields = [0; Self::WORDS];
        for (field, value) in fields.iter_mut().zip(all) {
            *field = *value;
        }
        protocol::encode(protocol::TOTALS, &fields, buffer)
    }

    /// The totals that `bytes` are.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        match protocol::kind_of(bytes)? {
            protocol::TOTALS => {}
            kind => return Err(ProtocolError::Kind(kind)),
        }
        let fields: [u64; Self::WORDS] = protocol::words(bytes)?;
        let mut fields = fields.into_iter();
        let mut next = || fields.next().unwrap_or(0);
        Ok(Self {
            processes: next(),
            peak_resident_bytes: next(),
            waiting_ns: next(),
            over_budget: next(),
            out_of_memory: next(),
            device_full: next(),
            failed: next(),
            device_pages: next(),
            lost_by: next(),
            first_lost: next(),
            counters: core::array::from_fn(|_| next()),
            skipped: core::array::from_fn(|_| next()),
            latency: Histogram { counts: core::array::from_fn(|_| next()) },
        })
    }
}

#[cfg(test)]
mod tests;
