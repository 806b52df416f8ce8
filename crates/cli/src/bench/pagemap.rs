//! Rows about pagemaps: how long it takes to register one and to let it go, what its descriptors weigh, and what a
//! reference to a page costs.

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use uhmm::{ByteSize, Geometry, MemoryType, PageCount, Pfn};
use uhmm_addr::{CHUNK_PAGES, PAGE_SIZE, PfnRange};
use uhmm_core::pagemap::{PageRef, Pagemap, PagemapBuilder, Registry};

use super::Measure;
use super::mirror::Alone;
use super::row::{Pair, RowError, Scale};

/// The size of the modules in the series that made compound pagemaps.
const NVDIMM: ByteSize = ByteSize::gib(128);

fn range(size: ByteSize) -> PfnRange {
    PfnRange::new(Pfn::new(Geometry::G1.pages().get() as u64), size.pages())
}

fn builder(size: ByteSize, geometry: Geometry) -> PagemapBuilder {
    Pagemap::builder("bench", MemoryType::Generic).geometry(geometry).range(range(size))
}

fn registered(size: ByteSize, geometry: Geometry) -> Result<(Registry, Arc<Pagemap>), RowError> {
    let registry = Registry::new(Arc::new(Alone));
    let map = registry.register(builder(size, geometry)).map_err(RowError::unavailable)?;
    Ok((registry, map))
}

/// The page at which unit `n` of this geometry begins.
fn head(map: &Pagemap, n: usize) -> Pfn {
    map.range().start.forward(PageCount::new(n << map.geometry().order()))
}

/// 128 GiB are registered; against a millisecond, which the series took with the largest pages only.
pub(crate) fn register(name: &'static str, geometry: Geometry, scale: Scale) -> Result<Measure, RowError> {
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let registry = Registry::new(Arc::new(Alone));
        let start = Instant::now();
        let map = registry.register(builder(NVDIMM, geometry)).map_err(RowError::unavailable)?;
        let took = start.elapsed();
        let last = head(&map, 0).forward(PageCount::new(NVDIMM.pages().get() - 1));
        if map.page(last).map_err(RowError::unavailable)?.count() != 1 {
            return Err(RowError::WrongData { page: NVDIMM.pages().get() - 1 });
        }
        pair.add(scale, round, took, Duration::from_millis(1));
    }
    Ok(pair.measure(name, "ms", |seconds| seconds * 1e3, "1 ms, the goal, of 128 GiB", 1.0))
}

/// Memory that this process has in RAM.
fn resident() -> io::Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.map(|pages| pages * PAGE_SIZE as u64).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// What 1 TiB of pages weighs, all of them in use.
pub(crate) fn weight(
    name: &'static str,
    geometry: Geometry,
    allowed: ByteSize,
    scale: Scale,
) -> Result<Measure, RowError> {
    let size = ByteSize::gib(1024);
    let (_registry, map) = registered(size, geometry)?;
    let units = size.pages().get() >> geometry.order();
    // In the quick run some of them stand for all.
    let used = units / scale.pick(1, 16).min(units);
    let before = resident().map_err(RowError::yardstick)?;
    let pages = PfnRange::new(map.range().start, PageCount::new(used << geometry.order()));
    let mapped = map.pin(pages).map_err(RowError::unavailable)?;
    for word in (0..used).filter_map(|n| map.page_data(head(&map, n))) {
        word.store(1, Ordering::Relaxed);
    }
    let after = resident().map_err(RowError::yardstick)?;
    if map.live().get() != used << geometry.order() {
        return Err(RowError::WrongData { page: map.live().get() });
    }
    // What came into being is counted in pages of the process; small tables lie in pages that are there already.
    let grown = after.saturating_sub(before) * (units / used) as u64;
    let value = grown.max(map.descriptor_bytes() as u64) as f64;
    drop(mapped);
    let limit = allowed.bytes() as f64;
    let ratio = limit / value;
    let kib = |bytes: f64| bytes / 1024.0;
    Ok(Measure {
        name,
        value: kib(value),
        unit: "KiB",
        limit: kib(limit),
        limit_name: "the goal, for 1 TiB in use",
        ratio,
        goal: 1.0,
        most: None,
        met: ratio >= 1.0,
    })
}

/// Nanoseconds of one of so many.
fn nanoseconds(times: usize) -> impl Fn(f64) -> f64 {
    move |seconds| seconds * 1e9 / times as f64
}

/// Gets and puts a page that is in use, so many times.
fn get_put(page: &PageRef, times: usize) -> Duration {
    let start = Instant::now();
    for _ in 0..times {
        drop(black_box(black_box(page).clone()));
    }
    start.elapsed()
}

/// Two atomic additions, as many times.
fn additions(times: usize) -> Duration {
    let count = AtomicU32::new(1);
    let start = Instant::now();
    for _ in 0..times {
        black_box(&count).fetch_add(1, Ordering::Relaxed);
        black_box(&count).fetch_sub(1, Ordering::Release);
    }
    start.elapsed()
}

/// A reference to a page in use comes and goes.
pub(crate) fn get_and_put(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let times = scale.pick(5_000_000, 10_000);
    let (_registry, map) = registered(NVDIMM, Geometry::M2)?;
    let page = map.page(head(&map, 7)).map_err(RowError::unavailable)?;
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let took = get_put(&page, times);
        pair.add(scale, round, took, additions(times));
    }
    if page.count() != 1 {
        return Err(RowError::WrongData { page: 7 });
    }
    Ok(pair.measure(name, "ns", nanoseconds(times), "two atomic additions", 0.50))
}

/// Runs both at once. What two threads would take that were both as fast as these are on the average.
fn both(work: impl Fn(usize) -> Duration + Sync) -> Duration {
    let ready = std::sync::Barrier::new(2);
    let run = |n| {
        ready.wait();
        work(n).as_secs_f64()
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        let mine = run(0);
        let theirs = other.join().unwrap_or(f64::INFINITY);
        Duration::from_secs_f64(2.0 / (1.0 / mine + 1.0 / theirs))
    })
}

/// Two threads get and put pages side by side. The ratio is that of what both do to what one does: 2 is the most.
pub(crate) fn two_threads(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let times = scale.pick(5_000_000, 10_000);
    let (_registry, map) = registered(NVDIMM, Geometry::M2)?;
    let page = |n| map.page(head(&map, n)).map_err(RowError::unavailable);
    let pages = [page(7)?, page(8)?];
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let together = both(|n| get_put(&pages[n], times));
        // What one thread takes for as much as both did.
        let alone = get_put(&pages[0], times) + get_put(&pages[1], times);
        pair.add(scale, round, together, alone);
    }
    if pages.iter().any(|page| page.count() != 1) {
        return Err(RowError::WrongData { page: 7 });
    }
    Ok(pair.measure(name, "ns", nanoseconds(2 * times), "one thread", 1.80))
}

/// 512 pages of a 2M page are pinned and let go: two atomic operations, whatever lies around them.
pub(crate) fn pin(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let times = scale.pick(1_000_000, 10_000);
    let (_registry, map) = registered(NVDIMM, Geometry::M2)?;
    let mapped = map.page(head(&map, 7)).map_err(RowError::unavailable)?;
    let pages = PfnRange::new(head(&map, 7), PageCount::new(CHUNK_PAGES));
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let start = Instant::now();
        for _ in 0..times {
            drop(black_box(black_box(&map).pin(black_box(pages)).map_err(RowError::unavailable)?));
        }
        let took = start.elapsed();
        pair.add(scale, round, took, additions(times));
    }
    if mapped.count() != 1 {
        return Err(RowError::WrongData { page: 7 });
    }
    Ok(pair.measure(name, "ns", nanoseconds(times), "two atomic additions", 0.50))
}

/// 128 GiB of small pages are unregistered, of which a thousand come back late, against what it takes to put these
/// thousand: nothing is done for the others.
pub(crate) fn unregister(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    const LATE: usize = 1_000;
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let (registry, map) = registered(NVDIMM, Geometry::K4)?;
        let apart = NVDIMM.pages().get() / LATE;
        let page = |n: usize| map.page(head(&map, n * apart)).map_err(RowError::unavailable);
        let mut late = (0..LATE).map(page).collect::<Result<Vec<_>, _>>()?;
        let start = Instant::now();
        let gone = registry.unregister(&map, &mut |_| {
            late.clear();
            true
        });
        let took = start.elapsed();
        gone.map_err(RowError::unavailable)?;
        pair.add(scale, round, took, dropped_alone(LATE, apart)?);
    }
    Ok(pair.measure(name, "us", super::row::microseconds, "dropping those 1,000 pages", 0.50))
}

/// What it takes to drop as many pages as far apart, of a pagemap that stays.
fn dropped_alone(pages: usize, apart: usize) -> Result<Duration, RowError> {
    let (_registry, map) = registered(NVDIMM, Geometry::K4)?;
    let page = |n: usize| map.page(head(&map, n * apart)).map_err(RowError::unavailable);
    let mut held = (0..pages).map(page).collect::<Result<Vec<_>, _>>()?;
    let start = Instant::now();
    held.clear();
    Ok(start.elapsed())
}
