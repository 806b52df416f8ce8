//! Pages that are held for a moment, and how long that takes: the kernel's `mm/gup_test.c`.
//!
//! What    [`Dmirror::hold`], which holds a range, some pages at a time, and lets go of all of it.
//! Fails   a range that cannot be held to its end is held as far as it goes, which is no error there either.

use std::time::{Duration, Instant};

use uhmm::space::MappingKind;
use uhmm::{PageCount, PinFor, VaRange};

use crate::{Dmirror, Error};

/// What [`Dmirror::hold`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// Pages that were held.
    pub pages: PageCount,
    /// Time to get hold of all.
    pub get: Duration,
    /// Time to let go of all.
    pub put: Duration,
}

impl Dmirror {
    /// Gets hold of the pages of `range`, `at_a_time` in each call, and lets go of them. They are in RAM then, or where a
    /// coherent device has them, unless that is `for_long`.
    pub fn hold(&self, range: VaRange, at_a_time: PageCount, purpose: PinFor, for_long: bool) -> Held {
        let start = Instant::now();
        let (mut done, mut pins) = (Held::default(), Vec::new());
        while let Some(rest) = range.skip(done.pages) {
            let part = rest.take(at_a_time.max(PageCount::ONE));
            let Ok(pinned) = self.pin(part, purpose, for_long) else { break };
            pins.push(pinned);
            done.pages = done.pages.plus(part.pages());
        }
        done.get = start.elapsed();
        let start = Instant::now();
        drop(pins);
        done.put = start.elapsed();
        done
    }

    fn pin(
        &self,
        range: VaRange,
        purpose: PinFor,
        for_long: bool,
    ) -> Result<Vec<uhmm::space::Pinned>, Error> {
        let mut pins = Vec::new();
        let mut at = range.first();
        for mapping in self.space().mappings(range).map_err(|_| Error::NoMemory)? {
            let permitted = mapping.read && (mapping.write || purpose == PinFor::Read);
            if mapping.range.first() != at || !permitted {
                return Err(Error::Fault);
            }
            at = mapping.range.end_page();
            // Others stay where they are as it is.
            if mapping.kind == MappingKind::Anonymous {
                // SAFETY: what may be asked about was promised to the machine (`Dmirror::new`).
                unsafe { self.space().watch(mapping.range) }?;
                let pinned = if for_long {
                    self.space().pin(mapping.range, purpose)
                } else {
                    self.space().pin_in_place(mapping.range, purpose)
                };
                pins.push(pinned.map_err(|_| Error::Fault)?);
            }
        }
        if at == range.end_page() { Ok(pins) } else { Err(Error::Fault) }
    }
}
