//! Eviction in the background: keeps the resident memory of an address space inside a budget.
//!
//! What    [`Reclaimer`] has the three steps: *stage* pages (a clock over the managed ranges takes present
//!         pages into the arena), *write back* the oldest staged pages to the device, *release* free frames
//!         to the system. [`Governor`] decides how much of each, by a budget.
//! Chance  a page that is touched while it is staged is taken back for the price of a move. The clock passes over pages
//!         that are expected back soon ([`reuse`](uhmm_core::pagetable::reuse)).
//! Lent    pages that a device has for itself have their turn like others; the device is told, and asks again if it
//!         needs them. Were they spared, little else would be left to choose from.
//! Nodes   memory that was added ([`Space::add_memory`](crate::Space::add_memory)) lies between RAM and the device: pages
//!         are demoted to it first, and from it when it is full (the kernel's `demote_folio_list`).
//! Budget  counted is what the gauge counts; faults may take as many pages from the system as are left (the
//!         allowance of [`Mm`](uhmm_core::mm::Mm)), and a fault beyond that waits until the governor has made
//!         room. That is back-pressure: a handler cannot starve the evictor.
//! Owns    the queue of staged slots. Slots that were taken back stay in it and are passed over.
//! Threads one thread runs a governor. It may allocate and sleep; it holds no lock across a transfer.
//! Fails   [`Outcome::Stuck`] when nothing can be evicted, [`Outcome::Full`] when the device has no room.

mod governor;
mod refused;
mod tiers;

use std::collections::VecDeque;
use std::sync::Arc;

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};
use uhmm_core::fault::Scratch;
use uhmm_core::frame::Slot;
use uhmm_core::migrate::{Select, WriteBack};
use uhmm_core::mm::Epoch;
use uhmm_core::pagemap::Pagemap;
use uhmm_core::pagetable::reuse::MOST_LAPS;
use uhmm_core::stats::{Skip, Skipped};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::scan::Region;

use crate::managed::Managed;
use crate::space::Nodes;
use refused::Refused;

pub use governor::{Gauge, Governor, Outcome};

/// Pages written in one go: 1 MiB.
const WRITE_BATCH: usize = 256;
/// Pages that the clock looks at in one go.
const SCAN_PAGES: PageCount = PageCount::new(4 * CHUNK_PAGES);
const REGIONS: usize = 64;
/// Pages that are staged in one go.
const STAGE_BATCH: PageCount = PageCount::new(128);
/// Pages that are released in one go.
const RELEASE_BATCH: PageCount = PageCount::new(32);
/// The three steps of eviction.
#[derive(Debug)]
pub struct Reclaimer {
    managed: Arc<Managed>,
    to: Arc<Pagemap>,
    hand: Vpn,
    lap: u32,
    staged: VecDeque<Slot>,
    regions: Box<[Region; REGIONS]>,
    refused: Refused,
    /// What lies between RAM and the device.
    nodes: Option<Arc<Nodes>>,
    /// Where the last look for pages of nodes ended.
    node_hand: Vpn,
    /// Batches that go to the device without another look at nodes from which nothing could be demoted.
    node_rest: u32,
    /// What demotions go through; made when one is needed.
    scratch: Option<(Scratch, Mapping)>,
}

impl Reclaimer {
    /// A reclaimer that evicts pages of `managed` to `to`.
    pub fn new(managed: Arc<Managed>, to: Arc<Pagemap>) -> Self {
        let regions = Box::new([Region::UNUSED; REGIONS]);
        let (hand, node_hand) = (Vpn::new(0), Vpn::new(0));
        let staged = VecDeque::new();
        Self {
            managed,
            to,
            hand,
            lap: 0,
            staged,
            regions,
            refused: Refused::new(),
            nodes: None,
            node_hand,
            node_rest: 0,
            scratch: None,
        }
    }

    /// The same, with the nodes before the device: pages go to a node as long as one has room, and from full nodes to the
    /// device.
    pub(crate) fn before(self, nodes: Arc<Nodes>) -> Self {
        Self { nodes: Some(nodes), ..self }
    }

    /// The address space.
    pub fn managed(&self) -> &Managed {
        &self.managed
    }

    /// The pagemap to which it evicts.
    pub fn pagemap(&self) -> &Pagemap {
        &self.to
    }

    /// Slots in the queue; some may have been taken back.
    pub fn queued(&self) -> PageCount {
        PageCount::new(self.staged.len())
    }

    /// Takes up to `want` cold pages into the arena. Fewer when the clock went round without finding any, or
    /// when the arena is full.
    pub fn stage(&mut self, want: PageCount) -> PageCount {
        let mut staged = PageCount::ZERO;
        let mut skipped = Skipped::default();
        let mut rounds = 0;
        while staged < want {
            let Some((range, since)) = self.managed.range_from(self.hand) else {
                rounds += 1;
                self.lap = self.lap.wrapping_add(1);
                // Where every page is hot, each has its turn within so many laps.
                if rounds > MOST_LAPS + 1 || self.managed.range_from(Vpn::new(0)).is_none() {
                    break;
                }
                self.hand = Vpn::new(0);
                continue;
            };
            // Pages that are lent to devices have their turns among the others, so that the hand takes small steps.
            let lends = self.managed.mm().has_lent();
            let window = range.take(if lends { STAGE_BATCH } else { SCAN_PAGES });
            let scanner = self.managed.mm().host().scanner();
            let Ok(scanned) = scanner.present(window, &mut self.regions[..]) else {
                self.hand = window.end_page();
                continue;
            };
            if lends {
                let (select, queue) = (Select::Cold { lap: self.lap }, &mut self.staged);
                let most = want.minus(staged);
                let ended = self.managed.mm().end_loans(window, select, most, |slot| queue.push_back(slot));
                staged = staged.plus(ended);
            }
            let mut hand = scanned.walk_end.page().max(window.first().forward(PageCount::ONE));
            for n in 0..scanned.regions {
                let present = self.regions[n].range;
                let (taken, behind) = self.stage_present(present, since, want.minus(staged), &mut skipped);
                staged = staged.plus(taken);
                if staged >= want {
                    hand = behind;
                    break;
                }
            }
            self.hand = hand;
            if self.managed.mm().arena().free_slots(self.managed.mm().host()).is_zero() {
                break;
            }
        }
        self.managed.mm().stats().skip(&skipped);
        staged
    }

    /// Stages up to `want` pages of `present`. Returns how many, and the page behind the last one looked at.
    fn stage_present(
        &mut self,
        present: VaRange,
        since: Epoch,
        want: PageCount,
        skipped: &mut Skipped,
    ) -> (PageCount, Vpn) {
        let before = self.staged.len();
        let staged = |reclaimer: &Self| PageCount::new(reclaimer.staged.len() - before);
        let mut rest = Some(present);
        let mut at = present.first();
        while let Some(part) = rest {
            let missing = want.minus(staged(self));
            if missing.is_zero() {
                break;
            }
            if let Some(behind) = self.refused.end_at(part) {
                at = behind;
                rest = VaRange::of_pages(at, present.end_page().since(at));
                continue;
            }
            let part = part.take(missing).take(STAGE_BATCH);
            let mut refused = Skipped::default();
            let looked_at = self.stage_part(part, since, &mut refused);
            if refused.get(Skip::Busy) > 0 {
                // Shared with a child or a parent, most likely: a frame of its own can be moved. Pages that
                // are pinned stay busy.
                refused = Skipped::default();
                self.managed.unshare(part.take(looked_at));
                self.stage_part(part.take(looked_at), since, &mut refused);
            }
            if !looked_at.is_zero() && refused.get(Skip::Refused) == looked_at.get() as u64 {
                self.refused.note(part.take(looked_at));
            }
            skipped.merge(&refused);
            give_way();
            at = part.first().forward(looked_at);
            rest = VaRange::of_pages(at, present.end_page().since(at));
        }
        (staged(self), at)
    }

    /// Stages what can be of the front of `part`; returns how much of it was looked at.
    fn stage_part(&mut self, part: VaRange, since: Epoch, skipped: &mut Skipped) -> PageCount {
        let select = Select::Cold { lap: self.lap };
        let (collected, looked_at) = self.managed.mm().collect(part, since, select, skipped);
        if let Some(isolated) = collected.and_then(|collected| collected.isolate(skipped)) {
            let staged = &mut self.staged;
            isolated.stage(|slot| staged.push_back(slot));
        }
        looked_at
    }

    /// Writes the oldest staged pages, about `want` of them, to a node or the device; their frames are free then.
    pub fn write_back(&mut self, want: PageCount) -> WriteBack {
        let count = want.get().min(WRITE_BATCH).min(self.staged.len());
        if let Some((node, room)) = self.node_with_room(PageCount::new(count)) {
            let written = self.write_to(&node, count.min(room.get()));
            // Its room may be gone, or it fails: the device is there for that.
            if written.full.is_zero() && written.failed.is_zero() {
                return written;
            }
            let rest = self.write_to(&self.to.clone(), written.full.plus(written.failed).get());
            let (moved, raced) = (written.moved.plus(rest.moved), written.raced.plus(rest.raced));
            return WriteBack { moved, raced, ..rest };
        }
        self.write_to(&self.to.clone(), count)
    }

    fn write_to(&mut self, to: &Arc<Pagemap>, count: usize) -> WriteBack {
        let batch: Vec<Slot> = self.staged.drain(..count).collect();
        let mut again = Vec::new();
        let result = self.managed.mm().write_back(&batch, to, |slot| again.push(slot));
        for slot in again.into_iter().rev() {
            self.staged.push_front(slot);
        }
        result
    }

    /// Lets free frames go back to the system, all but `keep`.
    pub fn release(&self, most: PageCount, keep: PageCount) -> PageCount {
        let mm = self.managed.mm();
        let wanted = mm.arena().free_frames(mm.host()).minus(keep).at_most(most);
        let mut released = PageCount::ZERO;
        while released < wanted {
            let some = mm.release_frames(wanted.minus(released).at_most(RELEASE_BATCH));
            if some.is_zero() {
                break;
            }
            released = released.plus(some);
            give_way();
        }
        released
    }
}

/// Lets a faulter or a handler have the processor, whichever waits for it here: the scheduler would let an eviction go
/// on for a millisecond or more, in which ten faults could be answered.
fn give_way() {
    rustix::thread::sched_yield();
}
