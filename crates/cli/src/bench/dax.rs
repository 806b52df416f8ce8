//! Rows about devices that are mapped: the first touch of a huge page, and copying through a mapping.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use uhmm::ByteSize;
use uhmm_addr::Geometry;
use uhmm_dax::store::{OpenError, Spec, Store};
use uhmm_dax::yardstick::{Continue, Copying, touch};
use uhmm_dax::{DaxMapping, Device, Faults};
use uhmm_sys::hugetlb::{Huge, Pool};

use super::Measure;
use super::row::{Pair, RowError, Scale, gigabytes, microseconds};

const SIZE: ByteSize = ByteSize::mib(64);
const QUICK: ByteSize = ByteSize::mib(8);

/// Fails with a word if there is not `size` in huge pages.
fn need(size: ByteSize) -> Result<(), RowError> {
    let wanted = (size.bytes() as usize).div_ceil(Huge::M2.bytes());
    let pool = Pool::read(Huge::M2).map_err(RowError::unavailable)?;
    if pool.free < wanted {
        let (page, command) = (Geometry::M2, pool.command_for(wanted));
        return Err(RowError::unavailable(OpenError::NoHugePages { wanted, free: pool.free, page, command }));
    }
    Ok(())
}

/// A device in huge pages, mapped as a whole.
fn mapped(size: ByteSize, faults: Faults) -> Result<DaxMapping, RowError> {
    let store = Arc::new(Store::memory(size, Some(Huge::M2), 0).map_err(RowError::unavailable)?);
    let id = store.create_namespace(&Spec::default()).map_err(RowError::unavailable)?;
    let device = Device::open(&store, id, faults).map_err(RowError::unavailable)?;
    device.map(0, size.bytes()).map_err(RowError::unavailable)
}

/// The thread that touches a page answers its own fault, against the same with nothing around the request.
pub(crate) fn first_touch(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    touches(name, scale, Faults::Signal, "bare SIGBUS + UFFDIO_CONTINUE of 2M", |raw| raw.run_faults())
}

/// The kernel answers, against the request that maps a page where nobody has touched it.
pub(crate) fn first_touch_kernel(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    touches(name, scale, Faults::Kernel, "UFFDIO_CONTINUE of 2M, no fault", |raw| raw.run())
}

fn touches(
    name: &'static str,
    scale: Scale,
    faults: Faults,
    limit_name: &'static str,
    limit: impl Fn(&mut Box<Continue>) -> io::Result<Duration>,
) -> Result<Measure, RowError> {
    let size = scale.pick(SIZE, QUICK);
    need(ByteSize::new(2 * size.bytes()))?;
    let mapping = mapped(size, faults)?;
    let mut raw = Continue::new(size).map_err(RowError::unavailable)?;
    let pages = (size.bytes() as usize / Huge::M2.bytes()) as u32;
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let before = mapping.faults();
        let ours = touch(&mapping);
        if faults == Faults::Signal && mapping.faults() - before != u64::from(pages) {
            return Err(RowError::WrongData { page: 0 });
        }
        mapping.forget().map_err(RowError::unavailable)?;
        let limit = limit(&mut raw).map_err(RowError::yardstick)?;
        pair.add(scale, round, ours / pages, limit / pages);
    }
    Ok(pair.measure(name, "us", microseconds, limit_name, 0.5))
}

/// A buffer is copied to a device, and to huge pages that are merely there.
pub(crate) fn copy(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(SIZE, QUICK);
    need(ByteSize::new(2 * size.bytes()))?;
    let mapping = mapped(size, Faults::Threads)?;
    let mut copying = Copying::new(size).map_err(RowError::yardstick)?;
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let limit = copying.plain();
        let ours = copying.through(&mapping).map_err(RowError::yardstick)?;
        pair.add(scale, round, ours, limit);
    }
    Ok(pair.measure(name, "GB/s", gigabytes(size), "memcpy to 2M pages", 0.95))
}
