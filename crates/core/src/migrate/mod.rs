//! Migration: out of RAM in phases that consume each other (rule R1), and between devices.
//!
//! ```text
//!   range ──collect──► Collected ──isolate──► Isolated ──copy──► Copied ──commit──► counted
//!                       words claimed          frames in arena    bytes on device    words say Device
//!                       pages still mapped     pages unmapped     both copies valid  frames free again
//! ```
//!
//! Why     the kernel's `migrate_vma_setup / _pages / _finalize` share one struct and a convention. Here a
//!         phase cannot be skipped, repeated or forgotten: dropping any of them puts the pages back.
//! Faults  a page that is touched while it moves is never lost and hardly waits: until it is isolated the
//!         touch waits a few microseconds for the claim; from then on the page is taken back from its slot
//!         (copied, while the device reads the slot), and commit finds it gone.
//! Ways    frames are moved (`UFFDIO_MOVE`); where the host refuses, they are copied out behind a write
//!         protection and then discarded. The second way has a gap that the kernel leaves open: between the
//!         REMOVE event of the discard and the discard itself, another thread may unmap the page and map
//!         something else there. It is taken only for pages that cannot be moved.
//! Staging [`Isolated::stage`] ends half way on purpose: the page stays in its slot, a touch takes it back
//!         for the price of a move, and [`Mm::write_back`] sends it on later.
//! Others  [`Mm::migrate_from`] selects by owner, as the kernel does ([`Sources`]): `holes` get pages without a
//!         copy, pages on one device go to another in `between`; `evict` empties a device; `lend` gives pages in RAM
//!         to a device alone; `in_place` maps the pages of coherent devices. What the kernel does
//!         beside each, and the tests, are in `docs/migration.md`.
//! Locks   the layout lock for reading from collect to the end of isolate, and in commit; none during copy.
//! Fails   page by page, with a reason ([`Skip`]); partial success is normal.
//!
//! A phase is used once, and there is no way past one:
//!
//! ```
//! # use uhmm_core::{host::Host, migrate::Collected, pagemap::Pagemap, stats::Skipped};
//! # use std::sync::Arc;
//! fn phases<H: Host>(collected: Collected<'_, H>, to: &Arc<Pagemap>, skipped: &mut Skipped) {
//!     let isolated = collected.isolate(skipped).unwrap();
//!     isolated.copy(to, skipped).commit(skipped);
//! }
//! ```
//! ```compile_fail,E0382
//! # use uhmm_core::{host::Host, migrate::Collected, pagemap::Pagemap, stats::Skipped};
//! # use std::sync::Arc;
//! fn phases<H: Host>(collected: Collected<'_, H>, to: &Arc<Pagemap>, skipped: &mut Skipped) {
//!     let isolated = collected.isolate(skipped).unwrap();
//!     collected.isolate(skipped);
//! }
//! ```
//! ```compile_fail,E0382
//! # use uhmm_core::{host::Host, migrate::Collected, pagemap::Pagemap, stats::Skipped};
//! # use std::sync::Arc;
//! fn phases<H: Host>(collected: Collected<'_, H>, to: &Arc<Pagemap>, skipped: &mut Skipped) {
//!     let isolated = collected.isolate(skipped).unwrap();
//!     isolated.copy(to, skipped).commit(skipped);
//!     isolated.stage(|_| ());
//! }
//! ```
//! ```compile_fail,E0599
//! # use uhmm_core::{host::Host, migrate::Collected, pagemap::Pagemap, stats::Skipped};
//! # use std::sync::Arc;
//! fn phases<H: Host>(collected: Collected<'_, H>, to: &Arc<Pagemap>, skipped: &mut Skipped) {
//!     collected.copy(to, skipped);
//! }
//! ```

mod between;
mod collect;
mod commit;
mod copy;
mod evict;
mod holes;
mod huge;
mod in_place;
mod isolate;
mod lend;
mod staged;

use alloc::sync::Arc;

use uhmm_addr::{PageCount, VaRange};

pub use collect::{Collected, Select};
pub use copy::Copied;
pub use isolate::Isolated;
pub use staged::WriteBack;

use crate::fault::Scratch;
use crate::host::Host;
use crate::mm::{Epoch, Mm};
use crate::notifier::Owner;
use crate::pagemap::Pagemap;
use crate::stats::{Skip, Skipped};

/// The most pages that one batch moves: a chunk.
pub const BATCH: PageCount = PageCount::new(uhmm_addr::CHUNK_PAGES);

/// Which pages of a range move (the kernel's `MIGRATE_VMA_SELECT_*`), and whose doing it is.
///
/// The kernel has one owner for both; here whoever does not say that a migration is his own doing
/// ([`Sources::by`]) is told of it like everybody else, and no mirror can be out of date for that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sources {
    /// Pages in RAM, all or the cold ones (`SELECT_SYSTEM`).
    pub ram: Option<Select>,
    /// Pages that were never written: they get a page on the device, which reads as zeros, without a copy.
    pub holes: bool,
    /// Pages on private devices of this owner (`SELECT_DEVICE_PRIVATE`).
    pub private: Option<Owner>,
    /// Pages on coherent devices of this owner (`SELECT_DEVICE_COHERENT`).
    pub coherent: Option<Owner>,
    /// Whose doing the migration is: that owner's driver brings its mirrors up to date itself.
    pub by: Option<Owner>,
}

impl Sources {
    /// No page at all, to add to.
    pub const NONE: Self = Self { ram: None, holes: false, private: None, coherent: None, by: None };
    /// Pages in RAM and holes, as the kernel selects them.
    pub const RAM: Self = Self { ram: Some(Select::All), holes: true, ..Self::NONE };
}

/// What a migration did.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Migrated {
    /// Pages that are on the device now.
    pub moved: PageCount,
    /// Of these, the ones that had nothing in them: nothing was copied.
    pub holes: PageCount,
    /// Of these, the ones that came from another device without a stop in RAM.
    pub direct: PageCount,
    /// The others, by reason.
    pub skipped: Skipped,
}

impl Migrated {
    /// What `other` did as well.
    pub fn merge(&mut self, other: &Self) {
        self.moved = self.moved.plus(other.moved);
        self.holes = self.holes.plus(other.holes);
        self.direct = self.direct.plus(other.direct);
        self.skipped.merge(&other.skipped);
    }
}

/// How pages leave RAM.
#[derive(Clone, Copy)]
struct Job<'a> {
    since: Epoch,
    to: &'a Arc<Pagemap>,
    select: Select,
    by: Option<Owner>,
    /// Pages that hold nothing go as well: those that read as zeros are among them.
    zeros: bool,
}

impl<H: Host> Mm<H> {
    /// Moves the present pages of `range`, registered since before `since`, to `to`, batch by batch. `select`
    /// says which.
    ///
    /// The caller's thread must not run signal handlers that touch managed memory meanwhile: they would
    /// wait for claims that this thread holds.
    pub fn migrate(&self, range: VaRange, since: Epoch, to: &Arc<Pagemap>, select: Select) -> Migrated {
        let mut result = Migrated::default();
        self.settle_pins(range);
        for chunk in range.chunks() {
            self.migrate_present(chunk, &Job { since, to, select, by: None, zeros: false }, &mut result);
            if to.memory().is_some() {
                self.map_all_in_place(chunk, None);
            }
        }
        self.stats.skip(&result.skipped);
        result
    }

    /// As [`Mm::migrate`], of the pages that `sources` says. Every page of `range` is counted once, as moved or by
    /// the reason why it was not.
    pub fn migrate_from(
        &self,
        range: VaRange,
        since: Epoch,
        to: &Arc<Pagemap>,
        sources: &Sources,
        scratch: &mut Scratch,
    ) -> Migrated {
        let mut result = Migrated::default();
        self.settle_pins(range);
        for chunk in range.chunks() {
            let mut rest = Some(chunk);
            while let Some(part) = rest {
                let away = |page| self.table.entry(page).load().is_on_device();
                let is_away = away(part.first());
                let others = part.iter().skip(1).take_while(|page| away(*page) == is_away).count();
                let part_alike = part.take(PageCount::new(1 + others));
                rest = part.skip(part_alike.pages());
                if is_away {
                    self.migrate_between(part_alike, to, sources, scratch, &mut result);
                } else {
                    self.migrate_home(part_alike, since, to, sources, &mut result);
                }
            }
            // Those that came to a coherent device, and those that could not leave one.
            if to.memory().is_some() || sources.coherent.is_some() {
                self.map_all_in_place(chunk, sources.by);
            }
        }
        self.stats.skip(&result.skipped);
        result
    }

    /// Moves pages of one chunk that are on no device, as far as `sources` says.
    fn migrate_home(
        &self,
        range: VaRange,
        since: Epoch,
        to: &Arc<Pagemap>,
        sources: &Sources,
        result: &mut Migrated,
    ) {
        let left = if sources.holes {
            self.migrate_holes(range, since, to, sources.by, result)
        } else {
            alloc::vec![range]
        };
        for part in left {
            match sources.ram {
                Some(select) => {
                    self.migrate_present(
                        part,
                        &Job { since, to, select, by: sources.by, zeros: sources.holes },
                        result,
                    );
                }
                None => result.skipped.add(Skip::Unselected, part.pages().get()),
            }
        }
    }

    /// Moves the present pages of a chunk, or of a part of one.
    fn migrate_present(&self, chunk: VaRange, job: &Job<'_>, result: &mut Migrated) {
        if let Some(moved) = self.migrate_huge(chunk, job, &mut result.skipped) {
            result.moved = result.moved.plus(moved);
            return;
        }
        let mut rest = Some(chunk);
        while let Some(part) = rest {
            let (collected, looked_at) = self.collect(part, job.since, job.select, &mut result.skipped);
            rest = part.skip(looked_at);
            let Some(collected) = collected else { continue };
            if let Some(isolated) = collected.by(job.by).zeros(job.zeros).isolate(&mut result.skipped) {
                let copied = isolated.copy(job.to, &mut result.skipped);
                result.moved = result.moved.plus(copied.commit(&mut result.skipped));
            }
        }
    }
}
