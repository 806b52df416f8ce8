//! What is where in a store: the contents of its labels.
//!
//! What     [`Table`] and the changes it allows: create, resize, reconfigure, destroy, pages that break and are
//!          mended. Space is found as the kernel's `alloc_dax_region` does it: gaps from the front on; the last
//!          extent grows where the gap begins at its end, and every other gap becomes an extent of its own.
//! Why      apart from files and locks, so that every rule can be tried without them. A change works on a copy,
//!          which becomes the state when the labels are written.
//! Fails    [`TableError`], and then nothing has changed.

use uhmm_addr::{ByteSize, Geometry, PageCount};

use super::extent::gaps;
use super::namespace::whole_pages;
use super::{BadPages, Extent, Mode, Namespace, NamespaceId, Uuid};

/// A change that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TableError {
    /// A size is not a multiple of the alignment.
    #[error(
        "{bytes} bytes is no size for a namespace aligned to {align}; it must be a multiple of {}, above 0",
        align.bytes()
    )]
    Misaligned {
        /// What was asked for.
        bytes: u64,
        /// The alignment.
        align: Geometry,
    },
    /// The medium's pages are larger than the alignment.
    #[error("the store's pages are {page}, so that nothing in it can be aligned to {align}; ask for {page}")]
    AlignTooSmall {
        /// What was asked for.
        align: Geometry,
        /// The size of the medium's pages.
        page: Geometry,
    },
    /// Where it lies does not fit the new alignment.
    #[error(
        "its range {extent:?} (pages) is not aligned to {align}; destroy the namespace and create it with that \
         alignment"
    )]
    Unaligned {
        /// The alignment that was asked for.
        align: Geometry,
        /// The range that does not fit.
        extent: Extent,
    },
    /// The store is full.
    #[error(
        "{wanted} is needed and {available} is free at an alignment of {align}; ask for less, or destroy or shrink another namespace"
    )]
    Full {
        /// So much more is needed.
        wanted: ByteSize,
        /// So much there is.
        available: ByteSize,
        /// At this alignment.
        align: Geometry,
    },
    /// There is no such namespace.
    #[error("there is no namespace {}; `uhmm dax list` shows those that there are", id.0)]
    Unknown {
        /// Its number.
        id: NamespaceId,
    },
    /// The name is too long.
    #[error("the name {name:?} is {} bytes long, and a namespace's may have 63", name.len())]
    Name {
        /// The name.
        name: String,
    },
    /// The name would run over lines, or change the terminal that shows it.
    #[error("the name {name:?} has control characters, and a namespace's may have none")]
    ControlName {
        /// The name.
        name: String,
    },
    /// The bytes are not in the namespace, or no whole pages.
    #[error("{offset}+{len} are no whole 4096-byte pages inside its {size} ({} bytes)", size.bytes())]
    Outside {
        /// The first byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The namespace's size.
        size: ByteSize,
    },
}

/// What a new namespace shall be.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Spec {
    /// Its size; all that is free, without one.
    pub size: Option<ByteSize>,
    /// Its alignment; without one 2M, or the medium's pages if those are larger.
    pub align: Option<Geometry>,
    /// What it is for.
    pub mode: Mode,
    /// What it is called.
    pub name: String,
}

/// What shall be different about a namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// What it is for.
    pub mode: Option<Mode>,
    /// Its alignment.
    pub align: Option<Geometry>,
    /// What it is called.
    pub name: Option<String>,
}

/// A store's contents, as its labels say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    /// Number of the store: the `X` of `daxX.Y` (the kernel's `dax_region` id).
    pub region: u32,
    /// The store's own mark.
    pub uuid: Uuid,
    /// The size of the medium's pages.
    pub page: Geometry,
    /// Pages of data.
    pub capacity: u64,
    /// What is there, in order of their numbers.
    pub(super) namespaces: Vec<Namespace>,
    /// Pages that cannot be read.
    pub(super) bad: BadPages,
}

impl Table {
    /// An empty store.
    pub fn new(region: u32, uuid: Uuid, page: Geometry, capacity: u64) -> Self {
        Self { region, uuid, page, capacity, namespaces: Vec::new(), bad: BadPages::new() }
    }

    /// Every namespace, in order of their numbers.
    pub fn namespaces(&self) -> &[Namespace] {
        &self.namespaces
    }

    /// The namespace with this number.
    pub fn get(&self, id: NamespaceId) -> Result<&Namespace, TableError> {
        self.namespaces.iter().find(|namespace| namespace.id == id).ok_or(TableError::Unknown { id })
    }

    fn get_mut(&mut self, id: NamespaceId) -> Result<&mut Namespace, TableError> {
        self.namespaces.iter_mut().find(|namespace| namespace.id == id).ok_or(TableError::Unknown { id })
    }

    /// What a namespace is called everywhere: `dax0.1`.
    pub fn device_name(&self, id: NamespaceId) -> String {
        format!("dax{}.{}", self.region, id.0)
    }

    /// Pages that cannot be read.
    pub fn bad(&self) -> &BadPages {
        &self.bad
    }

    /// A namespace's bad pages, counted from its first.
    pub fn bad_of(&self, namespace: &Namespace) -> BadPages {
        let mut own = BadPages::new();
        for run in self.bad.runs() {
            namespace.own(*run).for_each(|pages| own.add(pages));
        }
        own
    }

    fn free(&self) -> Vec<Extent> {
        let taken = self.namespaces.iter().flat_map(|namespace| namespace.extents.iter().copied()).collect();
        Extent::between(0, self.capacity).map_or_else(Vec::new, |whole| gaps(whole, taken))
    }

    /// What is free at this alignment, in all and in one piece.
    pub fn available(&self, align: Geometry) -> (PageCount, PageCount) {
        let free = || self.free().into_iter().filter_map(|gap| gap.inside(align)).map(|gap| gap.len);
        (PageCount::new(free().sum::<u64>() as usize), PageCount::new(free().max().unwrap_or(0) as usize))
    }

    /// The alignment that a namespace gets if nobody says.
    pub fn default_align(&self) -> Geometry {
        self.page.max(Geometry::M2)
    }

    /// Makes a namespace with the lowest number that is free.
    pub fn create(&mut self, spec: &Spec, uuid: Uuid) -> Result<NamespaceId, TableError> {
        let align = spec.align.unwrap_or_else(|| self.default_align());
        self.check_align(align)?;
        check_name(&spec.name)?;
        let pages = match spec.size {
            Some(size) => whole_units(size, align)?,
            None => {
                let (available, _) = self.available(align);
                if available.is_zero() {
                    let (wanted, available) = (align.pages().size(), available.size());
                    return Err(TableError::Full { wanted, available, align });
                }
                available.get() as u64
            }
        };
        let mut extents = Vec::new();
        self.grow(&mut extents, pages, align)?;
        let taken = |id| self.namespaces.iter().any(|namespace| namespace.id == NamespaceId(id));
        let id = NamespaceId((0..).find(|id| !taken(*id)).unwrap_or(u32::MAX));
        let namespace = Namespace { id, uuid, name: spec.name.clone(), mode: spec.mode, align, extents };
        let at = self.namespaces.partition_point(|other| other.id < id);
        self.namespaces.insert(at, namespace);
        Ok(id)
    }

    /// Has a namespace be there, as it is said, whether one with its number was there or not. Its pages must be nobody
    /// else's.
    ///
    /// # Errors
    /// The first of its pages that are another's, or are not there.
    pub(super) fn put(&mut self, namespace: Namespace) -> Result<(), Extent> {
        let others = self.namespaces.iter().filter(|other| other.id != namespace.id);
        let others: Vec<Extent> = others.flat_map(|other| other.extents.iter().copied()).collect();
        let fits = |own: &Extent| {
            own.end() <= self.capacity && others.iter().all(|other| own.intersect(*other).is_none())
        };
        if let Some(extent) = namespace.extents.iter().find(|own| !fits(own)) {
            return Err(*extent);
        }
        self.namespaces.retain(|other| other.id != namespace.id);
        let at = self.namespaces.partition_point(|other| other.id < namespace.id);
        self.namespaces.insert(at, namespace);
        Ok(())
    }

    /// Gives a namespace another size. It grows into gaps, and shrinks from its end; what it keeps stays where
    /// it is.
    pub fn resize(&mut self, id: NamespaceId, size: ByteSize) -> Result<(), TableError> {
        let namespace = self.get(id)?;
        let (align, now) = (namespace.align, namespace.pages().get() as u64);
        let pages = whole_units(size, align)?;
        let mut extents = namespace.extents.clone();
        if pages > now {
            self.grow(&mut extents, pages - now, align)?;
        } else {
            shrink(&mut extents, now - pages);
        }
        self.get_mut(id)?.extents = extents;
        Ok(())
    }

    /// Changes what a namespace is for, or how it is aligned or called. What it holds stays.
    pub fn reconfigure(&mut self, id: NamespaceId, change: &Change) -> Result<(), TableError> {
        let namespace = self.get(id)?;
        if let Some(align) = change.align {
            self.check_align(align)?;
            if let Some(extent) = namespace.extents.iter().find(|extent| !extent.is_aligned(align)) {
                return Err(TableError::Unaligned { align, extent: *extent });
            }
        }
        change.name.as_deref().map_or(Ok(()), check_name)?;
        let namespace = self.get_mut(id)?;
        namespace.align = change.align.unwrap_or(namespace.align);
        namespace.mode = change.mode.unwrap_or(namespace.mode);
        if let Some(name) = &change.name {
            namespace.name.clone_from(name);
        }
        Ok(())
    }

    /// Gives a namespace's space back. Its pages that are bad stay so.
    pub fn destroy(&mut self, id: NamespaceId) -> Result<(), TableError> {
        self.get(id)?;
        self.namespaces.retain(|namespace| namespace.id != id);
        Ok(())
    }

    /// Notes that pages of a namespace are bad, or good again. Both in bytes, whole pages of the namespace.
    pub fn mark(&mut self, id: NamespaceId, offset: u64, len: u64, bad: bool) -> Result<(), TableError> {
        let namespace = self.get(id)?;
        let size = namespace.size();
        let outside = TableError::Outside { offset, len, size };
        let inside = offset.checked_add(len).is_some_and(|end| end <= size.bytes()) && len > 0;
        let (Some(page), Some(pages), true) = (whole_pages(offset), whole_pages(len), inside) else {
            return Err(outside);
        };
        let pieces: Vec<_> = namespace.locate(page, pages).collect();
        for piece in pieces {
            if bad {
                self.bad.add(piece.extent);
            } else {
                self.bad.clear(piece.extent);
            }
        }
        Ok(())
    }

    fn check_align(&self, align: Geometry) -> Result<(), TableError> {
        if align < self.page { Err(TableError::AlignTooSmall { align, page: self.page }) } else { Ok(()) }
    }

    /// Adds `pages` pages to `extents`, which are this table's already or nobody's.
    fn grow(&self, extents: &mut Vec<Extent>, pages: u64, align: Geometry) -> Result<(), TableError> {
        let mut wanted = pages;
        for gap in self.free().into_iter().filter_map(|gap| gap.inside(align)) {
            let taken = Extent { start: gap.start, len: gap.len.min(wanted) };
            match extents.last_mut() {
                Some(tail) if tail.end() == taken.start => tail.len += taken.len,
                _ => extents.push(taken),
            }
            wanted -= taken.len;
            if wanted == 0 {
                return Ok(());
            }
        }
        let (available, _) = self.available(align);
        let wanted = ByteSize::new(Extent { start: 0, len: pages }.bytes());
        Err(TableError::Full { wanted, available: available.size(), align })
    }
}

fn check_name(name: &str) -> Result<(), TableError> {
    if name.len() > Namespace::NAME_MAX {
        return Err(TableError::Name { name: name.into() });
    }
    if name.contains(char::is_control) {
        return Err(TableError::ControlName { name: name.into() });
    }
    Ok(())
}

fn whole_units(size: ByteSize, align: Geometry) -> Result<u64, TableError> {
    let bytes = size.bytes();
    if bytes == 0 || !bytes.is_multiple_of(align.bytes() as u64) {
        return Err(TableError::Misaligned { bytes, align });
    }
    Ok(size.pages().get() as u64)
}

/// Takes `pages` pages from the end.
fn shrink(extents: &mut Vec<Extent>, mut pages: u64) {
    while let Some(last) = extents.last_mut() {
        if last.len > pages {
            last.len -= pages;
            return;
        }
        pages -= last.len;
        extents.pop();
    }
}
