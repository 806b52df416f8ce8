//! Page words, as the keeper reads them from a table that another process wrote.

use std::hint::black_box;

use uhmm_addr::Pfn;
use uhmm_core::frame::Slot;
use uhmm_core::pagetable::{PageWord, State};

/// Every 64-bit value can be asked everything, and says one thing about where the page is.
pub fn run(data: &[u8]) {
    for &bytes in data.as_chunks::<8>().0 {
        let word = PageWord::from_raw(u64::from_le_bytes(bytes));
        black_box(format!("{word:?}"));
        assert_eq!(word.kind().is_some(), word.state() == State::Moving, "{word:?}");
        assert!(word.pfn().is_none() || word.slot().is_none(), "{word:?} is in two places");
        if matches!(word.state(), State::Empty | State::Poisoned) {
            assert!(word.pfn().is_none() && word.slot().is_none(), "{word:?} is nowhere and owns something");
        }
        let waited = word.with_waited();
        assert!(waited.is_waited(), "{word:?}");
        assert_eq!((waited.state(), waited.pfn(), waited.slot()), (word.state(), word.pfn(), word.slot()));
    }
}

/// A word of every kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let words = [
        PageWord::EMPTY,
        PageWord::RESIDENT,
        PageWord::POISONED,
        PageWord::device(Pfn::new(1 << 20)),
        PageWord::tracked(Pfn::new(1 << 20)),
        PageWord::staged(Slot::new(7)),
        PageWord::moving_in(Pfn::new(1 << 20)),
        PageWord::moving_back(Slot::new(7)),
        PageWord::moving_out(Slot::new(7)),
        PageWord::from_raw(u64::MAX),
    ];
    let mut seeds: Vec<Vec<u8>> = words.iter().map(|word| word.raw().to_le_bytes().to_vec()).collect();
    seeds.push(seeds.concat());
    seeds
}
