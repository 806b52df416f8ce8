//! Whether anybody subscribed to some pages at all.
//!
//! What    [`Index`]: where subscriptions begin, in order, and how far those up to each reach; and the few that came since
//!         that was written down. One search in an array says that nobody has subscribed to the pages, which is what most
//!         changes find: the tree is asked when it does not.
//! Why     a change of pages to which nobody has subscribed is in the fault path, too, and to go down a tree of ten
//!         thousand nodes takes longer than all the rest of telling nobody.
//! How     it is wrong on one side only. Who has gone stays in it until it is written anew, from the tree, when there are
//!         too many new ones; where there was no room to do so, it knows nothing.
//! Locks   the notifiers' `gate`, as the tree. Room is made before it is taken.
//! Fails   nothing here fails.

use alloc::vec::Vec;

use uhmm_addr::{VaRange, Vpn};

/// New ones that are looked at one by one.
const RECENT: usize = 32;

/// What is known of all intervals of a tree.
#[derive(Debug)]
pub(super) struct Index {
    firsts: Vec<Vpn>,
    /// The furthest end of the intervals up to each.
    reaches: Vec<Vpn>,
    recent: [VaRange; RECENT],
    len: usize,
    complete: bool,
}

/// Room for an index that is written anew.
#[derive(Debug, Default)]
pub(super) struct Room {
    firsts: Vec<Vpn>,
    reaches: Vec<Vpn>,
}

impl Room {
    /// For so many intervals.
    pub(super) fn new(intervals: usize) -> Self {
        Self { firsts: Vec::with_capacity(intervals), reaches: Vec::with_capacity(intervals) }
    }
}

impl Index {
    /// Of no interval.
    pub(super) const fn new() -> Self {
        Self {
            firsts: Vec::new(),
            reaches: Vec::new(),
            recent: [VaRange::page(Vpn::new(0)); RECENT],
            len: 0,
            complete: true,
        }
    }

    /// Whether one more is too many, or too many were.
    pub(super) const fn is_full(&self) -> bool {
        self.len == RECENT || !self.complete
    }

    /// Notes one more.
    pub(super) fn add(&mut self, range: VaRange) {
        match self.recent.get_mut(self.len) {
            Some(place) => {
                *place = range;
                self.len += 1;
            }
            None => self.complete = false,
        }
    }

    /// Writes all of them anew, in order of their first pages, if there is `room`, which has what was there before
    /// afterwards. Whether there was.
    pub(super) fn rewrite(
        &mut self,
        count: usize,
        room: &mut Room,
        each: impl FnOnce(&mut dyn FnMut(VaRange)),
    ) -> bool {
        if room.firsts.capacity() < count || room.reaches.capacity() < count {
            return false;
        }
        let mut reach = Vpn::new(0);
        each(&mut |range| {
            reach = reach.max(range.end_page());
            room.firsts.push(range.first());
            room.reaches.push(reach);
        });
        core::mem::swap(&mut self.firsts, &mut room.firsts);
        core::mem::swap(&mut self.reaches, &mut room.reaches);
        (self.len, self.complete) = (0, true);
        true
    }

    /// Whether an interval may overlap `range`. `false` is certain.
    pub(super) fn may_overlap(&self, range: VaRange) -> bool {
        if !self.complete || self.recent[..self.len].iter().any(|other| other.intersect(range).is_some()) {
            return true;
        }
        let end = range.end_page();
        let begin_before = self.firsts.partition_point(|first| *first < end);
        begin_before.checked_sub(1).is_some_and(|last| self.reaches[last] > range.first())
    }
}
