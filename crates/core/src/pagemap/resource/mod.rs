//! Who has which pfns (the kernel's `kernel/resource.c`).
//!
//! What    [`ResourceTree`]: named ranges inside each other. A *region* may hold others; a *busy* one is in somebody's
//!         use, and nothing is requested inside it.
//! Why     two drivers must not believe that the same memory is theirs, and a device without addresses of its own
//!         needs some that nobody has.
//! Owns    the ranges, by number ([`ResourceId`]).
//! Locks   none: it is a value. [`Registry`](super::Registry) keeps one behind its lock.
//! Fails   with the range that is in the way and its name.

#[cfg(all(test, not(loom)))]
mod tests;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use uhmm_addr::{PAGE_SHIFT, PageCount, Pfn, PfnRange};

/// What a range is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResourceKind {
    /// Ordinary memory.
    SystemRam,
    /// Memory that keeps its contents.
    PersistentMemory,
    /// Memory set aside for a driver (`Soft Reserved`).
    SoftReserved,
    /// Pfns without memory that a CPU could touch (`DEVICE_PRIVATE_MEMORY`).
    DevicePrivate,
    /// A window to a device.
    Device,
    /// Anything else: a bus, a region, a claim.
    None,
}

/// Names a range of a tree as long as it is there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ResourceId(u64);

/// A range, its name and what it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resource {
    /// Which.
    pub id: ResourceId,
    /// Its pfns.
    pub range: PfnRange,
    /// What `/proc/iomem` calls it.
    pub name: Box<str>,
    /// What it is.
    pub kind: ResourceKind,
    /// Whether it is in somebody's use (`IORESOURCE_BUSY`).
    pub busy: bool,
}

/// A range is in the way.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{wanted:?} overlaps {name:?} at {range:?}{}", if *.busy { ", which is in use" } else { "" })]
pub struct Conflict {
    /// What was asked for.
    pub wanted: PfnRange,
    /// What is there.
    pub range: PfnRange,
    /// What that is called.
    pub name: Box<str>,
    /// Whether it is in somebody's use.
    pub busy: bool,
}

/// Why a range cannot be as was asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ResourceError {
    /// Another one is in the way (`EBUSY`).
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// No gap is as large (`ERANGE`): the size, and the alignment.
    #[error("no {0} that nobody has, at a multiple of {1}, are left")]
    NoGap(PageCount, PageCount),
    /// A range is at least one page.
    #[error("{0:?} is empty")]
    Empty(PfnRange),
    /// There is none of that number (any more).
    #[error("there is no such range: {0:?}")]
    Unknown(ResourceId),
    /// It would not hold, or be held by, what it holds and is held by now (`EBUSY`).
    #[error("{0:?} does not hold all of {1:?}, {2}")]
    Outside(PfnRange, PfnRange, Box<str>),
    /// Others lie inside: release them first (`EBUSY`).
    #[error("{0:?} still holds {1:?}, {2}")]
    Occupied(PfnRange, PfnRange, Box<str>),
}

/// How a range meets those of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intersection {
    /// It meets none.
    Disjoint,
    /// It meets some, and nothing else.
    Intersects,
    /// It meets some, and others.
    Mixed,
}

/// A range with those inside it, by address.
#[derive(Clone, Debug)]
struct Node {
    resource: Resource,
    children: Vec<Node>,
}

/// All ranges of a machine.
#[derive(Clone, Debug)]
pub struct ResourceTree {
    whole: PfnRange,
    children: Vec<Node>,
    next: u64,
}

impl Default for ResourceTree {
    fn default() -> Self {
        Self::new(PfnRange::new(Pfn::new(0), PageCount::new(1 << Pfn::BITS)))
    }
}

impl ResourceTree {
    /// Pfns of which nobody has any; what is outside of `whole` can never be had.
    pub const fn new(whole: PfnRange) -> Self {
        Self { whole, children: Vec::new(), next: 1 }
    }

    /// A part of it: the children of each node on the way in which `range` lies wholly and that `into` admits.
    fn siblings(&mut self, range: PfnRange, into: impl Fn(&Resource) -> bool) -> &mut Vec<Node> {
        let mut level = &mut self.children;
        loop {
            let found =
                level.iter().position(|node| node.resource.range.encloses(range) && into(&node.resource));
            match found {
                Some(found) => level = &mut level[found].children,
                None => return level,
            }
        }
    }

    fn node(
        &mut self,
        range: PfnRange,
        name: &str,
        kind: ResourceKind,
        busy: bool,
    ) -> Result<Node, ResourceError> {
        if range.pages.is_zero() {
            return Err(ResourceError::Empty(range));
        }
        if !self.whole.encloses(range) {
            return Err(ResourceError::Outside(self.whole, range, name.into()));
        }
        let id = ResourceId(self.next);
        self.next += 1;
        Ok(Node { resource: Resource { id, range, name: name.into(), kind, busy }, children: Vec::new() })
    }

    /// Adds a range where it belongs: inside the smallest one that encloses it, and around those that it encloses
    /// (`insert_resource`).
    ///
    /// # Errors
    /// [`ResourceError::Conflict`] if it overlaps one and neither encloses the other.
    pub fn insert(
        &mut self,
        range: PfnRange,
        name: &str,
        kind: ResourceKind,
    ) -> Result<ResourceId, ResourceError> {
        let mut node = self.node(range, name, kind, false)?;
        let id = node.resource.id;
        // One of the same size goes around what is there.
        let siblings = self.siblings(range, |there| there.range != range);
        let overlaps = |other: &&Node| other.resource.range.overlaps(range);
        if let Some(other) =
            siblings.iter().filter(overlaps).find(|other| !range.encloses(other.resource.range))
        {
            return Err(conflict(range, other).into());
        }
        let (inside, mut beside): (Vec<_>, Vec<_>) =
            siblings.drain(..).partition(|other| range.encloses(other.resource.range));
        node.children = inside;
        place(&mut beside, node);
        *siblings = beside;
        Ok(id)
    }

    /// Claims a range for use: busy, inside whatever encloses it and is not (`request_region`).
    ///
    /// # Errors
    /// [`ResourceError::Conflict`] if somebody uses some of it, or it lies in one only in part.
    pub fn request(
        &mut self,
        range: PfnRange,
        name: &str,
        kind: ResourceKind,
    ) -> Result<ResourceId, ResourceError> {
        let node = self.node(range, name, kind, true)?;
        let id = node.resource.id;
        let siblings = self.siblings(range, |there| !there.busy);
        if let Some(other) = siblings.iter().find(|other| other.resource.range.overlaps(range)) {
            return Err(conflict(range, other).into());
        }
        place(siblings, node);
        Ok(id)
    }

    /// Finds pfns that nobody has, as high as possible, and claims them as a region in which others can be requested
    /// (`request_free_mem_region`): `pages` of them from a multiple of `align` on.
    ///
    /// # Errors
    /// [`ResourceError::NoGap`].
    pub fn request_free_region(
        &mut self,
        pages: PageCount,
        align: PageCount,
        name: &str,
        kind: ResourceKind,
    ) -> Result<Resource, ResourceError> {
        let align = align.max(PageCount::ONE);
        let (len, step) = (pages.get() as u64, align.get() as u64);
        let mut end = self.whole.end().get();
        let tops = self.children.iter().rev().map(|node| node.resource.range);
        let bottom = PfnRange::new(self.whole.start, PageCount::ZERO);
        for below in tops.chain([bottom]) {
            let fits = end.checked_sub(len).map(|start| start / step * step);
            if let Some(start) = fits.filter(|start| *start >= below.end().get() && len > 0) {
                let range = PfnRange::new(Pfn::new(start), pages);
                let node = self.node(range, name, kind, false)?;
                let resource = node.resource.clone();
                place(&mut self.children, node);
                return Ok(resource);
            }
            end = below.start.get();
        }
        Err(ResourceError::NoGap(pages, align))
    }

    /// Every range, outer ones before those inside them, with how deep it lies.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Resource)> {
        let mut rest: Vec<(usize, &Node)> = self.children.iter().rev().map(|node| (0, node)).collect();
        core::iter::from_fn(move || {
            let (depth, node) = rest.pop()?;
            rest.extend(node.children.iter().rev().map(|child| (depth + 1, child)));
            Some((depth, &node.resource))
        })
    }

    /// The outermost range that begins exactly at `start` (`lookup_resource`).
    pub fn lookup(&self, start: Pfn) -> Option<&Resource> {
        self.iter().map(|(_, resource)| resource).find(|resource| resource.range.start == start)
    }

    /// The innermost range in which `pfn` lies.
    pub fn find(&self, pfn: Pfn) -> Option<&Resource> {
        let holds = |resource: &&Resource| resource.range.contains(pfn);
        self.iter().map(|(_, resource)| resource).filter(holds).last()
    }

    /// The range of that number.
    pub fn get(&self, id: ResourceId) -> Option<&Resource> {
        self.iter().map(|(_, resource)| resource).find(|resource| resource.id == id)
    }

    /// The list in which a range lies, where it lies in it, and the range around it.
    fn locate(
        level: &mut Vec<Node>,
        id: ResourceId,
        around: PfnRange,
    ) -> Option<(&mut Vec<Node>, usize, PfnRange)> {
        if let Some(at) = level.iter().position(|node| node.resource.id == id) {
            return Some((level, at, around));
        }
        level.iter_mut().find_map(|node| Self::locate(&mut node.children, id, node.resource.range))
    }

    /// Makes a range larger, smaller, or moves it, among its neighbours (`adjust_resource`).
    ///
    /// # Errors
    /// If it would overlap a neighbour, leave the range around it, or leave out what lies inside it.
    pub fn adjust(&mut self, id: ResourceId, range: PfnRange) -> Result<(), ResourceError> {
        if range.pages.is_zero() {
            return Err(ResourceError::Empty(range));
        }
        let found = Self::locate(&mut self.children, id, self.whole);
        let (level, at, around) = found.ok_or(ResourceError::Unknown(id))?;
        if !around.encloses(range) {
            return Err(ResourceError::Outside(around, range, level[at].resource.name.clone()));
        }
        let mut others = level.iter().enumerate().filter(|(n, _)| *n != at).map(|(_, node)| node);
        if let Some(other) = others.find(|other| other.resource.range.overlaps(range)) {
            return Err(conflict(range, other).into());
        }
        if let Some(child) = level[at].children.iter().find(|child| !range.encloses(child.resource.range)) {
            let child = &child.resource;
            return Err(ResourceError::Outside(range, child.range, child.name.clone()));
        }
        let mut node = level.remove(at);
        node.resource.range = range;
        place(level, node);
        Ok(())
    }

    /// Gives a range up (`release_resource`).
    ///
    /// # Errors
    /// [`ResourceError::Occupied`] if others lie inside.
    pub fn release(&mut self, id: ResourceId) -> Result<Resource, ResourceError> {
        let found = Self::locate(&mut self.children, id, self.whole);
        let (level, at, _) = found.ok_or(ResourceError::Unknown(id))?;
        if let Some(child) = level[at].children.first() {
            let (range, child) = (level[at].resource.range, &child.resource);
            return Err(ResourceError::Occupied(range, child.range, child.name.clone()));
        }
        Ok(level.remove(at).resource)
    }

    /// Takes a range away; what lies inside takes its place (`remove_resource`).
    ///
    /// # Errors
    /// [`ResourceError::Unknown`].
    pub fn remove(&mut self, id: ResourceId) -> Result<Resource, ResourceError> {
        let found = Self::locate(&mut self.children, id, self.whole);
        let (level, at, _) = found.ok_or(ResourceError::Unknown(id))?;
        let node = level.remove(at);
        node.children.into_iter().for_each(|child| place(level, child));
        Ok(node.resource)
    }

    /// How `range` meets ranges of this kind (`region_intersects`). What lies inside a range of another kind counts
    /// where it covers what the two have in common.
    pub fn intersects(&self, range: PfnRange, kind: ResourceKind) -> Intersection {
        let (mut of_kind, mut others) = (false, false);
        for node in self.children.iter().filter(|node| node.resource.range.overlaps(range)) {
            node.meet(range, kind, &mut of_kind, &mut others);
        }
        match (of_kind, others) {
            (false, _) => Intersection::Disjoint,
            (true, false) => Intersection::Intersects,
            (true, true) => Intersection::Mixed,
        }
    }
}

impl Node {
    fn meet(&self, range: PfnRange, kind: ResourceKind, of_kind: &mut bool, others: &mut bool) {
        if self.resource.kind == kind {
            *of_kind = true;
            return;
        }
        let (start, end) =
            (self.resource.range.start.max(range.start), self.resource.range.end().min(range.end()));
        let mut covered = start;
        for child in self.children.iter().filter(|child| child.resource.range.overlaps(range)) {
            *others |= child.resource.range.start > covered;
            child.meet(range, kind, of_kind, others);
            covered = child.resource.range.end();
        }
        *others |= covered < end;
    }
}

fn conflict(wanted: PfnRange, other: &Node) -> Conflict {
    let Resource { range, name, busy, .. } = other.resource.clone();
    Conflict { wanted, range, name, busy }
}

fn place(level: &mut Vec<Node>, node: Node) {
    let at = level.partition_point(|other| other.resource.range.start < node.resource.range.start);
    level.insert(at, node);
}

impl fmt::Display for ResourceTree {
    /// As `/proc/iomem` shows it: addresses in bytes, the last one inside, two blanks for every range around.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, Resource { range, name, .. }) in self.iter() {
            let (first, last) = (range.start.get() << PAGE_SHIFT, (range.end().get() << PAGE_SHIFT) - 1);
            writeln!(f, "{:depth$}{first:08x}-{last:08x} : {name}", "", depth = depth * 2)?;
        }
        Ok(())
    }
}
