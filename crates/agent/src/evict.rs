//! The evictor thread: a [`Governor`] over this process, and what to do when it gets nowhere.

use std::sync::atomic::Ordering;
use std::time::Duration;

use uhmm::reclaim::{Governor, Outcome, Reclaimer};
use uhmm_addr::PageCount;

use crate::adopt::ProcessGauge;
use crate::fork::Evicting;
use crate::process::Agent;
use crate::start;

/// Cycles without progress after which faults may go beyond the budget.
const STUCK_CYCLES: u32 = 20;
/// Pages that they may take then, each time.
const BEYOND: PageCount = PageCount::new(64);

/// The life of the evictor.
pub fn run(agent: &'static Agent, gauge: ProcessGauge) {
    agent.managed.note_ours();
    let reclaimer = Reclaimer::new(agent.managed.clone(), agent.pagemap.clone());
    let mut governor = Governor::new(reclaimer, gauge, agent.budget);
    let (mut stuck, mut helped) = (0, false);
    while !agent.managed.mm().is_closed() {
        let seen = agent.managed.kicks();
        let evicting = Evicting::begin(agent);
        let outcome = governor.cycle();
        if !helped && agent.wants_help() {
            start::help();
            helped = true;
        }
        drop(evicting);
        agent.block.note_resident(governor.peak().size());
        agent.full.store(outcome == Outcome::Full, Ordering::Relaxed);
        let nap = match outcome {
            Outcome::Room(nap) => {
                stuck = 0;
                nap
            }
            Outcome::Full => {
                agent.block.device_full.fetch_add(1, Ordering::Relaxed);
                // For pages that come home, which make room on the device.
                agent.managed.mm().grant(BEYOND);
                agent.managed.announce_room();
                Duration::from_millis(5)
            }
            Outcome::Stuck | Outcome::Failed => {
                stuck += 1;
                if stuck > STUCK_CYCLES {
                    // Locked, pinned or shared memory fills the budget: the program goes on all the same.
                    agent.managed.mm().grant(BEYOND);
                    agent.managed.announce_room();
                    agent.block.over_budget.fetch_add(1, Ordering::Relaxed);
                }
                Duration::from_millis(1)
            }
        };
        agent.managed.wait_for_kick(seen, nap);
    }
}
