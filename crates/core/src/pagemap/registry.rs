//! The pagemaps of a machine: which one a pfn belongs to, and how one comes and goes.
//!
//! What    [`Registry`]: the resource tree, the table from pfns to pagemaps, and the teardown: refuse, invalidate,
//!         drain, free (rule R4).
//! Why     a page found by its number must not be of a pagemap that is going away, and a pagemap must not go while any
//!         of its pages is referred to.
//! Owns    every pagemap that is registered, until its last page is back. One that is still in use when the registry
//!         itself is dropped stays in memory for good, because handles of its pages point to it.
//! Locks   one, for the list and the tree; callbacks and waiting happen outside. Look-ups take none.
//! Races   a look-up beside a teardown finds the pagemap or nothing, and a reference that it then asks for is there or
//!         refused. What is refused is said in the same words in which live pages are counted, so that no page becomes
//!         live behind the drain.
//! Fails   [`UnregisterError::Busy`] names who holds what; the pagemap is then as it was, but for its mappings.

#[cfg(all(test, not(loom)))]
mod tests;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem::ManuallyDrop;
use core::panic::Location;
use core::ptr::NonNull;

use uhmm_addr::{PageCount, Pfn, PfnRange};

use super::page::{PageError, PageRef};
use super::readers::{Readers, Reading};
use super::resource::{
    Conflict, Intersection, Resource, ResourceError, ResourceId, ResourceKind, ResourceTree,
};
use super::table::PfnTable;
use super::{Pagemap, PagemapBuilder, RegisterError};
use crate::device::MemoryType;
use crate::sync::Park;
use crate::sync::locked::Locked;

/// Holders that are listed at most.
const MOST_HOLDERS: usize = 64;

/// Who keeps a pagemap from going.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holder {
    /// The pages.
    pub pages: PfnRange,
    /// References to each compound page of them.
    pub references: u32,
    /// Where the handle was made; in debug builds, and for handles.
    pub place: Option<&'static Location<'static>>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, references, place } = self;
        write!(f, "{:?} and {} in all, {references} references", pages.start, pages.pages)?;
        place.map_or(Ok(()), |place| write!(f, ", held since {place}"))
    }
}

/// Why a pagemap is still there.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnregisterError {
    /// It is none of this registry's (any more).
    #[error("pagemap {0:?} is not registered")]
    NotRegistered(Box<str>),
    /// Another thread is about it.
    #[error("pagemap {0:?} is being unregistered by another thread")]
    UnderWay(Box<str>),
    /// Pages did not come back in time: the pagemap can be used as before. The first holders.
    #[error("pagemap {name:?} has {live} in use; first of all {}", Holders(.holders))]
    Busy {
        /// The pagemap.
        name: Box<str>,
        /// Pages in use.
        live: PageCount,
        /// Who has them: 64 at most.
        holders: Vec<Holder>,
    },
}

struct Holders<'a>(&'a [Holder]);

impl fmt::Display for Holders<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.first() {
            Some(holder) => fmt::Display::fmt(holder, f),
            None => f.write_str("pages that have just come back"),
        }
    }
}

/// A pagemap and its claims.
struct Registered {
    map: Arc<Pagemap>,
    claims: Vec<ResourceId>,
    closing: bool,
}

#[derive(Default)]
struct Inner {
    tree: ResourceTree,
    maps: Vec<Registered>,
}

/// The pagemaps of a machine.
pub struct Registry {
    table: PfnTable,
    readers: Readers,
    inner: Locked<Inner>,
    park: Arc<dyn Park>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

/// As long as it lives, what it finds stays (`rcu_read_lock`). Its thread does not block meanwhile.
#[must_use]
pub struct Reader<'r> {
    registry: &'r Registry,
    _reading: Reading<'r>,
}

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Reader<'_> {
    /// The pagemap to which `pfn` belongs: a look at a table.
    pub fn pagemap(&self, pfn: Pfn) -> Option<&Pagemap> {
        let map = self.registry.table.get(pfn)?;
        // SAFETY: the registry drops what it has taken out of the table after every reader has ended.
        let map = unsafe { map.as_ref() };
        // The last 2 MiB of a range may be of it in part.
        map.contains(pfn).then_some(map)
    }
}

impl Registry {
    /// No pagemap; `park` is how its threads wait for each other.
    pub fn new(park: Arc<dyn Park>) -> Self {
        let (table, readers) = (PfnTable::new(), Readers::default());
        Self { table, readers, inner: Locked::new(Inner::default()), park }
    }

    /// Does `work` with the resource tree, under the registry's lock.
    pub fn resources<R>(&self, work: impl FnOnce(&mut ResourceTree) -> R) -> R {
        work(&mut self.inner.lock(&*self.park).tree)
    }

    /// Registers a pagemap (`memremap_pages`): claims its ranges in the resource tree, all or none, and lets its pages
    /// be found.
    ///
    /// # Errors
    /// See [`RegisterError`]; then nothing is claimed.
    pub fn register(&self, builder: PagemapBuilder) -> Result<Arc<Pagemap>, RegisterError> {
        let mut map = Arc::new(builder.build(self.park.clone())?);
        let kind = match map.memory_type() {
            MemoryType::Private => ResourceKind::DevicePrivate,
            MemoryType::FsDax | MemoryType::Generic => ResourceKind::PersistentMemory,
            MemoryType::Coherent | MemoryType::PeerToPeer => ResourceKind::Device,
        };
        let inner = &mut *self.inner.lock(&*self.park);
        let mut claims = Vec::new();
        for range in map.ranges() {
            let claim = match inner.tree.intersects(range, ResourceKind::SystemRam) {
                Intersection::Disjoint => inner.tree.request(range, map.name(), kind),
                _ => Err(inner.system_ram(range).into()),
            };
            match claim {
                Ok(claim) => claims.push(claim),
                Err(why) => {
                    claims.into_iter().for_each(|claim| _ = inner.tree.remove(claim));
                    return Err(match why {
                        ResourceError::Conflict(conflict) => conflict.into(),
                        _ => RegisterError::NotAddressable(range),
                    });
                }
            }
        }
        if let Some(map) = Arc::get_mut(&mut map) {
            *map.registered.get_mut() = true;
        }
        for range in map.ranges() {
            self.table.set(range, NonNull::new(Arc::as_ptr(&map).cast_mut()));
        }
        inner.maps.push(Registered { map: map.clone(), claims, closing: false });
        Ok(map)
    }

    /// For look-ups, as many as one likes; costs two atomic operations that no other thread meets, as a rule.
    pub fn read(&self) -> Reader<'_> {
        Reader { registry: self, _reading: self.readers.begin() }
    }

    /// The pagemap to which `pfn` belongs, to keep (`get_dev_pagemap`).
    pub fn find(&self, pfn: Pfn) -> Option<Arc<Pagemap>> {
        let reader = self.read();
        reader.pagemap(pfn)?;
        let map = self.table.get(pfn)?.as_ptr().cast_const();
        // SAFETY: the table has what `Arc::as_ptr` gave, and the registry has that `Arc` as long as the reader lives.
        Some(unsafe {
            Arc::increment_strong_count(map);
            Arc::from_raw(map)
        })
    }

    /// A reference to the page of `pfn`, whatever pagemap that is of: see [`Pagemap::page`].
    ///
    /// # Errors
    /// See [`PageError`].
    #[track_caller]
    pub fn page(&self, pfn: Pfn) -> Result<PageRef, PageError> {
        self.read().pagemap(pfn).ok_or(PageError::Outside(pfn))?.page(pfn)
    }

    /// Unregisters a pagemap (`memunmap_pages`), in four steps. Its request queue is frozen and new references are
    /// *refused*; mappings are *invalidated*; pages that are referred to are waited for, which *drains* it; then
    /// nobody finds it any more, its claims are given up, and it is *freed* when the caller lets go of it as well.
    /// Nothing is done for pages that are free.
    ///
    /// `wait` is told how many pages are in use, waits a moment, and says whether to go on waiting: it has the clock.
    ///
    /// # Errors
    /// [`UnregisterError::Busy`] when `wait` said no: the pagemap is registered and can be used as before.
    pub fn unregister(
        &self,
        map: &Arc<Pagemap>,
        wait: &mut dyn FnMut(PageCount) -> bool,
    ) -> Result<(), UnregisterError> {
        self.begin_closing(map)?;
        if let Some(ops) = &map.ops {
            ops.freeze(map);
        }
        map.close(true);
        if let Some(ops) = &map.ops {
            ops.invalidate(map);
        }
        loop {
            let live = map.live();
            if live.is_zero() {
                break;
            }
            if !wait(live) {
                let (name, holders) = (map.name().into(), map.holders());
                map.close(false);
                if let Some(ops) = &map.ops {
                    ops.thaw(map);
                }
                self.with(map, |registered| registered.closing = false);
                return Err(UnregisterError::Busy { name, live, holders });
            }
        }
        map.assert_drained();
        self.free(map);
        if let Some(ops) = &map.ops {
            ops.released();
        }
        Ok(())
    }

    /// Nobody finds `map` any more, nor is anybody still looking at it, and its claims are given up.
    fn free(&self, map: &Arc<Pagemap>) {
        self.with(map, |_| map.ranges().for_each(|range| self.table.set(range, None)));
        self.readers.synchronize(&*self.park);
        let inner = &mut *self.inner.lock(&*self.park);
        if let Some(at) = inner.maps.iter().position(|registered| Arc::ptr_eq(&registered.map, map)) {
            let gone = inner.maps.swap_remove(at);
            gone.claims.into_iter().for_each(|claim| _ = inner.tree.remove(claim));
        }
    }

    /// Does `work` under the lock, if `map` is registered.
    fn with<R>(&self, map: &Arc<Pagemap>, work: impl FnOnce(&mut Registered) -> R) -> Option<R> {
        let inner = &mut *self.inner.lock(&*self.park);
        inner.maps.iter_mut().find(|registered| Arc::ptr_eq(&registered.map, map)).map(work)
    }

    fn begin_closing(&self, map: &Arc<Pagemap>) -> Result<(), UnregisterError> {
        match self.with(map, |registered| core::mem::replace(&mut registered.closing, true)) {
            Some(false) => Ok(()),
            Some(true) => Err(UnregisterError::UnderWay(map.name().into())),
            None => Err(UnregisterError::NotRegistered(map.name().into())),
        }
    }
}

impl Inner {
    /// What ordinary memory is in the way.
    fn system_ram(&self, wanted: PfnRange) -> Conflict {
        let in_the_way = |resource: &&Resource| {
            resource.kind == ResourceKind::SystemRam && resource.range.overlaps(wanted)
        };
        let found = self.tree.iter().map(|(_, resource)| resource).find(in_the_way);
        let (range, name) =
            found.map_or((wanted, "System RAM".into()), |found| (found.range, found.name.clone()));
        Conflict { wanted, range, name, busy: true }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Handles of pages have no lifetime: what they point to stays.
        for registered in self.inner.get_mut().maps.drain(..) {
            let registered = ManuallyDrop::new(registered.map);
            registered.close(true);
            if registered.live().is_zero() {
                drop(ManuallyDrop::into_inner(registered));
            }
        }
    }
}

impl Pagemap {
    /// Who has pages of it, in debug builds with the place where each handle was made.
    pub fn holders(&self) -> Vec<Holder> {
        let order = self.geometry().order();
        let mut holders: Vec<Holder> = Vec::new();
        for (pages, place) in self.ledger.lines(&*self.park).into_iter().take(MOST_HOLDERS) {
            let references = self.count(pages.start);
            holders.push(Holder { pages, references, place: Some(place) });
        }
        let named = holders.len();
        for (unit, references) in self.descriptors.in_use(0, self.ranges.units()) {
            let pages = self.ranges.pfns(unit, 1);
            if holders[..named].iter().any(|holder| holder.pages.encloses(pages)) {
                continue;
            }
            let room = holders.len() < MOST_HOLDERS;
            match holders[named..].last_mut() {
                Some(last) if last.pages.end() == pages.start && last.references == references => {
                    last.pages.pages = last.pages.pages.plus(PageCount::new(1 << order));
                }
                _ if room => holders.push(Holder { pages, references, place: None }),
                _ => break,
            }
        }
        holders
    }

    /// That what is counted agrees: nothing was referred to that is no head.
    fn assert_drained(&self) {
        debug_assert!(self.descriptors.in_use(0, self.ranges.units()).next().is_none(), "{self:?} is in use");
        debug_assert!(self.ledger.lines(&*self.park).is_empty(), "handles of {self:?} are left");
    }
}
