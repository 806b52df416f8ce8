//! Reuse distances: how much is evicted between a page's leaving and its being touched again.
//!
//! What    `Reuse`, what is remembered of a page's distances in four bits of its word, and `laps`, how long the
//!         evictor's clock passes over pages that are expected back after a distance.
//! Why     there is no accessed bit for anonymous memory to be had from user space. What a page's touches can be known
//!         by is how soon it comes back when it was away; the kernel judges a refault by the same distance
//!         (`mm/workingset.c`). One distance says little about a page, so that neighbours are judged together: what
//!         lies side by side is used alike (DAMON's regions rest on the same).
//! Units   1/256 of the budget evicted, remembered in half octaves.
//! Fails   nothing here fails: a wrong guess costs a transfer.

/// Pages that are judged together: 16 KiB, aligned.
pub(crate) const GROUP: usize = 4;
/// How far the clock of evictions ([`Mm::grow_older`](crate::mm::Mm::grow_older)) goes while as much as the budget is
/// evicted.
pub const STEPS: usize = 32;
/// The units of one step of the clock.
const STEP: u32 = 256 / STEPS as u32;
/// A page that stays away for less than this is worth its room.
const WORTH: u32 = 180;
/// The most laps in which a page is tried once.
pub const MOST_LAPS: u32 = 32;

/// What each value of [`Reuse`] stands for. A page of which nothing is known is worth no more than any.
const UNITS: [u32; 16] = [WORTH, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512];
/// From where on each value but the first two is meant: the geometric mean with the one before.
const FROM: [u32; 14] = [5, 7, 9, 13, 19, 27, 38, 54, 76, 108, 152, 215, 304, 430];

/// A page's reuse distance, a running mean; the value 0 where none is known.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Reuse(u8);

impl Reuse {
    pub(super) const fn from_bits(bits: u64) -> Self {
        Self((bits & 15) as u8)
    }

    pub(super) const fn bits(self) -> u64 {
        self.0 as u64
    }

    /// In 1/256 of the budget.
    pub(crate) const fn units(self) -> u32 {
        UNITS[self.0 as usize]
    }

    const fn of(units: u32) -> Self {
        let mut value = 1;
        while value < 15 && units >= FROM[value as usize - 1] {
            value += 1;
        }
        Self(value)
    }

    /// The mean of this and of a distance of `steps` of the clock; that distance itself where nothing was known.
    pub(crate) const fn and(self, steps: u8) -> Self {
        let now = away(steps);
        Self::of(if self.0 == 0 { now } else { (now + self.units()) / 2 })
    }

    /// The next shorter one: the page was touched as soon as it had been put out of the way.
    pub(crate) const fn shorter(self) -> Self {
        match self.0 {
            0 => Self::of(WORTH / 2),
            1 => self,
            known => Self(known - 1),
        }
    }
}

/// The units of a page that has been away for so many steps of the clock, and some of the next one.
pub(crate) const fn away(steps: u8) -> u32 {
    steps as u32 * STEP + STEP / 2
}

/// In how many laps of the clock the pages of a group are tried once, whose distances come to `units` together. The
/// fourth power keeps apart what differs by half: pages that are a little colder go first.
pub(crate) const fn laps(units: u32) -> u32 {
    let worth = (WORTH * GROUP as u32) as u64;
    let laps = worth.pow(4) / if units > 0 { units as u64 } else { 1 }.pow(4);
    if laps < 1 {
        1
    } else if laps > MOST_LAPS as u64 {
        MOST_LAPS
    } else {
        laps as u32
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_distance_is_remembered_to_half_an_octave() {
        for value in 1..16 {
            assert_eq!(Reuse::of(Reuse(value).units()), Reuse(value), "{value}");
        }
        let unknown = Reuse::from_bits(0);
        for steps in 0..=u8::MAX {
            let (meant, kept) = (away(steps).min(512), unknown.and(steps).units());
            assert!(kept * 6 > meant * 4 && kept * 4 < meant * 6, "{steps}: {meant} became {kept}");
        }
    }

    #[test]
    fn a_distance_follows_what_is_seen_by_and_by() {
        let mut reuse = Reuse::from_bits(0).and(64);
        let first = reuse;
        for _ in 0..7 {
            assert!(reuse.and(1) < reuse, "{reuse:?}");
            reuse = reuse.and(1);
        }
        assert!(reuse.units() <= 16, "{reuse:?}");
        assert!(reuse.shorter() < reuse && first.shorter() < first);
        assert_eq!(Reuse(1).shorter(), Reuse(1));
        assert!(Reuse(0).shorter().units() < Reuse(0).units());
    }

    #[test]
    fn hot_groups_are_passed_over_longer_and_none_for_ever() {
        let group = |units: u32| laps(GROUP as u32 * units);
        assert_eq!((group(512), group(256), group(WORTH)), (1, 1, 1));
        assert_eq!(group(Reuse::from_bits(0).units()), 1, "what is not known yet");
        assert!(group(90) >= 15 && group(90) < group(75));
        assert_eq!((group(4), laps(0)), (MOST_LAPS, MOST_LAPS));
    }
}
