//! Third phase: copy the isolated pages to the device.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr::NonNull;

use uhmm_addr::{PageCount, Pfn, PfnRange};

use super::isolate::Isolated;
use crate::device::{Transfer, TransferError};
use crate::frame::Slot;
use crate::host::Host;
use crate::mm::Mm;
use crate::pagemap::Pagemap;
use crate::stats::{Counter, Skip, Skipped};

/// Pages whose bytes are on the device as well as in their slots.
#[must_use]
#[derive(Debug)]
pub struct Copied<'m, H: Host> {
    pub(super) mm: &'m Mm<H>,
    pub(super) pages: Vec<(Slot, Pfn)>,
}

/// One contiguous piece of work: slots side by side, and pfns side by side.
struct Piece {
    first: usize,
    pages: PfnRange,
    result: Result<(), TransferError>,
}

/// What became of a set of slots that were to be written.
pub(super) struct Written {
    /// Slots whose contents are on the device, with the page that holds them and belongs to the caller.
    pub(super) done: Vec<(Slot, Pfn)>,
    /// Slots whose contents are in the slot only, and why.
    pub(super) failed: Vec<(Slot, Skip)>,
}

impl<'m, H: Host> Isolated<'m, H> {
    /// Copies the pages to `to`. Those for which there is no room, or whose copy failed, are put back and
    /// counted.
    pub fn copy(mut self, to: &Arc<Pagemap>, skipped: &mut Skipped) -> Copied<'m, H> {
        let slots: Vec<Slot> = self.slots().collect();
        let mm = self.mm;
        // A copy that another device keeps is not where the page is to go.
        for slot in &slots {
            let (arena, index) = mm.arena_of(*slot);
            if arena.copy_of(index).is_some_and(|copy| !to.contains(copy))
                && let Some(copy) = arena.take_copy(index)
            {
                mm.pagemaps.of(copy).put(copy);
            }
        }
        let Written { done, failed } = mm.write_slots(&slots, to);
        for run in core::mem::take(&mut self.runs) {
            run.dissolve();
        }
        // Put the failed ones back by the way of a dropped phase of their own.
        for (slot, why) in failed {
            skipped.add(why, 1);
            mm.abandon(slot);
        }
        Copied { mm, pages: done }
    }
}

impl<H: Host> Mm<H> {
    /// Copies owned slots to freshly allocated pages of `to`, except for those whose contents a device has
    /// already.
    pub(super) fn write_slots(&self, slots: &[Slot], to: &Arc<Pagemap>) -> Written {
        let mut written = Written { done: Vec::with_capacity(slots.len()), failed: Vec::new() };
        let mut dirty = Vec::with_capacity(slots.len());
        for slot in slots {
            let (arena, index) = self.arena_of(*slot);
            match arena.take_copy(index) {
                Some(copy) => {
                    self.note_clean(arena.page_of(index));
                    self.stats.add(Counter::DroppedClean, 1);
                    written.done.push((*slot, copy));
                }
                None => dirty.push(*slot),
            }
        }
        let mut pieces = Vec::new();
        let mut batch = Vec::new();
        let mut first = 0;
        let mut why = Skip::Full;
        while first < dirty.len() {
            let side_by_side = (1..)
                .take_while(|n| {
                    dirty.get(first + n).is_some_and(|slot| slot.get() == dirty[first].get() + *n as u32)
                })
                .count();
            let pages = match self.allocate_backed(to, PageCount::new(1 + side_by_side)) {
                Ok(pages) => pages,
                Err(reason) => {
                    why = reason;
                    break;
                }
            };
            let ram = self.slot_address(dirty[first]).get() as *mut u8;
            let ram = NonNull::new(ram).expect("slots have addresses");
            // SAFETY: the slots are owned by the caller and hold frames; faulters only read them.
            batch.push(unsafe { Transfer::new(to.device_page(pages.start), ram, pages.pages) });
            pieces.push(Piece { first, pages, result: Ok(()) });
            first += pages.pages.get();
        }
        written.failed.extend(dirty[first..].iter().map(|slot| (*slot, why)));
        if !batch.is_empty() {
            to.device().write(&mut batch);
        }
        for (piece, transfer) in pieces.iter_mut().zip(&batch) {
            piece.result = transfer.outcome();
        }
        for piece in pieces {
            let slots = &dirty[piece.first..piece.first + piece.pages.pages.get()];
            match piece.result {
                Ok(()) => {
                    self.stats.add(Counter::Written, slots.len());
                    let pfn = |n| piece.pages.start.forward(PageCount::new(n));
                    written.done.extend(slots.iter().enumerate().map(|(n, slot)| (*slot, pfn(n))));
                }
                Err(error) => {
                    to.put_range(piece.pages);
                    written.failed.extend(slots.iter().map(|slot| (*slot, Skip::from(error))));
                }
            }
        }
        written
    }
}
