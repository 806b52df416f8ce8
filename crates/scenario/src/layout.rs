//! What is known of the window without having seen any result.
//!
//! What    [`Layout`]: what is mapped where, which follows from the operations; and [`Mark`], for each page, in what it may
//!         differ between the kernel's device and ours without either being wrong.
//! Why     a scenario keeps away from what is left to chance (how much a device has written when it meets a hole), and
//!         two outputs are compared by what may be said, which is the same on both sides.

use std::fmt;

use crate::operation::{Kind, Operation, Pages, Protection, Request, WINDOW};

/// In what a page may differ. Its letter stands in the output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mark {
    /// Nothing is mapped.
    Hole,
    /// In nothing.
    Same,
    /// Whether it may be written at once: a page table says so, and user space does not see page tables.
    WriteBit,
    /// Where it is, as well.
    Place,
    /// Memory that no page leaves: whether the device's table knows it.
    Plain,
}

impl Mark {
    /// This one, unless the other says more.
    const fn or(self, other: Self) -> Self {
        if matches!(self, Self::Same | Self::WriteBit) { other } else { self }
    }
}

#[derive(Clone, Copy)]
struct Page {
    protection: Protection,
    mark: Mark,
}

const NOTHING: Page = Page { protection: Protection::None, mark: Mark::Hole };

/// The window.
pub(crate) struct Layout {
    /// Some pages behind its end as well, where nothing is mapped.
    pages: [Page; 2 * WINDOW as usize],
    coherent: bool,
}

impl Layout {
    /// Nothing is mapped. Says whether there are coherent devices.
    pub(crate) const fn new(coherent: bool) -> Self {
        Self { pages: [NOTHING; 2 * WINDOW as usize], coherent }
    }

    fn of(&self, pages: Pages) -> &[Page] {
        &self.pages[pages.first as usize..][..pages.count as usize]
    }

    fn of_mut(&mut self, pages: Pages) -> &mut [Page] {
        &mut self.pages[pages.first as usize..][..pages.count as usize]
    }

    /// So many pages at the front of `pages` may be written.
    pub(crate) fn writable(&self, pages: Pages) -> u64 {
        self.of(pages).iter().take_while(|page| page.protection == Protection::Write).count() as u64
    }

    /// Whether a page of `pages` is of memory that no page leaves.
    pub(crate) fn has_plain(&self, pages: Pages) -> bool {
        self.of(pages).iter().any(|page| page.mark == Mark::Plain)
    }

    /// Whether nothing about `pages` is in doubt, and all of it may be written.
    pub(crate) fn is_calm(&self, pages: Pages) -> bool {
        self.of(pages).iter().all(|page| page.mark == Mark::Same && page.protection == Protection::Write)
    }

    /// The marks of `pages`, as they stand before an operation about them.
    pub(crate) fn marks(&self, pages: Pages) -> Marks {
        Marks(self.of(pages).iter().map(|page| page.mark).collect())
    }

    /// What `operation` makes of it.
    pub(crate) fn apply(&mut self, operation: &Operation) {
        match *operation {
            Operation::Map(kind, pages) => {
                let (protection, mark) = match kind {
                    // What may not be written is not mapped in place.
                    Kind::Anonymous(Protection::Read) if self.coherent => (Protection::Read, Mark::Place),
                    Kind::Anonymous(protection) => (protection, Mark::Same),
                    Kind::Shared | Kind::File => (Protection::Write, Mark::Plain),
                };
                self.of_mut(pages).fill(Page { protection, mark });
            }
            Operation::Unmap(pages) => self.of_mut(pages).fill(NOTHING),
            Operation::Protect(protection, pages) => self.protect(protection, pages),
            Operation::Discard(pages) => {
                for page in self.of_mut(pages).iter_mut().filter(|page| page.mark == Mark::WriteBit) {
                    page.mark = Mark::Same;
                }
                let coherent = self.coherent;
                for page in self.of_mut(pages).iter_mut().filter(|page| page.mark == Mark::Place) {
                    if !coherent || page.protection == Protection::Write {
                        page.mark = Mark::Same;
                    }
                }
            }
            Operation::Write(pages) => {
                let coherent = self.coherent;
                for page in self.of_mut(pages).iter_mut().filter(|page| page.protection == Protection::Write)
                {
                    if page.mark == Mark::WriteBit || (page.mark == Mark::Place && !coherent) {
                        page.mark = Mark::Same;
                    }
                }
            }
            // Ours brings a page home that is mapped in place, before it is lent.
            Operation::Device { request: Request::Exclusive, pages, .. } if self.coherent => {
                self.mark(pages, Mark::Place);
            }
            // A child shares pages on devices, or gets copies.
            Operation::Fork => self.mark(Pages { first: 0, count: 2 * WINDOW }, Mark::Place),
            _ => {}
        }
    }

    fn protect(&mut self, protection: Protection, pages: Pages) {
        // As far as something is mapped.
        let mapped = self.of(pages).iter().take_while(|page| page.mark != Mark::Hole).count() as u64;
        if mapped == 0 {
            return;
        }
        let part = Pages { count: mapped, ..pages };
        let mark = if self.coherent { Mark::Place } else { Mark::WriteBit };
        for page in self.of_mut(part).iter_mut().filter(|page| page.protection != protection) {
            page.protection = protection;
            page.mark = page.mark.or(mark);
        }
    }

    /// Marks those of `pages` that have no greater mark.
    fn mark(&mut self, pages: Pages, mark: Mark) {
        for page in self.of_mut(pages) {
            page.mark = page.mark.or(mark);
        }
    }
}

/// The marks of some pages, a letter for each.
pub(crate) struct Marks(Vec<Mark>);

impl fmt::Display for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mark in &self.0 {
            f.write_str(match mark {
                Mark::Hole => "-",
                Mark::Same => "s",
                Mark::WriteBit => "w",
                Mark::Place => "l",
                Mark::Plain => "p",
            })?;
        }
        Ok(())
    }
}
