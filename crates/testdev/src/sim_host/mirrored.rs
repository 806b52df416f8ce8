//! A device's table as scenarios keep it, and how often they try.

use std::collections::BTreeMap;
use std::sync::Arc;

use uhmm_addr::{PageCount, VaRange, Vpn};
use uhmm_core::mirror::{MirrorTable, PageView, Pages, Patience, Retry};
use uhmm_core::mm::Mm;
use uhmm_core::notifier::Event;

use super::{SimHost, deliver};

/// What a device would know: the pages that it was told of, and every event.
#[derive(Debug, Default)]
pub struct Table {
    /// The pages that were installed and not invalidated since.
    pub entries: BTreeMap<Vpn, PageView>,
    /// What was told, in order.
    pub events: Vec<Event>,
}

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, event: Event) {
        range.iter().for_each(|page| _ = self.entries.remove(&page));
        self.events.push(event);
    }
}

impl Table {
    /// Installs the pages that can be used.
    pub fn install(&mut self, pages: Pages<'_>) {
        self.entries.extend(pages.iter().filter(|(_, view)| view.is_valid()));
    }
}

/// So many attempts, with events read and room made between them.
#[derive(Debug)]
pub struct Attempts<'a> {
    mm: &'a Arc<Mm<SimHost>>,
    most: u32,
    left: u32,
}

impl<'a> Attempts<'a> {
    /// At most `most` of them.
    pub fn new(mm: &'a Arc<Mm<SimHost>>, most: u32) -> Self {
        Self { mm, most, left: 0 }
    }
}

impl Patience for Attempts<'_> {
    fn begin(&mut self) {
        self.left = self.most;
    }

    fn again(&mut self, why: Retry) -> bool {
        match why {
            Retry::Pending => deliver(self.mm),
            Retry::Starved => self.mm.grant(PageCount::new(64)),
            Retry::Changed | Retry::InFlight => std::thread::yield_now(),
        }
        self.left = self.left.saturating_sub(1);
        self.left > 0
    }
}
