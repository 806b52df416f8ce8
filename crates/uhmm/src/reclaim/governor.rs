//! How much of each step of eviction there is to be, by a budget.
//!
//! Owns    the reclaimer, and what is known of the pace at which room is used up.
//! Fails   [`Outcome`] says with what a cycle has ended.

use std::io;
use std::time::Duration;

use uhmm_addr::PageCount;
use uhmm_core::migrate::WriteBack;
use uhmm_core::pagetable::reuse::STEPS;
use uhmm_sys::clock::now;
use uhmm_sys::placement::Binding;

use super::{Reclaimer, WRITE_BATCH};

/// Bytes that a program writes to fresh memory in a microsecond, at the most.
const FASTEST: u64 = 4096;
/// From the decision to evict until there is room, with some to spare.
const LEAD: Duration = Duration::from_millis(8);
const SHORTEST_NAP: Duration = Duration::from_millis(1);
const LONGEST_NAP: Duration = Duration::from_millis(10);

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
