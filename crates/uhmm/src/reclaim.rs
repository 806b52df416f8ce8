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

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};
use uhmm_core::fault::Scratch;
use uhmm_core::frame::Slot;
use uhmm_core::migrate::{Select, WriteBack};
use uhmm_core::mm::Epoch;
use uhmm_core::pagemap::Pagemap;
use uhmm_core::pagetable::reuse::{MOST_LAPS, STEPS};
use uhmm_core::stats::{Skip, Skipped};
use uhmm_sys::clock::now;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::placement::Binding;
use uhmm_sys::scan::Region;

use crate::managed::Managed;
use crate::space::Nodes;

/// Pages written in one go: 1 MiB.
const WRITE_BATCH: usize = 256;
/// Pages that the clock looks at in one go.
const SCAN_PAGES: PageCount = PageCount::new(4 * CHUNK_PAGES);
const REGIONS: usize = 64;
/// Pages that are staged in one go.
const STAGE_BATCH: PageCount = PageCount::new(128);
/// Batches after which a full node is looked at again from which nothing could be demoted: a look is a walk.
const NODE_REST: u32 = 64;
/// How long pages of a mapping that allows nothing (locked, most likely) are left alone: an attempt copies them, and where
/// others are to be reached only by several laps each lap would.
const REFUSED_REST: Duration = Duration::from_millis(200);
/// Stretches of such pages that are remembered.
const REFUSED: usize = 64;
/// Pages that are released in one go.
const RELEASE_BATCH: PageCount = PageCount::new(32);
/// Bytes that a program writes to fresh memory in a microsecond, at the most.
const FASTEST: u64 = 4096;
/// From the decision to evict until there is room, with some to spare.
const LEAD: Duration = Duration::from_millis(8);
const SHORTEST_NAP: Duration = Duration::from_millis(1);
const LONGEST_NAP: Duration = Duration::from_millis(10);

/// The three steps of eviction.
#[derive(Debug)]
pub struct Reclaimer {
    managed: Arc<Managed>,
    to: Arc<Pagemap>,
    hand: Vpn,
    lap: u32,
    staged: VecDeque<Slot>,
    regions: Box<[Region; REGIONS]>,
    /// Stretches that could not be taken, and until when they are left alone.
    refused: VecDeque<(VaRange, Duration)>,
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
            refused: VecDeque::with_capacity(REFUSED),
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
            if let Some(behind) = self.end_of_refused(part) {
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
                self.note_refused(part.take(looked_at));
            }
            skipped.merge(&refused);
            give_way();
            at = part.first().forward(looked_at);
            rest = VaRange::of_pages(at, present.end_page().since(at));
        }
        (staged(self), at)
    }

    /// Where the stretch at the front of `part` ends that is left alone for now, if one begins there.
    fn end_of_refused(&mut self, part: VaRange) -> Option<Vpn> {
        if self.refused.is_empty() {
            return None;
        }
        let now = now();
        self.refused.retain(|(_, until)| *until > now);
        let known = self.refused.iter().find(|(range, _)| range.contains(part.first()));
        known.map(|(range, _)| range.end_page().min(part.end_page()))
    }

    /// Leaves `range` alone for a while: as long as what lies before it, if that is left alone.
    fn note_refused(&mut self, range: VaRange) {
        if let Some((last, _)) = self.refused.back_mut()
            && last.end_page() == range.first()
        {
            *last = VaRange::page(last.first()).grow(range.end_page().since(last.first()));
            return;
        }
        if self.refused.len() == REFUSED {
            self.refused.pop_front();
        }
        self.refused.push_back((range, now() + REFUSED_REST));
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

    /// A node with room, for `wanted` pages if that can be had by demoting others, and how much there is.
    fn node_with_room(&mut self, wanted: PageCount) -> Option<(Arc<Pagemap>, PageCount)> {
        let nodes = self.nodes.clone()?;
        let found = || {
            let rooms = nodes.online().into_iter().map(|map| {
                let room = room_on(&map);
                (map, room)
            });
            rooms.into_iter().find(|(_, room)| !room.is_zero())
        };
        if let Some(found) = found() {
            return Some(found);
        }
        if self.node_rest > 0 {
            self.node_rest -= 1;
            return None;
        }
        for node in nodes.online() {
            if !self.demote(&node, wanted).is_zero() {
                return found();
            }
        }
        self.node_rest = NODE_REST;
        None
    }

    /// Sends about `wanted` pages of a node on to the device. Which of them were used lately nobody knows where they are
    /// mapped in place, and where they are not none was: they go round by round, in the order of their addresses.
    /// Returns how many went.
    fn demote(&mut self, node: &Pagemap, wanted: PageCount) -> PageCount {
        if self.scratch.is_none() {
            self.scratch = Managed::scratch().ok();
        }
        let Some((scratch, _)) = &mut self.scratch else { return PageCount::ZERO };
        let mm = self.managed.mm();
        let (mut moved, mut rounds) = (PageCount::ZERO, 0);
        while moved < wanted && rounds < 2 {
            let Some((range, _)) = self.managed.range_from(self.node_hand) else {
                rounds += 1;
                self.node_hand = Vpn::new(0);
                continue;
            };
            let window = range.take(PageCount::new(CHUNK_PAGES - range.first().in_chunk()));
            self.node_hand = window.end_page();
            let on_node =
                |page: Vpn| mm.table().entry(page).load().pfn().is_some_and(|pfn| node.contains(pfn));
            let Some(first) = window.iter().find(|page| on_node(*page)) else { continue };
            // As many as are wanted, and no more: the others are read faster where they are.
            let part = VaRange::of_pages(first, window.end_page().since(first));
            let part = part.map_or(window, |part| part.take(wanted.minus(moved)));
            let done = mm.evict_pfns(part, node.range(), Some(&self.to), scratch);
            moved = moved.plus(done.moved);
            if !done.moved.is_zero() {
                self.node_hand = part.end_page();
            }
        }
        moved
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

/// Pages that can be put on a node.
fn room_on(node: &Pagemap) -> PageCount {
    if node.is_stopped() {
        return PageCount::ZERO;
    }
    let bad: usize = node.bad_pages().iter().map(|bad| bad.pages.get()).sum();
    node.range().pages.minus(node.live()).minus(PageCount::new(bad))
}

/// Lets a faulter or a handler have the processor, whichever waits for it here: the scheduler would let an eviction go
/// on for a millisecond or more, in which ten faults could be answered.
fn give_way() {
    rustix::thread::sched_yield();
}

/// Tells how much memory is in use.
pub trait Gauge {
    /// Pages in use now, frames of the arena included.
    fn resident(&mut self) -> io::Result<PageCount>;

    /// Called when memory runs short: whatever grew without our knowledge is to be put under management.
    fn adopt(&mut self);
}

/// How a cycle of the governor ended.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// There is room; look again after this time, or when asked.
    Room(Duration),
    /// Over the budget, and nothing could be evicted.
    Stuck,
    /// Over the budget, and the device has no room.
    Full,
    /// Over the budget, and the device fails.
    Failed,
}

/// How fast room is used up.
#[derive(Debug, Default)]
struct Pace {
    /// What there was at the last look, and when that was.
    room: PageCount,
    at: Duration,
    /// Pages in the time of a lead, falling by a quarter with each look.
    lead: PageCount,
}

impl Pace {
    /// The pages that will be gone, at the pace of late, before eviction has made room for others.
    fn lead(&mut self, room: PageCount) -> PageCount {
        let at = now();
        let elapsed = at.saturating_sub(self.at).as_micros().max(1);
        let used = self.room.minus(room).get() as u128 * LEAD.as_micros() / elapsed;
        let falling = PageCount::new(self.lead.get() / 4 * 3);
        self.lead = falling.max(PageCount::new(usize::try_from(used).unwrap_or(usize::MAX)));
        (self.at, self.room) = (at, room);
        self.lead
    }

    /// There is `room` after a round.
    fn left(&mut self, room: PageCount) {
        (self.at, self.room) = (now(), room);
    }
}

/// Keeps an address space inside its budget.
#[derive(Debug)]
pub struct Governor<G> {
    reclaimer: Reclaimer,
    gauge: G,
    budget: PageCount,
    /// Bounds of the free room at which eviction starts.
    lowest_low: PageCount,
    highest_low: PageCount,
    pace: Pace,
    /// The fewest pages that one round tries to free.
    least: PageCount,
    /// Staged pages that get the chance to be touched.
    second_chance: PageCount,
    /// Free frames kept for pages that come home.
    keep: PageCount,
    peak: PageCount,
    /// Evicted since the last step of the clock by which evicted pages age.
    evicted: PageCount,
    idle_cycles: u32,
    /// Where the thread may run; known once it runs.
    binding: Option<Binding>,
}

impl<G: Gauge> Governor<G> {
    /// A governor that keeps what `gauge` counts at `budget` at most.
    pub fn new(reclaimer: Reclaimer, gauge: G, budget: PageCount) -> Self {
        let part = |divisor: usize, least: usize, most: usize| {
            PageCount::new((budget.get() / divisor).clamp(least, most))
        };
        Self {
            reclaimer,
            gauge,
            budget,
            lowest_low: part(256, 32, 256),
            highest_low: part(64, 64, 1024),
            pace: Pace::default(),
            least: part(128, 16, 128),
            second_chance: part(64, 64, 1 << 15),
            keep: part(128, 16, 512),
            peak: PageCount::ZERO,
            evicted: PageCount::ZERO,
            idle_cycles: 0,
            binding: None,
        }
    }

    /// The most that was ever counted.
    pub const fn peak(&self) -> PageCount {
        self.peak
    }

    /// What counts the memory.
    pub const fn gauge(&mut self) -> &mut G {
        &mut self.gauge
    }

    /// The steps, for callers that want one of them.
    pub const fn reclaimer(&mut self) -> &mut Reclaimer {
        &mut self.reclaimer
    }

    fn room(&mut self) -> PageCount {
        // A gauge that fails would have us evict everything; better to believe in no room.
        let resident = self.gauge.resident().unwrap_or(self.budget);
        self.peak = self.peak.max(resident);
        let room = self.budget.minus(resident);
        self.reclaimer.managed().mm().set_allowance(room);
        room
    }

    /// Keeps the thread off the processor of a handler that must not be held up, as long as room is not `short`.
    fn stand_aside(&mut self, short: bool) {
        let busy = self.reclaimer.managed().busy_cpu().filter(|_| !short);
        let binding = self.binding.get_or_insert_with(Binding::of_current);
        let elsewhere = busy.zip(binding.free()).map(|(cpu, free)| free.without(cpu));
        binding.bind(elsewhere.filter(|cpus| cpus.count() > 0));
    }

    /// Looks once, and evicts until there is room.
    pub fn cycle(&mut self) -> Outcome {
        let mut room = self.room();
        let low = self.pace.lead(room).max(self.lowest_low).at_most(self.highest_low);
        self.stand_aside(room < self.lowest_low || low == self.highest_low);
        // Where more is taken in the time of a round, more is made room for.
        let high = PageCount::new(low.get() * 8 / 3).max(low.plus(self.least));
        self.reclaimer.managed().set_low_water(low);
        if room >= low {
            self.reclaimer.managed().mm().stop_growth(false);
            self.idle_cycles = self.idle_cycles.saturating_add(1);
            if self.idle_cycles.is_multiple_of(64) {
                self.reclaimer.pagemap().trim(4);
            }
            return Outcome::Room(Self::nap(room));
        }
        self.idle_cycles = 0;
        let mut fruitless = 0;
        while room < high {
            self.gauge.adopt();
            // Never a page at a time behind a program that takes a page at a time: short writes cost the disk
            // as much as long ones, and the program's reads wait behind them.
            let (progress, written) = self.step(high.minus(room).max(self.least));
            let before = room;
            room = self.room();
            self.reclaimer.managed().announce_room();
            if progress || room > before {
                fruitless = 0;
                continue;
            }
            fruitless += 1;
            if fruitless >= 3 {
                return match written {
                    _ if room >= low => Outcome::Room(Duration::from_millis(1)),
                    WriteBack { full, .. } if !full.is_zero() => {
                        // What comes home makes room on the device; what grows does not.
                        self.reclaimer.managed().mm().stop_growth(true);
                        Outcome::Full
                    }
                    WriteBack { failed, .. } if !failed.is_zero() => Outcome::Failed,
                    _ => Outcome::Stuck,
                };
            }
        }
        self.pace.left(room);
        self.reclaimer.managed().mm().stop_growth(false);
        // A device that fills up cannot afford copies of pages that are home.
        let map = self.reclaimer.pagemap();
        let crowded = map.live().get() > map.range().pages.get() / 10 * 9;
        if crowded {
            self.reclaimer.managed().mm().set_tracking(false);
        }
        Outcome::Room(Duration::from_millis(1))
    }

    /// One round of the three steps, towards `wanted` free pages. Says whether anything moved.
    fn step(&mut self, wanted: PageCount) -> (bool, WriteBack) {
        // As many pages wait in the arena as get their chance, and as many more as are about to be written.
        let missing = self.second_chance.plus(wanted).minus(self.reclaimer.queued());
        let staged = self.reclaimer.stage(missing.at_most(PageCount::new(2 * WRITE_BATCH)));
        let over = self.reclaimer.queued().minus(self.second_chance);
        // Short of pages to stage, the second chance is what gives.
        let write = if staged.is_zero() && over.is_zero() { wanted } else { over };
        let written = if write.is_zero() { WriteBack::default() } else { self.reclaimer.write_back(write) };
        self.grow_older(written.moved);
        let released = self.reclaimer.release(wanted.max(PageCount::ONE), self.keep);
        let moved = !staged.is_zero() || !written.moved.is_zero() || !written.raced.is_zero();
        (moved || !released.is_zero(), written)
    }

    /// `evicted` more pages have left.
    fn grow_older(&mut self, evicted: PageCount) {
        let step = PageCount::new((self.budget.get() / STEPS).max(1));
        self.evicted = self.evicted.plus(evicted);
        while self.evicted >= step {
            self.evicted = self.evicted.minus(step);
            self.reclaimer.managed().mm().grow_older();
        }
    }

    /// As long as no program can fill half of the room: fresh memory is not held up before eviction begins.
    fn nap(room: PageCount) -> Duration {
        let micros = room.size().bytes() / 2 / FASTEST;
        Duration::from_micros(micros).clamp(SHORTEST_NAP, LONGEST_NAP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(count: usize) -> PageCount {
        PageCount::new(count)
    }

    #[test]
    fn the_lead_follows_the_pace_at_once_and_falls_by_and_by() {
        let mut pace = Pace::default();
        pace.left(pages(1000));
        pace.at -= LEAD;
        let lead = pace.lead(pages(700)).get();
        assert!((290..=300).contains(&lead), "{lead}: 300 pages went in the time of a lead");
        pace.at -= LEAD;
        let later = pace.lead(pages(700)).get();
        assert!((210..=225).contains(&later), "{later}: none went since");
        pace.at -= LEAD;
        assert!(pace.lead(pages(900)).get() < later, "room that grew is no pace");
    }
}
