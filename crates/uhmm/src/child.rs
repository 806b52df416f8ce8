//! A forked child without an engine of its own: every page that is not in its RAM is put there.
//!
//! The child runs meanwhile. What it does to its mappings waits until its events are read, which is here; and
//! pages that it gave up or moved since are not put where they were.

use std::ptr::NonNull;

use uhmm_addr::{PageCount, PfnRange, VaRange, VirtAddr, Vpn};
use uhmm_core::device::Transfer;
use uhmm_core::host::{Install, Stop};
use uhmm_core::pagetable::PageWord;
use uhmm_core::sync::WriteGuard;
use uhmm_sys::held::HeldPages;
use uhmm_sys::host::LinuxHost;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::uffd::{Event, EventBuffer, ReadOutcome, Uffd};

use crate::managed::{Managed, USER_PAGES};

/// Changes of a child's mappings that can be followed. A child that makes more of them before it has its pages
/// finds lost what it has not got by then.
const CHANGES: usize = 128;

/// Something that the child did to its mappings.
#[derive(Clone, Copy)]
enum Change {
    Gone(VaRange),
    Moved { from: VaRange, to: Vpn },
}

/// What the child did since it was made, in order.
#[derive(Clone, Copy)]
struct Changes {
    list: [Option<Change>; CHANGES],
    known: usize,
    too_many: bool,
}

struct Child<'a> {
    managed: &'a Managed,
    layout: &'a WriteGuard<'a, LinuxHost>,
    uffd: &'a Uffd,
    /// Frames whose mapping is being replaced, and whether what is in them is lost.
    replacing: Option<(&'a HeldPages, bool)>,
    changes: Changes,
}

/// Copies all that `managed` holds away from RAM into the child that `child` watches: slow for large spaces, and
/// never wrong.
pub(crate) fn populate(managed: &Managed, layout: &WriteGuard<'_, LinuxHost>, child: &Uffd) {
    let changes = Changes { list: [None; CHANGES], known: 0, too_many: false };
    // Once, for the child and all that it forks meanwhile.
    let mut held = managed.replacing().lock();
    let lost = held.as_mut().is_some_and(|held| held.refresh().is_err());
    let replacing = held.as_ref().map(|held| (held, lost));
    populate_changed(Child { managed, layout, uffd: child, replacing, changes });
}

fn populate_changed(mut child: Child<'_>) {
    let Ok(bounce) = Mapping::reserve(4096, "uhmm-bounce") else { return };
    let (managed, layout) = (child.managed, child.layout);
    let mm = managed.mm();
    let Some(everything) = VaRange::of_pages(Vpn::new(0), USER_PAGES) else { return };
    child.copy_replaced();
    for part in mm.table().used(everything) {
        for page in part.iter() {
            let word = mm.word_for_child(layout, page, |page, slot| {
                if let Some(source) = NonNull::new(slot.get() as *mut u8) {
                    child.copy(page, source);
                }
            });
            let Some(pfn) = word.pfn() else { continue };
            let map = mm.pagemaps().of(pfn);
            if word.without_past() == PageWord::device(pfn).with_pinned(word.is_pinned()) {
                // SAFETY: the bounce page is ours alone.
                let mut batch =
                    [unsafe { Transfer::new(map.device_page(pfn), bounce.as_ptr(), PageCount::ONE) }];
                map.device().read(&mut batch);
                match batch[0].outcome() {
                    Ok(()) => child.copy(page, bounce.as_ptr()),
                    // Never zeros for lost contents.
                    Err(_) => child.fill(page, |child, page| child.poison(page).stop),
                }
            }
            // SAFETY: the word of the child had the reference, and the child's words count by number.
            unsafe { map.put_counted(PfnRange::new(pfn, PageCount::ONE)) };
        }
    }
}

impl Child<'_> {
    /// Copies what lies in no slot and on no device: pages whose mapping is being replaced. A child that was made before
    /// that has the old mapping, which takes nothing.
    fn copy_replaced(&mut self) {
        let managed = self.managed;
        let Some((held, lost)) = self.replacing else { return };
        for page in held.range().iter().filter(|page| managed.mm().is_being_replaced(*page)) {
            let offset = page.since(held.range().first()).bytes();
            if lost {
                self.fill(page, |child, page| child.poison(page).stop);
            } else {
                // SAFETY: the buffer is as long as the range.
                self.copy(page, unsafe { held.contents().add(offset) });
            }
        }
    }

    fn copy(&mut self, page: Vpn, source: NonNull<u8>) {
        debug_assert!(VirtAddr::of(source.as_ptr()).page_offset() == 0);
        self.fill(page, |child, page| {
            // SAFETY: the source is a page of ours.
            unsafe { child.copy(page, source, Install::Writable, true) }.stop
        });
    }

    /// Fills what was `page` when the child was made, if it is still anywhere.
    fn fill(&mut self, page: Vpn, fill: impl Fn(&Uffd, VaRange) -> Stop) {
        while let Some(place) = self.changes.place_of(page) {
            let place = VaRange::page(place);
            // Not knowing where it is, never zeros and never what was given up.
            let stop =
                if self.changes.too_many { self.uffd.poison(place).stop } else { fill(self.uffd, place) };
            if stop != Stop::Pending {
                return;
            }
            self.follow();
        }
    }

    /// Reads what the child did. It waits until that is done.
    fn follow(&mut self) {
        let mut events = EventBuffer::new();
        if !matches!(self.uffd.read(&mut events), ReadOutcome::Events(_)) {
            // The child's thread is about to let calls through.
            std::hint::spin_loop();
            return;
        }
        for event in &mut events {
            let change = match event {
                // Answered by the page, or when the descriptor is closed.
                Event::Fault { .. } => continue,
                Event::Fork(grandchild) => {
                    // It got the pages that the child had by then; what the child changed, it changed for both.
                    populate_changed(Child { uffd: &grandchild, ..*self });
                    continue;
                }
                Event::Remove(range) | Event::Unmap(range) => Change::Gone(range),
                Event::Remap { from, to, len } => match VaRange::covering(from, len) {
                    Some(from) => Change::Moved { from, to: to.page() },
                    None => continue,
                },
            };
            self.changes.note(change);
        }
    }
}

impl Changes {
    fn note(&mut self, change: Change) {
        match self.list.get_mut(self.known) {
            Some(place) => {
                *place = Some(change);
                self.known += 1;
            }
            None => self.too_many = true,
        }
    }

    /// Where the page is that was at `page` when the child was made; `None` if it is gone.
    fn place_of(&self, page: Vpn) -> Option<Vpn> {
        if self.too_many {
            return Some(page);
        }
        self.list[..self.known].iter().flatten().try_fold(page, |page, change| match *change {
            Change::Gone(range) if range.contains(page) => None,
            Change::Moved { from, to } if from.contains(page) => Some(to.forward(page.since(from.first()))),
            _ => Some(page),
        })
    }
}
