//! Migration out of RAM, in phases that consume each other (rule R1).
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
//! Locks   the layout lock for reading from collect to the end of isolate, and in commit; none during copy.
//! Fails   page by page, with a reason ([`Skip`](crate::stats::Skip)); partial success is normal.
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

mod collect;
mod commit;
mod copy;
mod huge;
mod isolate;
mod staged;

use alloc::sync::Arc;

use uhmm_addr::{PageCount, VaRange};

pub use collect::{Collected, Select};
pub use copy::Copied;
pub use isolate::Isolated;
pub use staged::WriteBack;

use crate::host::Host;
use crate::mm::{Epoch, Mm};
use crate::pagemap::Pagemap;
use crate::stats::Skipped;

/// The most pages that one batch moves: a chunk.
pub const BATCH: PageCount = PageCount::new(uhmm_addr::CHUNK_PAGES);

/// What a migration did.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Migrated {
    /// Pages that are on the device now.
    pub moved: PageCount,
    /// The others, by reason.
    pub skipped: Skipped,
}

impl<H: Host> Mm<H> {
    /// Moves the present pages of `range`, registered since before `since`, to `to`, batch by batch. `select`
    /// says which.
    ///
    /// The caller's thread must not run signal handlers that touch managed memory meanwhile: they would
    /// wait for claims that this thread holds.
    pub fn migrate(&self, range: VaRange, since: Epoch, to: &Arc<Pagemap>, select: Select) -> Migrated {
        let mut result = Migrated::default();
        for chunk in range.chunks() {
            if let Some(moved) = self.migrate_huge(chunk, since, to, select, &mut result.skipped) {
                result.moved = result.moved.plus(moved);
                continue;
            }
            let mut rest = Some(chunk);
            while let Some(part) = rest {
                let (collected, looked_at) = self.collect(part, since, select, &mut result.skipped);
                rest = part.skip(looked_at);
                let Some(collected) = collected else { continue };
                if let Some(isolated) = collected.isolate(&mut result.skipped) {
                    let copied = isolated.copy(to, &mut result.skipped);
                    result.moved = result.moved.plus(copied.commit(&mut result.skipped));
                }
            }
        }
        self.stats.skip(&result.skipped);
        result
    }
}
