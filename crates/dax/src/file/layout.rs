//! Taking pages away that somebody may be using (`dax_layout_busy_page_range`, `xfs_break_dax_layouts`).
//!
//! What     [`Turn`], which tells when a page was let go of; [`Patience`] and [`Interrupt`], how long a caller waits;
//!          [`claim`], pages for the caller alone, or the first that is in use.
//! Why      a truncation gives blocks to whoever asks next. A page that a transfer still writes to must not be
//!          among them.
//! Protocol who uses pages refers to them ([`Pagemap::pin`]); who takes them away claims them ([`Pagemap::claim`]),
//!          which succeeds only if nobody refers to them, and from then on nobody can. Mappings are no references:
//!          they are replaced while the claim is held, before the blocks are free.
//!
//! ```text
//!   pin            claim → in use: wait for Turn, try again
//!   transfer
//!   let go ──────► claimed; metadata committed; mappings replaced; free; claim given up
//! ```
//!
//! Waits    without any lock held: whoever has the page may need one to let go of it. Everything is looked up again
//!          afterwards.
//! Source   The kernel finds pages that a page table gave out by unmapping first; here a page is given out by its number
//!          alone, and refusing comes first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use uhmm_addr::{Pfn, PfnRange};
use uhmm_core::pagemap::{PageError, Pagemap, UniquePages};
use uhmm_sys::futex;

/// Counts pages that were let go of.
#[derive(Debug, Default)]
pub(super) struct Turn(AtomicU32);

impl Turn {
    pub(super) fn now(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    /// A page was let go of.
    pub(super) fn next(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
        futex::wake(&self.0, u32::MAX);
    }

    /// Waits until one was since `seen`, a moment at most.
    fn wait(&self, seen: u32, most: Duration) {
        // A page can be had only just after it was counted here, so that a wait must not be long.
        let _ = futex::wait(&self.0, seen, Some(most.min(Duration::from_millis(2))));
    }
}

/// Ends waits from another thread.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Whoever waits with this gives up, now and later.
    pub fn raise(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn is_raised(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// How long to wait for pages that are in use.
#[derive(Clone, Debug)]
pub struct Patience {
    /// So long at most.
    pub limit: Duration,
    /// Or until this is raised.
    pub interrupt: Option<Interrupt>,
}

impl Patience {
    /// So long, and not to be interrupted.
    pub const fn of(limit: Duration) -> Self {
        Self { limit, interrupt: None }
    }
}

/// A wait that goes on.
pub(super) struct Waiting<'a> {
    patience: &'a Patience,
    since: Instant,
}

/// Why a wait ends.
pub(super) enum GiveUp {
    Interrupted,
    /// After so long.
    TimedOut(Duration),
}

impl<'a> Waiting<'a> {
    pub(super) fn begin(patience: &'a Patience) -> Self {
        Self { patience, since: Instant::now() }
    }

    /// Waits for the next turn after `seen`.
    pub(super) fn go_on(&self, turn: &Turn, seen: u32) -> Result<(), GiveUp> {
        if self.patience.interrupt.as_ref().is_some_and(Interrupt::is_raised) {
            return Err(GiveUp::Interrupted);
        }
        let waited = self.since.elapsed();
        let left = self.patience.limit.checked_sub(waited).filter(|left| !left.is_zero());
        turn.wait(seen, left.ok_or(GiveUp::TimedOut(waited))?);
        Ok(())
    }
}

/// Pages that nobody uses, for the caller alone. Those that are lost, and that nobody refers to, can be had by nobody
/// anyway.
///
/// # Errors
/// The first page that is in use, and how many references it has.
pub(super) fn claim(map: &Pagemap, ranges: &[PfnRange]) -> Result<Vec<UniquePages>, (Pfn, u32)> {
    let mut claims = Vec::with_capacity(ranges.len());
    for range in ranges {
        match map.claim(*range) {
            Ok(claim) => claims.push(claim),
            Err(PageError::InUse(pfn, count)) => return Err((pfn, count)),
            Err(PageError::Poisoned(_)) => {
                for unit in units(map, *range) {
                    match map.claim(unit) {
                        Ok(claim) => claims.push(claim),
                        Err(PageError::Poisoned(_)) if map.count(unit.start) == 0 => {}
                        Err(_) => return Err((unit.start, map.count(unit.start))),
                    }
                }
            }
            Err(_) => return Err((range.start, map.count(range.start))),
        }
    }
    Ok(claims)
}

/// Each compound page.
fn units(map: &Pagemap, range: PfnRange) -> impl Iterator<Item = PfnRange> {
    let unit = map.geometry().pages();
    let count = range.pages.get() / unit.get();
    (0..count).map(move |n| {
        let start = range.start.forward(uhmm_addr::PageCount::new(n * unit.get()));
        PfnRange::new(start, unit)
    })
}
