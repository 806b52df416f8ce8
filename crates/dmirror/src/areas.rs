//! A handle's page table.
//!
//! What    `Areas`, disjoint ranges of pages. A *watched* one has a mirror, whose table says what the device sees of each
//!         page and is kept true by the space. A *plain* one is memory that no page leaves and nobody tells about: it
//!         is there for one operation, and each access asks the kernel.
//! Why     a mirror is of one mapping, and of no use when that is gone: areas come as the device is asked about
//!         addresses, and go when their mappings went.
//! Locks   the handle's, around all of it; inside, the mirrors'.
//! Races   *unmapped and mapped anew*: the mirror is told of the first when its event is read, which may be after the
//!         second was found. An area that turns out dead is made again ([`Areas::is_dead`]).
//! Fails   with an [`Error`], if there is no memory.

use uhmm::mirror::{Mirror, MirrorTable, PageView, Pages};
use uhmm::notifier::Event;
use uhmm::space::{MappingKind, ProgramMapping};
use uhmm::{Owner, Space, VaRange, Vpn};

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
    /// The mapping went, or part of it.
    dead: bool,
}

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, event: Event) {
        if let Some(part) = self.range.intersect(range) {
            self.views_of(part).fill(PageView::Absent);
            self.dead |= matches!(event, Event::Unmap | Event::Release);
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

    /// Takes over what is known of pages.
    pub(crate) fn install(&mut self, pages: Pages<'_>) {
        let (first, views) = (self.range.first(), &mut self.views);
        pages.segments().iter().for_each(|segment| segment.copy_to(first, views));
    }

    /// The same, if all of them are the device's alone.
    pub(crate) fn install_exclusive(&mut self, pages: Pages<'_>) {
        let all = pages.views().all(|view| view.is_exclusive());
        if all {
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
    pub(crate) mirror: Option<Mirror<'m, Table>>,
}

impl Area<'_> {
    fn is_dead(&self) -> bool {
        self.mirror.as_ref().is_some_and(|mirror| mirror.look(|table| table.dead))
    }
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
        self.0.iter().filter_map(move |area| Some((area.range.intersect(range)?, area.mirror.as_ref()?)))
    }

    /// Whether a mapping of `range` went since its area was made.
    pub(crate) fn is_dead(&self, range: VaRange) -> bool {
        self.0.iter().any(|area| area.range.intersect(range).is_some() && area.is_dead())
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
        self.0.retain(|area| {
            area.range.intersect(range).is_none() || (area.mirror.is_some() == watched && !area.is_dead())
        });
        for gap in self.gaps(range) {
            let mirror = if watched { Some(mirror_of(space, node, gap)?) } else { None };
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
    let table = Table { range, views: views.into_boxed_slice(), dead: false };
    Ok(space.mirror(range, table)?.of_device(node.index())?)
}
