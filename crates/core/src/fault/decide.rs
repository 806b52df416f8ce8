//! The decision table of fault resolution: what happened, times where the page is.
//!
//! | word \ event | absent (read, write)              | write-protected |
//! |--------------|-----------------------------------|-----------------|
//! | Empty        | fill with zeros                   | lift            |
//! | Resident     | fill; if tracked: fetch the copy  | lift            |
//! | Device       | fetch                             | wake            |
//! | Coherent     | fill                              | lift            |
//! | Exclusive    | take back                         | wake            |
//! | Staged       | take back                         | wake            |
//! | Moving       | wait (ours, moving out: fill)     | wait            |
//! | Poisoned     | poison                            | poison          |
//!
//! *Coherent and absent* happens as well when the message is older than the mapping, and where the program gave the
//! page up and nobody told (the signal engine hears of nothing). A *fetch* of a page on a coherent device maps it in
//! place, where that can be. *Resident and absent* happens when the message is older than the page (filling then
//! finds the page present and wakes) and in a child after fork, which inherits words a moment newer than its memory;
//! the device page of a tracked word still has the contents then. *Write-protected but not in RAM* means that the
//! page left after the message was sent: the woken thread faults again and finds it absent.

use crate::pagetable::{Kind, PageWord, State};

/// How a thread touched a page that it could not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// A load from an absent page.
    Read,
    /// A store to an absent page.
    Write,
    /// A store to a present, write-protected page.
    WriteProtected,
}

/// What a fault asks for.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Make the page zero; if it is there already, wake.
    Fill,
    /// Read it from its device page.
    Fetch,
    /// Move (or, while a device reads the slot, copy) it back from its arena slot.
    TakeBack,
    /// Lift the write protection; a tracked page loses its copy.
    Lift,
    /// Leave it to whoever moves the page.
    Wait,
    /// Only wake: the thread's next attempt will find things changed.
    Wake,
    /// Make the access fail with SIGBUS.
    Poison,
}

/// The action for `access` to a page whose word is `word`. `ours` says that the faulting thread is one of
/// uhmm's own, which alone may be filled past its own claim: it copies a page out that turned out to be
/// absent, and would wait for itself.
pub const fn decide(access: Access, word: PageWord, ours: bool) -> Action {
    let absent = !matches!(access, Access::WriteProtected);
    match word.state() {
        State::Poisoned => Action::Poison,
        State::Moving => {
            let moving_out = matches!(word.kind(), Some(Kind::Out));
            if absent && ours && moving_out { Action::Fill } else { Action::Wait }
        }
        State::Empty | State::Resident | State::Coherent if !absent => Action::Lift,
        State::Empty => Action::Fill,
        State::Resident if word.is_tracked() => Action::Fetch,
        State::Resident => Action::Fill,
        _ if !absent => Action::Wake,
        State::Coherent => Action::Fill,
        State::Staged | State::Exclusive => Action::TakeBack,
        State::Device => Action::Fetch,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{Access, Action, decide};
    use crate::frame::Slot;
    use crate::pagetable::PageWord;
    use uhmm_addr::Pfn;

    #[test]
    fn every_cell_of_the_table() {
        use Access::{Read, Write, WriteProtected};
        let pfn = Pfn::new(7);
        let slot = Slot::new(3);
        let rows = [
            (PageWord::EMPTY, Action::Fill, Action::Lift),
            (PageWord::EMPTY.with_discarded(), Action::Fill, Action::Lift),
            (PageWord::RESIDENT, Action::Fill, Action::Lift),
            (PageWord::tracked(pfn), Action::Fetch, Action::Lift),
            (PageWord::device(pfn), Action::Fetch, Action::Wake),
            (PageWord::coherent(pfn), Action::Fill, Action::Lift),
            (PageWord::staged(slot), Action::TakeBack, Action::Wake),
            (PageWord::staged(slot).with_writing(true), Action::TakeBack, Action::Wake),
            (PageWord::exclusive(slot), Action::TakeBack, Action::Wake),
            (PageWord::moving_in(pfn), Action::Wait, Action::Wait),
            (PageWord::moving_out(slot), Action::Wait, Action::Wait),
            (PageWord::moving_out(slot).with_discarded(), Action::Wait, Action::Wait),
            (PageWord::moving_back(slot), Action::Wait, Action::Wait),
            (PageWord::POISONED, Action::Poison, Action::Poison),
        ];
        for (word, absent, protected) in rows {
            for access in [Read, Write] {
                assert_eq!(decide(access, word, false), absent, "{access:?} of {word:?}");
            }
            assert_eq!(decide(WriteProtected, word, false), protected, "store to protected {word:?}");
        }
    }

    #[test]
    fn our_own_thread_is_filled_past_its_claim_and_nobody_else() {
        let word = PageWord::moving_out(Slot::new(1));
        for word in [word, word.with_discarded()] {
            assert_eq!(decide(Access::Read, word, true), Action::Fill);
            assert_eq!(decide(Access::Read, word, false), Action::Wait);
        }
        assert_eq!(decide(Access::Read, PageWord::moving_in(Pfn::new(1)), true), Action::Wait);
    }
}
