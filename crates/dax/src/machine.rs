//! The pfns of this process's directly mapped memory.
//!
//! What     [`machine`], the registry that all devices of a process share; [`Region`], pfns for one device.
//! Why      a page's number says whose it is (rule R6) only if nobody else has the same.
//! Owns     a `Region` its claim in the resource tree, which contains those of the device's pagemap.
//! Fails    when no gap is left among 2^40 pages.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uhmm_addr::{Geometry, PageCount, PfnRange};
use uhmm_core::pagemap::Registry;
use uhmm_core::pagemap::resource::{ResourceError, ResourceId, ResourceKind};
use uhmm_core::sync::{AtomicU32, Park};
use uhmm_sys::futex;

/// Threads of this process that wait for each other.
#[derive(Debug)]
struct Futex;

impl Park for Futex {
    fn park(&self, word: &AtomicU32, expected: u32) {
        let _ = futex::wait(word, expected, Some(Duration::from_millis(20)));
    }

    fn unpark(&self, word: &AtomicU32) {
        futex::wake(word, u32::MAX);
    }
}

/// The registry of this process.
pub fn machine() -> &'static Registry {
    static MACHINE: OnceLock<Registry> = OnceLock::new();
    MACHINE.get_or_init(|| Registry::new(Arc::new(Futex)))
}

/// Pfns that belong to one device.
#[derive(Debug)]
pub(crate) struct Region {
    id: ResourceId,
    /// One for each length asked for.
    pub(crate) ranges: Vec<PfnRange>,
}

impl Region {
    /// A range of pfns for each of `lengths`, in pages; each begins at a multiple of 2 MiB and of `align`.
    pub(crate) fn request(lengths: &[u64], align: Geometry, name: &str) -> Result<Self, ResourceError> {
        let unit = align.max(Geometry::M2).pages();
        let room = |len: u64| (len as usize).next_multiple_of(unit.get());
        let total = PageCount::new(lengths.iter().map(|len| room(*len)).sum());
        let region = machine()
            .resources(|tree| tree.request_free_region(total, unit, name, ResourceKind::PersistentMemory))?;
        let mut at = region.range.start;
        let ranges = lengths.iter().map(|len| {
            let range = PfnRange::new(at, PageCount::new(*len as usize));
            at = at.forward(PageCount::new(room(*len)));
            range
        });
        Ok(Self { id: region.id, ranges: ranges.collect() })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // Refused while a pagemap still lies inside, which then keeps its pfns.
        machine().resources(|tree| _ = tree.release(self.id));
    }
}
