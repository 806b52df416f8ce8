//! Wake-ups that come from the processor on which the woken thread is to run.
//!
//! What     [`Relay`], by which a thread that has answered a fault leaves the wake-up to another one, which listens
//!          on the faulter's processor and runs only while nobody else wants it.
//! Why      waking a thread on another processor takes an interrupt there, and where processors are virtual that
//!          stops both of them for a while: 25 to 35 us from the call until the woken thread runs, against 3 to 5
//!          from the same processor. The scheduler leaves the woken thread where it was, because a processor with
//!          nothing but `SCHED_IDLE` threads counts as an idle one.
//! Owns     one word, the seat. It says whether somebody listens, and which range of pages was offered to it.
//! Races    an offer that is not taken at once is taken back, and whoever made it wakes by himself; the seat is empty
//!          then until the listener comes back to it. A listener may lose its processor between taking an
//!          offer and the wake-up, or in it: whoever made the offer calls [`Relay::settle`] before he
//!          sleeps, or when nothing happens. A wake-up too many harms nobody.
//! Fails    never.

use core::time::Duration;

use uhmm_addr::{PageCount, VaRange, Vpn};
use uhmm_core::sync::{AtomicU64, Ordering};

use crate::clock::now;

#[cfg(test)]
mod tests;

/// How long an offer stands.
const STANDS: Duration = Duration::from_micros(2);

const STATE: u64 = 3;
const EMPTY: u64 = 0;
const LISTENING: u64 = 1;
const OFFERED: u64 = 2;
const TAKEN: u64 = 3;
const PAGES_SHIFT: u32 = 2;
const PAGES: u64 = (1 << 10) - 1;
const PAGE_SHIFT: u32 = 12;

/// A seat for one listener. The all-zero one is empty.
#[derive(Debug, Default)]
pub struct Relay {
    seat: AtomicU64,
}

fn pack(range: VaRange) -> Option<u64> {
    let pages = range.pages().get() as u64;
    (pages <= PAGES).then_some((range.first().get() as u64) << PAGE_SHIFT | pages << PAGES_SHIFT)
}

fn unpack(seat: u64) -> Option<VaRange> {
    let pages = PageCount::new((seat >> PAGES_SHIFT & PAGES) as usize);
    VaRange::of_pages(Vpn::new((seat >> PAGE_SHIFT) as usize), pages)
}

impl Relay {
    /// An empty seat.
    pub const fn new() -> Self {
        Self { seat: AtomicU64::new(EMPTY) }
    }

    /// Whether an offer would be taken now, for all we know.
    pub fn is_listening(&self) -> bool {
        self.seat.load(Ordering::Relaxed) & STATE == LISTENING
    }

    fn change(&self, from: u64, to: u64) -> bool {
        self.seat.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Leaves the wake-up for `range`, which is complete, to the listener. `false` if there is none: then it is
    /// the caller's again.
    #[must_use = "who is not woken sleeps on"]
    pub fn offer(&self, range: VaRange) -> bool {
        let Some(packed) = pack(range) else { return false };
        if !self.change(LISTENING, packed | OFFERED) {
            return false;
        }
        let start = now();
        while self.seat.load(Ordering::Relaxed) == packed | OFFERED {
            if now().saturating_sub(start) > STANDS {
                return !self.change(packed | OFFERED, EMPTY);
            }
            core::hint::spin_loop();
        }
        true
    }

    /// For the listener, who calls it again and again: takes what was offered and has `wake` do it.
    pub fn listen(&self, wake: impl Fn(VaRange)) {
        let seat = self.seat.load(Ordering::Relaxed);
        match seat & STATE {
            LISTENING => {}
            OFFERED => {
                let taken = seat & !STATE | TAKEN;
                if self.change(seat, taken) {
                    unpack(seat).into_iter().for_each(&wake);
                    let _ = self.change(taken, LISTENING);
                }
            }
            _ => {
                let _ = self.change(seat, LISTENING);
            }
        }
    }

    /// For the listener, before it does something else: nothing is offered to it any more.
    pub fn leave(&self, wake: impl Fn(VaRange)) {
        let seat = self.seat.swap(EMPTY, Ordering::AcqRel);
        if seat & STATE == OFFERED {
            unpack(seat).into_iter().for_each(&wake);
        }
    }

    /// For whoever offers, before it sleeps: wakes once more for what was taken, if the listener has not come back
    /// from that.
    pub fn settle(&self, wake: impl Fn(VaRange)) {
        let seat = self.seat.load(Ordering::Relaxed);
        if seat & STATE == TAKEN && self.change(seat, EMPTY) {
            unpack(seat).into_iter().for_each(&wake);
        }
    }
}
