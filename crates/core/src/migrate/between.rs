//! From one device to another.
//!
//! How     each page is held by a reference of ours while it is copied, directly where the target can reach the
//!         source ([`Device::copy_from`](crate::device::Device::copy_from)), otherwise through memory of our own;
//!         never by way of the program's addresses. Then its word is changed, if it still names the page that was
//!         copied.
//! Why     nobody waits: a touch brings the page home from where it was, and the change of the word fails. A device
//!         page is never written while somebody holds it, so that what was copied is what the word names.
//! Mapped  what is mapped in place on a coherent device is taken from the program first, and what is on one in the end
//!         is mapped in place by who called.
//! Locks   the layout lock for reading, to get hold of the pages and to change the words; none across a transfer.
//! Fails   page by page, with a reason; the page then stays where it was, whatever failed (rule R1). A transfer
//!         of many pages that failed is tried again page by page.

use alloc::sync::Arc;
use alloc::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, PAGE_SIZE, PageCount, Pfn, PfnRange, VaRange, Vpn};

use super::{Migrated, Sources};
use crate::device::{MemoryType, PeerTransfer, Transfer, TransferError};
use crate::fault::{MAX_WINDOW, Scratch};
use crate::host::Host;
use crate::mm::Mm;
use crate::notifier::Owner;
use crate::pagemap::Pagemap;
use crate::pagetable::{PageWord, State};
use crate::stats::{Counter, Skip};

/// A page of the program, and the device page that its word named: one reference to it is ours.
pub(super) type Held = (Vpn, Pfn);

type Outcomes = [Result<(), TransferError>; MAX_WINDOW.get()];

impl<H: Host> Mm<H> {
    /// Moves the pages of `range`, at most a chunk, that are on devices, as far as `sources` says.
    pub(super) fn migrate_between(
        &self,
        range: VaRange,
        to: &Arc<Pagemap>,
        sources: &Sources,
        scratch: &mut Scratch,
        result: &mut Migrated,
    ) {
        let mut held = Vec::with_capacity(range.pages().get());
        self.take_off_all(range, sources.by, |word| self.is_source(word, to, sources).is_ok());
        let layout = self.layout.read(&self.host);
        for page in range.iter() {
            match self
                .hold(page, |word| self.is_source(word, to, sources).and_then(|pfn| unmapped(word, pfn)))
            {
                Ok(pfn) => held.push((page, pfn)),
                Err(why) => result.skipped.add(why, 1),
            }
        }
        drop(layout);
        self.move_held(&held, to, sources.by, scratch, result);
    }

    /// The device page of a page that `sources` takes.
    fn is_source(&self, word: PageWord, to: &Arc<Pagemap>, sources: &Sources) -> Result<Pfn, Skip> {
        let pfn = match (word.state(), word.pfn()) {
            (State::Device | State::Coherent, Some(pfn)) => pfn,
            (State::Poisoned, _) => return Err(Skip::Failed),
            (State::Moving, _) => return Err(Skip::Elsewhere),
            _ => return Err(Skip::Raced),
        };
        let map = self.pagemaps.of(pfn);
        let selected = match map.memory_type() {
            MemoryType::Private => sources.private,
            MemoryType::Coherent => sources.coherent,
            MemoryType::FsDax | MemoryType::Generic | MemoryType::PeerToPeer => None,
        };
        let ours = [sources.private, sources.coherent, Some(to.owner())];
        match selected {
            _ if Arc::ptr_eq(map, to) => Err(Skip::Elsewhere),
            Some(owner) if owner == map.owner() && word.is_pinned() => Err(Skip::Pinned),
            Some(owner) if owner == map.owner() => Ok(pfn),
            _ if ours.contains(&Some(map.owner())) => Err(Skip::Unselected),
            _ => Err(Skip::Foreign),
        }
    }

    /// Takes a reference to the device page that the word of `page` names, if it is willing. The layout lock is
    /// held by the caller.
    pub(super) fn hold(
        &self,
        page: Vpn,
        willing: impl Fn(PageWord) -> Result<Pfn, Skip>,
    ) -> Result<Pfn, Skip> {
        let entry = self.table.entry(page);
        loop {
            let word = entry.load();
            let pfn = willing(word)?;
            // Without a claim, the page could be free by the time that it is counted.
            if entry.exchange(word, PageWord::moving_in(pfn).claimed_from(word)).is_ok() {
                self.pagemaps.of(pfn).get(pfn);
                let left = entry.leave(word);
                debug_assert!(!left.discarded, "the layout lock keeps discards out");
                self.after_leave(page, left.wake);
                return Ok(pfn);
            }
        }
    }

    /// Moves pages that are held, by address, to `to`, and lets go of them.
    pub(super) fn move_held(
        &self,
        held: &[Held],
        to: &Arc<Pagemap>,
        by: Option<Owner>,
        scratch: &mut Scratch,
        result: &mut Migrated,
    ) {
        // What is one huge page there is one here as well, if there is room for one.
        let whole = to.memory().is_none() && self.is_whole(held);
        let mut huge = if whole { to.allocate_huge() } else { None };
        let mut rest = held;
        while let Some((first, pfn)) = rest.first() {
            let source = self.pagemaps.of(*pfn);
            let most = rest.iter().take(MAX_WINDOW.get());
            let alike = most.take_while(|(_, pfn)| source.contains(*pfn)).count();
            let allocated = match &mut huge {
                Some(pages) => Ok(take_first(pages, PageCount::new(alike))),
                None => self.allocate_backed(to, PageCount::new(alike)),
            };
            let pages = match allocated {
                Ok(pages) => pages,
                Err(why) => {
                    rest[..alike].iter().for_each(|(_, pfn)| source.put(*pfn));
                    result.skipped.add(why, alike);
                    rest = &rest[alike..];
                    continue;
                }
            };
            let (batch, others) = rest.split_at(pages.pages.get());
            rest = others;
            let last = batch[batch.len() - 1].0;
            let span = VaRange::page(*first).grow(last.since(*first).plus(PageCount::ONE));
            let told = self.tell_migration(span, by);
            let (outcomes, direct) = copy(source, to, batch, pages, scratch);
            self.commit_held(source, to, batch, pages, &outcomes, direct, result);
            drop(told);
        }
    }

    /// Whether pages that are held are a chunk that lies side by side on its device, where a huge page does.
    fn is_whole(&self, held: &[Held]) -> bool {
        let Some((page, pfn)) = held.first().filter(|_| held.len() == CHUNK_PAGES) else { return false };
        let follows = |(n, at): (usize, &Held)| {
            *at == (page.forward(PageCount::new(n)), pfn.forward(PageCount::new(n)))
        };
        page.in_chunk() == 0 && self.pagemaps.of(*pfn).is_chunk(*pfn) && held.iter().enumerate().all(follows)
    }

    #[expect(clippy::too_many_arguments, reason = "the last step of move_held")]
    fn commit_held(
        &self,
        source: &Arc<Pagemap>,
        to: &Arc<Pagemap>,
        batch: &[Held],
        pages: PfnRange,
        outcomes: &Outcomes,
        direct: bool,
        result: &mut Migrated,
    ) {
        let _layout = self.layout.read(&self.host);
        let mut moved = PageCount::ZERO;
        for (n, ((page, from), outcome)) in batch.iter().zip(outcomes).enumerate() {
            let target = pages.start.forward(PageCount::new(n));
            match outcome {
                Ok(()) if self.renames(*page, *from, target) => {
                    moved = moved.plus(PageCount::ONE);
                    // The word's reference.
                    source.put(*from);
                }
                Ok(()) => {
                    result.skipped.add(Skip::Raced, 1);
                    to.put(target);
                }
                Err(error) => {
                    result.skipped.add(Skip::from(*error), 1);
                    to.put(target);
                }
            }
            source.put(*from);
        }
        self.stats.add(Counter::Written, moved.get());
        result.moved = result.moved.plus(moved);
        if direct {
            result.direct = result.direct.plus(moved);
        }
    }

    /// Makes a word that says that its page is on `from` say `to`. `false` if it does not say so any more.
    fn renames(&self, page: Vpn, from: Pfn, to: Pfn) -> bool {
        let entry = self.table.entry(page);
        loop {
            let word = entry.load();
            if word.state() != State::Device || word.pfn() != Some(from) {
                return false;
            }
            let next = PageWord::device(to).with_past_of(word).with_pinned(word.is_pinned());
            if entry.exchange(word, next).is_ok() {
                return true;
            }
        }
    }
}

/// A page can be held that is not mapped in place, or not any more.
pub(super) fn unmapped(word: PageWord, pfn: Pfn) -> Result<Pfn, Skip> {
    if word.state() == State::Coherent { Err(Skip::Busy) } else { Ok(pfn) }
}

/// Takes the first `count` of `pages`.
fn take_first(pages: &mut PfnRange, count: PageCount) -> PfnRange {
    let first = PfnRange::new(pages.start, count);
    *pages = PfnRange::new(first.end(), pages.pages.minus(count));
    first
}

/// Copies the pages of `batch` to `pages`. Returns what became of each, and whether the way was direct.
fn copy(
    source: &Pagemap,
    to: &Pagemap,
    batch: &[Held],
    pages: PfnRange,
    scratch: &mut Scratch,
) -> (Outcomes, bool) {
    let mut outcomes: Outcomes = [Ok(()); MAX_WINDOW.get()];
    let all = &mut outcomes[..batch.len()];
    let direct = copy_directly(source, to, batch, pages, all);
    if !direct {
        copy_through(source, to, batch, pages, scratch, all);
    }
    if batch.len() > 1 {
        for n in 0..batch.len() {
            if all[n].is_err() {
                let (one, first) = (&batch[n..=n], pages.start.forward(PageCount::new(n)));
                let page = PfnRange::new(first, PageCount::ONE);
                let outcome = &mut all[n..=n];
                if !direct || !copy_directly(source, to, one, page, outcome) {
                    copy_through(source, to, one, page, scratch, outcome);
                }
            }
        }
    }
    (outcomes, direct)
}

fn copy_directly(
    source: &Pagemap,
    to: &Pagemap,
    batch: &[Held],
    pages: PfnRange,
    outcomes: &mut [Result<(), TransferError>],
) -> bool {
    let mut pieces: Vec<PeerTransfer> = Vec::with_capacity(batch.len());
    for (n, (_, pfn)) in batch.iter().enumerate() {
        let from = source.device_page(*pfn);
        let target = to.device_page(pages.start.forward(PageCount::new(n)));
        if !pieces.last_mut().is_some_and(|last| last.extend(from, target)) {
            pieces.push(PeerTransfer::new(from, target, PageCount::ONE));
        }
    }
    let done = to.device().copy_from(source.device(), &mut pieces);
    if done {
        let each = pieces.iter().flat_map(|piece| core::iter::repeat_n(piece.outcome(), piece.pages().get()));
        outcomes.iter_mut().zip(each).for_each(|(outcome, piece)| *outcome = piece);
    }
    done
}

/// By way of the scratch's buffer.
fn copy_through(
    source: &Pagemap,
    to: &Pagemap,
    batch: &[Held],
    pages: PfnRange,
    scratch: &mut Scratch,
    outcomes: &mut [Result<(), TransferError>],
) {
    let buffer = scratch.bounce;
    // SAFETY: the buffer has room for a whole window, which a batch does not exceed.
    let place = |n: usize| unsafe { buffer.add(n * PAGE_SIZE) };
    let transfers = &mut scratch.transfers;
    transfers.clear();
    for (n, (_, pfn)) in batch.iter().enumerate() {
        // SAFETY: the buffer is the scratch's, which is ours for the length of this call.
        unsafe { transfers.push(source.device_page(*pfn), place(n)) };
    }
    source.device().read_ahead(transfers.as_mut_slice());
    outcomes.iter_mut().zip(each_page(transfers.as_mut_slice())).for_each(|(outcome, read)| *outcome = read);
    transfers.clear();
    for n in (0..batch.len()).filter(|n| outcomes[*n].is_ok()) {
        let target = to.device_page(pages.start.forward(PageCount::new(n)));
        // SAFETY: as above.
        unsafe { transfers.push(target, place(n)) };
    }
    to.device().write(transfers.as_mut_slice());
    let written = outcomes.iter_mut().filter(|outcome| outcome.is_ok());
    written.zip(each_page(transfers.as_mut_slice())).for_each(|(outcome, wrote)| *outcome = wrote);
}

/// The outcome of each page of `transfers`, in order.
fn each_page(transfers: &[Transfer]) -> impl Iterator<Item = Result<(), TransferError>> {
    transfers.iter().flat_map(|transfer| core::iter::repeat_n(transfer.outcome(), transfer.pages().get()))
}
