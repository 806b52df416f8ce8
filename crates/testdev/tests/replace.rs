//! Mappings that are replaced, over the simulated host.

use std::ptr::NonNull;

use uhmm_addr::PageCount;
use uhmm_core::fault::{Access, Fault, Resolution};
use uhmm_core::pagetable::State;
use uhmm_core::pin::PinFor;
use uhmm_testdev::sim_host::{Bed, Killed, Setup, page_at, pages_at};

const PAGES: usize = 8;
const WORDS: usize = 512;

/// Contents in the caller's hands: the values from `value` on, each in every word of a page, as the host writes them.
#[repr(align(4096))]
struct Contents([[u64; WORDS]; PAGES]);

impl Contents {
    fn of(value: u64) -> Box<Self> {
        let mut contents = Box::new(Self([[0; WORDS]; PAGES]));
        for (value, page) in (value..).zip(&mut contents.0) {
            (0..).zip(page).for_each(|(n, word)| *word = value.wrapping_mul(2 * n + 1));
        }
        contents
    }

    fn at(&self) -> NonNull<u8> {
        NonNull::from(&self.0).cast()
    }
}

fn fault(n: usize) -> Fault {
    Fault { addr: page_at(n).base(), access: Access::Write, ours: false }
}

#[test]
fn a_touch_waits_for_the_contents() {
    let bed = Bed::new(Setup::default());
    let contents = Contents::of(100);
    let mut replacement = bed.mm.begin_replacement(pages_at(0, PAGES)).unwrap();
    assert_eq!(bed.program.resolve(fault(3)), Resolution::InFlight);
    assert!(!bed.host().is_present(page_at(3)) && bed.mm.is_being_replaced(page_at(3)));
    // SAFETY: the contents are as long as the range.
    assert!(unsafe { replacement.fill(contents.at()) });
    drop(replacement);
    for n in 0..PAGES {
        assert_eq!(bed.program.load(page_at(n)), Ok(100 + n as u64));
    }
    assert_eq!(bed.migrate(0, PAGES).moved.get(), PAGES);
    assert_eq!(bed.program.load(page_at(7)), Ok(107));
    bed.check_nothing_leaked();
}

#[test]
fn what_is_unmapped_or_discarded_meanwhile_is_not_filled() {
    let bed = Bed::new(Setup::default());
    let contents = Contents::of(100);
    let mut replacement = bed.mm.begin_replacement(pages_at(0, PAGES)).unwrap();
    bed.program.unmap(pages_at(2, 1));
    bed.program.dontneed(pages_at(5, 2));
    // SAFETY: as above.
    assert!(unsafe { replacement.fill(contents.at()) });
    drop(replacement);
    let expected = [Ok(100), Ok(101), Err(Killed::Segv), Ok(103), Ok(104), Ok(0), Ok(0), Ok(107)];
    for (n, expected) in expected.into_iter().enumerate() {
        assert_eq!(bed.program.load(page_at(n)), expected, "page {n}");
    }
    bed.check_nothing_leaked();
}

#[test]
fn events_are_read_before_pages_are_filled() {
    let bed = Bed::new(Setup::default());
    let contents = Contents::of(100);
    let mut replacement = bed.mm.begin_replacement(pages_at(0, PAGES)).unwrap();
    bed.host().announce_removal(pages_at(40, 1));
    // SAFETY: as above.
    assert!(!unsafe { replacement.fill(contents.at()) }, "an event waits");
    uhmm_testdev::sim_host::deliver(&bed.mm);
    // SAFETY: as above.
    assert!(unsafe { replacement.fill(contents.at()) });
    assert_eq!(bed.program.load(page_at(0)), Ok(100));
}

#[test]
fn what_has_contents_elsewhere_or_is_pinned_is_not_replaced() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, PAGES);
    assert_eq!(bed.migrate(4, 1).moved.get(), 1);
    assert!(bed.mm.begin_replacement(pages_at(0, PAGES)).is_none());
    let pin = bed.program.with_scratch(|scratch| bed.mm.pin(pages_at(2, 1), PinFor::Read, scratch)).unwrap();
    assert!(bed.mm.begin_replacement(pages_at(0, 4)).is_none());
    assert!((0..4).all(|n| bed.word(n).state() != State::Moving), "no claim is left");
    bed.mm.unpin(pin);
    drop(bed.mm.begin_replacement(pages_at(0, 2)).unwrap());
    bed.check(0, PAGES);
    bed.check_nothing_leaked();
}

#[test]
fn what_nobody_can_give_back_is_never_zeros() {
    let bed = Bed::new(Setup::default());
    let replacement = bed.mm.begin_replacement(pages_at(0, 2)).unwrap();
    replacement.lose();
    assert_eq!(bed.program.load(page_at(1)), Err(Killed::Bus));
    assert_eq!(bed.mm.stats().first_lost(), Some(page_at(0).base()));
    assert_eq!(bed.migrate(0, 2).moved, PageCount::ZERO);
}
