//! A handle's page table.
//!
//! What    `Areas`, disjoint ranges of pages. A *watched* one has a mirror, whose table says what the device sees of each
//!         page and is kept true by the space. A *plain* one is memory that no page leaves and nobody tells about: it
//!         is there for one operation, and each access asks the kernel.
//! Why     a mirror is of one mapping, and of no use where that is gone: areas come as the device is asked about
//!         addresses, and go when their mappings went. Of a mapping that went in part, what is left keeps its mirror,
//!         which several areas share then.
//! Locks   the handle's, around all of it; inside, the mirrors'.
//! Races   *unmapped and mapped anew*: the mirror is told of the first when its event is read, which may be after the
//!         second was found. Pages that turn out gone get another mirror ([`Areas::is_dead`]).
//! Fails   with an [`Error`], if there is no memory.

use std::sync::Arc;

use uhmm::mirror::{Mirror, MirrorTable, PageView, Pages};
use uhmm::notifier::Event;
use uhmm::space::{MappingKind, ProgramMapping};
use uhmm::{Owner, PageCount, Space, VaRange, Vpn};

use crate::{Error, Node};

/// Whether it is a page of the device of `own`.
pub(crate) fn is_own(view: PageView, own: Owner) -> bool {
    match view {
        PageView::Device { .. } => true,
        PageView::Coherent { owner, .. } => owner == own,
        _ => false,
    }
}

/// What the device sees of the pages of a watched area.
pub(crate) struct Table {
    range: VaRange,
    views: Box<[PageView]>,
    /// Pages whose mapping went.
    gone: Box<[bool]>,
}

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, event: Event) {
        if let Some(part) = self.range.intersect(range) {
            self.views_of(part).fill(PageView::Absent);
            if matches!(event, Event::Unmap | Event::Release) {
                let first = part.first().since(self.range.first()).get();
                self.gone[first..first + part.pages().get()].fill(true);
            }
        }
    }
}

impl Table {
    fn views_of(&mut self, part: VaRange) -> &mut [PageView] {
        let first = part.first().since(self.range.first()).get();
        &mut self.views[first..first + part.pages().get()]
    }

    /// What it says about pages from `page` on.
    pub(crate) fn from(&self, page: Vpn) -> &[PageView] {
        &self.views[page.since(self.range.first()).get()..]
    }

    /// Which pages of `part` are the device's alone.
    pub(crate) fn lent(&self, part: VaRange, into: &mut [bool]) {
        for (lent, view) in into.iter_mut().zip(self.from(part.first())) {
            *lent = view.is_exclusive();
        }
    }

    fn gone_from(&self, page: Vpn) -> &[bool] {
        &self.gone[page.since(self.range.first()).get()..]
    }

    /// Takes over what is known of pages.
    pub(crate) fn install(&mut self, pages: Pages<'_>) {
        let (first, views) = (self.range.first(), &mut self.views);
        pages.segments().iter().for_each(|segment| segment.copy_to(first, views));
    }

    /// The same, if they are `wanted` and all of them are the device's alone.
    pub(crate) fn install_exclusive(&mut self, pages: Pages<'_>, wanted: bool) {
        let all = pages.views().all(|view| view.is_exclusive());
        if all && wanted {
            self.install(pages);
        } else {
            self.views_of(pages.range()).fill(PageView::Absent);
        }
    }

    /// The same, of those that are on the device: what the table says of others stays as it is.
    pub(crate) fn install_own(&mut self, pages: Pages<'_>, own: Owner) {
        for (entry, view) in self.views_of(pages.range()).iter_mut().zip(pages.views()) {
            if is_own(view, own) {
                *entry = view;
            }
        }
    }
}

/// Pages of one mapping.
pub(crate) struct Area<'m> {
    pub(crate) range: VaRange,
    /// `None` for a plain one.
    pub(crate) mirror: Option<Arc<Mirror<'m, Table>>>,
}

impl<'m> Area<'m> {
    /// Whether the mapping of a page of `range` went.
    fn is_dead(&self, range: VaRange) -> bool {
        let (Some(mirror), Some(part)) = (&self.mirror, self.range.intersect(range)) else { return false };
        mirror.look(|table| table.gone_from(part.first())[..part.pages().get()].contains(&true))
    }

    /// What is left of it as areas of a mapping of `range`, which is watched or not.
    fn left(self, range: VaRange, watched: bool) -> Vec<Self> {
        let Some(part) = self.range.intersect(range) else { return vec![self] };
        let Some(mirror) = &self.mirror else { return if watched { Vec::new() } else { vec![self] } };
        if watched && !self.is_dead(self.range) {
            return vec![self];
        }
        // Nothing is allocated with the mirror's lock held.
        let mut usable = vec![true; self.range.pages().get()];
        mirror.look(|table| {
            for (usable, gone) in usable.iter_mut().zip(table.gone_from(self.range.first())) {
                *usable = !gone;
            }
        });
        if !watched {
            let first = part.first().since(self.range.first()).get();
            usable[first..first + part.pages().get()].fill(false);
        }
        let area = |range| Self { range, mirror: Some(mirror.clone()) };
        runs(self.range, &usable, |usable| *usable).into_iter().map(area).collect()
    }
}

/// The stretches of `range` whose pages are such.
pub(crate) fn runs<T>(range: VaRange, pages: &[T], such: impl Fn(&T) -> bool) -> Vec<VaRange> {
    let mut found = Vec::new();
    let mut n = 0;
    for group in pages.chunk_by(|a, b| such(a) == such(b)) {
        let part = range.skip(PageCount::new(n)).map(|rest| rest.take(PageCount::new(group.len())));
        if such(&group[0]) {
            found.extend(part);
        }
        n += group.len();
    }
    found
}

/// The areas of a handle, by address.
#[derive(Default)]
pub(crate) struct Areas<'m>(Vec<Area<'m>>);

impl<'m> Areas<'m> {
    /// The area of `page`.
    pub(crate) fn at(&self, page: Vpn) -> Option<&Area<'m>> {
        let at = self.0.partition_point(|area| area.range.end_page() <= page);
        self.0.get(at).filter(|area| area.range.contains(page))
    }

    /// The watched parts of `range`.
    pub(crate) fn watched(&self, range: VaRange) -> impl Iterator<Item = (VaRange, &Mirror<'m, Table>)> {
        self.0.iter().filter_map(move |area| Some((area.range.intersect(range)?, area.mirror.as_deref()?)))
    }

    /// Whether a mapping of `range` went since its area was made.
    pub(crate) fn is_dead(&self, range: VaRange) -> bool {
        self.0.iter().any(|area| area.is_dead(range))
    }

    /// Makes areas for whatever of `mapping` has none.
    pub(crate) fn cover(
        &mut self,
        space: &'m Space,
        node: Node,
        mapping: &ProgramMapping,
    ) -> Result<(), Error> {
        let range = mapping.range;
        // SAFETY: what a device may be asked about was promised to the machine (`Dmirror::new`), whose handles bring
        // the device's pages home before it goes.
        let watched = mapping.kind == MappingKind::Anonymous && unsafe { space.watch(range) }.is_ok();
        self.0 = std::mem::take(&mut self.0).into_iter().flat_map(|area| area.left(range, watched)).collect();
        for gap in self.gaps(range) {
            let mirror = if watched { Some(Arc::new(mirror_of(space, node, gap)?)) } else { None };
            let at = self.0.partition_point(|area| area.range.first() < gap.first());
            self.0.insert(at, Area { range: gap, mirror });
        }
        Ok(())
    }

    fn gaps(&self, range: VaRange) -> Vec<VaRange> {
        let mut gaps = Vec::new();
        let mut at = range.first();
        let mut until = |at: Vpn, end: Vpn| {
            if at < end {
                gaps.extend(VaRange::of_pages(at, end.since(at)));
            }
        };
        for known in self.0.iter().filter_map(|area| area.range.intersect(range)) {
            until(at, known.first());
            at = known.end_page();
        }
        until(at, range.end_page());
        gaps
    }

    /// Forgets the plain ones: nobody tells when they change.
    pub(crate) fn forget_plain(&mut self) {
        self.0.retain(|area| area.mirror.is_some());
    }
}

fn mirror_of<'m>(space: &'m Space, node: Node, range: VaRange) -> Result<Mirror<'m, Table>, Error> {
    let mut views = Vec::new();
    views.try_reserve_exact(range.pages().get()).map_err(|_| Error::NoMemory)?;
    views.resize(range.pages().get(), PageView::Absent);
    let gone = vec![false; views.len()].into_boxed_slice();
    let table = Table { range, views: views.into_boxed_slice(), gone };
    Ok(space.mirror(range, table)?.of_device(node.index())?)
}
