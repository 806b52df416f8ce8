//! What the pages of a range are, as they are found.
//!
//! What    [`Mm::look`], one look at pages, told in segments; [`Beside`], what a mirror knows besides: which pages are
//!         gone for it, and which chunks are known to be in RAM.
//! How     a page's word says whether it is away, the host's page map whether it is there and how, the mapping
//!         whether it may be written. A page counts as there only where all three say so. Of a chunk that is known, page
//!         map and words have been asked before ([`known`](super::known)). Of pages that we put where they are ourselves
//!         the words say that they are there ([`PageWord::is_installed`]), where the host tells of all that the program
//!         does to them; behind everybody's back happens what [`known`](super::known) says. Words are passed over where
//!         no page of a chunk is away ([`PageTable::away`](crate::pagetable::PageTable::away)).
//! Locks   the layout lock for reading, around the look at the pages of one mapping. What allocates (the list of
//!         mappings may) is asked before.
//! Races   a look is old when it ends. It is *consistent*: no change of the program's own had begun, unread, when it
//!         ended ([`Host::is_changing`]); a page that moves says so in its word, which is read after the page map.
//!         The kernel carries a discard out a moment after its event was read: a page that other threads filled, had moved
//!         out and brought home within that moment is told to be there until it is touched.
//! Fails   nothing here fails. Where there is no room for more segments, the look ends early.

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, VaRange, Vpn};

use super::gone::Gone;
use super::known::Known;
use super::request::Request;
use super::view::{Full, PageView, Segments, Unusable};
use crate::host::{Host, Rights, Sort, Unusual};
use crate::mm::Mm;
use crate::pagetable::{PageWord, State};
use crate::sync::Ordering;

/// Mappings, or stretches of pages, that are asked for at a time.
pub(super) const FOUND: usize = 16;
/// Pages that are looked at under one hold of the lock, unless they are known: long enough that the calls to the host do
/// not count, short enough that nobody who reads events waits for it.
const SPAN: usize = 16 * CHUNK_PAGES;
/// The same where pages are expected to be huge: longer by less than what these take less.
const HUGE_SPAN: usize = 8 * SPAN;

pub(super) const NO_RIGHTS: Rights =
    Rights { range: VaRange::page(Vpn::new(0)), read: false, write: false, shared: false, file: false };
const UNMAPPED: PageView = PageView::Error(Unusable::Unmapped);

/// What is left of `range` from `end` on.
pub(super) fn behind(range: VaRange, end: Vpn) -> Option<VaRange> {
    VaRange::of_pages(end, range.end_page().since(end))
}

/// What is known besides what is found.
#[derive(Clone, Copy)]
pub(super) struct Beside<'a> {
    /// Not to be had any more.
    pub(super) gone: Gone,
    /// Told of every change of the pages. `None` where nobody is.
    pub(super) known: Option<&'a Known>,
    /// The pages before were huge: so will be these, and to look at them takes less.
    pub(super) huge: bool,
}

impl Beside<'_> {
    /// For whoever has no mirror.
    pub(super) const NOTHING: Self = Self { gone: Gone::NOTHING, known: None, huge: false };

    /// The pages at the front of `range` that are looked at together.
    pub(super) fn span(&self, range: VaRange) -> VaRange {
        match self.known.and_then(|known| known.run(range.take(Geometry::G1.pages()))) {
            Some((huge, Geometry::M2)) => huge,
            _ => {
                let span = if self.huge { HUGE_SPAN } else { SPAN };
                range.take(PageCount::new(span - range.first().in_chunk()))
            }
        }
    }
}

impl<H: Host> Mm<H> {
    /// What the pages of `part` are, from its front on, as far as there is room in `seen`: for one segment at least.
    /// `false` if it may be over: a change is under way.
    pub(super) fn look(
        &self,
        part: VaRange,
        beside: &Beside<'_>,
        request: &Request<'_>,
        seen: &mut Segments<'_>,
    ) -> bool {
        seen.start(part.first());
        let mut look = Look { mm: self, beside, request, seen, settled: true };
        // Without room for more, what was seen is told.
        let _ = look.at_mappings(part);
        let (settled, huge) = (look.settled, look.seen.end_huge());
        if self.looks_huge.load(Ordering::Relaxed) != huge {
            self.looks_huge.store(huge, Ordering::Relaxed);
        }
        settled
    }
}

/// One look, under way.
struct Look<'a, 's, H: Host> {
    mm: &'a Mm<H>,
    beside: &'a Beside<'a>,
    request: &'a Request<'a>,
    seen: &'a mut Segments<'s>,
    /// No change was under way, up to now.
    settled: bool,
}

impl<H: Host> Look<'_, '_, H> {
    fn at_mappings(&mut self, part: VaRange) -> Result<(), Full> {
        let mut found = [NO_RIGHTS; FOUND];
        let mut rest = Some(part);
        while let Some(range) = rest {
            let (count, end) = self.mm.host.mappings(range, &mut found);
            for rights in found[..count].iter().filter(|rights| rights.read) {
                self.seen.push_to(rights.range.first(), UNMAPPED)?;
                for gone in self.beside.gone.iter().filter_map(|gone| gone.intersect(rights.range)) {
                    if let Some(usable) =
                        VaRange::of_pages(self.seen.end(), gone.first().since(self.seen.end()))
                    {
                        self.at(Rights { range: usable, ..*rights })?;
                    }
                    self.seen.push_to(gone.end_page(), UNMAPPED)?;
                }
                if let Some(usable) = behind(rights.range, self.seen.end()) {
                    self.at(Rights { range: usable, ..*rights })?;
                }
            }
            self.seen.push_to(end, UNMAPPED)?;
            rest = behind(part, end);
        }
        Ok(())
    }

    /// The pages of a mapping, or of a part of it.
    fn at(&mut self, rights: Rights) -> Result<(), Full> {
        let _layout = self.mm.layout.read(&self.mm.host);
        let done = self.walk_unknown(rights);
        self.settled &= !self.mm.host.is_changing();
        done
    }

    /// The same: what is known is told, and the others are looked at.
    fn walk_unknown(&mut self, rights: Rights) -> Result<(), Full> {
        let Some(known) = self.beside.known.filter(|_| !rights.file) else {
            return self.walk(rights);
        };
        let mut rest = Some(rights.range);
        while let Some(left) = rest {
            if let Some((range, order)) = known.run(left) {
                self.seen.push_to(range.end_page(), PageView::Ram { write: rights.write, order })?;
            } else {
                self.walk(Rights { range: known.gap(left), ..rights })?;
            }
            rest = behind(rights.range, self.seen.end());
        }
        Ok(())
    }

    /// The same: pages that were put where they are by ourselves need no look at the page map, where all that happens to
    /// them is heard.
    fn walk(&mut self, rights: Rights) -> Result<(), Full> {
        // Huge pages take so little of a walk that the words are not worth a look.
        if rights.file || self.beside.huge || !self.mm.host.hears() {
            return self.walk_page_map(rights);
        }
        let plain = PageView::Ram { write: rights.write, order: Geometry::K4 };
        let mut rest = Some(rights.range);
        while let Some(left) = rest {
            let known = self.mm.table.installed(left);
            self.seen.push_to(left.first().forward(known), plain)?;
            if let Some(left) = left.skip(known) {
                let range = left.take(self.mm.table.not_installed(left));
                self.walk_page_map(Rights { range, ..rights })?;
            }
            rest = behind(rights.range, self.seen.end());
        }
        Ok(())
    }

    /// The same, by page map and words.
    fn walk_page_map(&mut self, rights: Rights) -> Result<(), Full> {
        // A file's own page is replaced by the first store, where the mapping is private.
        let sort = match rights.file && !rights.shared {
            true => Sort::File,
            false if self.beside.known.is_some() && !rights.file => Sort::Managed,
            false => Sort::Anonymous,
        };
        let view_of = |unusual: &Unusual| {
            let write = rights.write && unusual.write && !unusual.file;
            match *unusual {
                Unusual { present: false, .. } => PageView::Absent,
                Unusual { huge: true, .. } => PageView::Ram { write, order: Geometry::M2 },
                Unusual { zero: true, .. } => PageView::Zeros,
                _ => PageView::Ram { write, order: Geometry::K4 },
            }
        };
        let plain = PageView::Ram { write: rights.write, order: Geometry::K4 };
        let mut found = [Unusual::absent(rights.range); FOUND];
        let mut rest = Some(rights.range);
        while let Some(part) = rest {
            let (count, end) = self.mm.host.unusual(part, sort, &mut found);
            // Words after the page map: a page that leaves in between says so.
            for unusual in &found[..count] {
                self.tell_to(unusual.range.first(), plain, rights.write)?;
                self.tell_to(unusual.range.end_page(), view_of(unusual), rights.write)?;
            }
            self.tell_to(end, plain, rights.write)?;
            rest = behind(rights.range, end);
        }
        Ok(())
    }

    /// Tells of the pages from where it was told last to before `end`: what the page map says of all of them, and the
    /// word of each.
    fn tell_to(&mut self, end: Vpn, mapped: PageView, write: bool) -> Result<(), Full> {
        let from = self.seen.end();
        let Some(range) = VaRange::of_pages(from, end.since(from)) else { return Ok(()) };
        let PageView::Ram { order: Geometry::M2, write: may_write } = mapped else {
            return self.tell_by_words(range, mapped, write);
        };
        // A huge mapping is reported as one only where a driver may take it over as one: all of the chunk was asked about,
        // and all of it is there.
        let in_pieces = PageView::Ram { order: Geometry::K4, write: may_write };
        let whole = |part: &VaRange| part.pages().get() == CHUNK_PAGES;
        for part in self.mm.table.away(range) {
            if whole(&part) && self.mm.table.first_away(part).is_none() {
                continue;
            }
            self.tell_unbroken(part.first(), mapped, in_pieces)?;
            self.tell_by_words(part, in_pieces, write)?;
        }
        self.tell_unbroken(end, mapped, in_pieces)
    }

    /// Tells of huge mappings from where it was told last to before `end`: those that are cut are told in pieces.
    fn tell_unbroken(&mut self, end: Vpn, whole: PageView, in_pieces: PageView) -> Result<(), Full> {
        let from = self.seen.end();
        let head = if from.in_chunk() == 0 { from } else { from.chunk_base().forward(Geometry::M2.pages()) };
        self.seen.push_to(head.min(end), in_pieces)?;
        self.seen.push_to(end.chunk_base(), whole)?;
        self.seen.push_to(end, in_pieces)
    }

    /// Tells of the pages of `range`, which the page map says to be `mapped`.
    fn tell_by_words(&mut self, range: VaRange, mapped: PageView, write: bool) -> Result<(), Full> {
        for part in self.mm.table.away(range) {
            let mut rest = Some(part);
            while let Some(left) = rest {
                let Some((page, word)) = self.mm.table.first_away(left) else { break };
                self.seen.push_to(page, mapped)?;
                self.seen.push_to(page.forward(PageCount::ONE), self.view_of(word, mapped, write))?;
                rest = behind(part, self.seen.end());
            }
        }
        self.seen.push_to(range.end_page(), mapped)
    }

    /// What a page is whose word is not that of one in RAM.
    fn view_of(&self, word: PageWord, mapped: PageView, may_write: bool) -> PageView {
        match word.state() {
            // Given up, and there: the kernel is yet to take it away.
            State::Empty | State::Resident => PageView::Absent,
            State::Poisoned => PageView::Error(Unusable::Poisoned),
            // What could be mapped in place is brought there by being asked for; in a mapping that may not be
            // written it cannot.
            State::Device if may_write && self.mm.is_mappable(word) => PageView::Absent,
            State::Device => match word.pfn() {
                Some(pfn) if self.request.is_own(self.mm.pagemaps.of(pfn)) => {
                    PageView::Device { pfn, write: may_write }
                }
                _ => PageView::Absent,
            },
            State::Exclusive => match word.slot() {
                Some(slot) if may_write && self.request.is_held(self.mm.holder_of(slot)) => {
                    PageView::Exclusive { at: self.mm.slot_address(slot) }
                }
                _ => PageView::Absent,
            },
            State::Coherent => match (word.pfn(), mapped) {
                (Some(pfn), PageView::Ram { write, .. }) => {
                    PageView::Coherent { owner: self.mm.pagemaps.of(pfn).owner(), pfn, write }
                }
                _ => PageView::Absent,
            },
            State::Staged | State::Moving => PageView::Absent,
        }
    }
}
