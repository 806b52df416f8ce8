//! Rows about mirrors: what a range of pages is, how fast a table is filled with it, what it costs to be told of
//! changes, and what it costs to keep pages where they are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uhmm::mirror::{MirrorTable, PageView, Want};
use uhmm::notifier::Event;
use uhmm::{Buffer, ByteSize, Geometry, MemDevice, PageCount, PinFor, Space, VaRange, Vpn};
use uhmm_addr::CHUNK_PAGES;
use uhmm_core::notifier::{Change, Mark, Notifiers, Subscriber, WouldBlock};
use uhmm_core::sync::Park;
use uhmm_sys::scan::{Categories, PagemapScan, Query, Region};

use super::Measure;
use super::migrate::marked;
use super::row::{Pair, RowError, Scale};

const SCAN: &str = "PAGEMAP_SCAN of the same pages in one call";

/// Seconds for so many pages as nanoseconds for one.
fn nanoseconds(pages: PageCount) -> impl Fn(f64) -> f64 {
    move |seconds| seconds * 1e9 / pages.get() as f64
}

/// A buffer whose pages are all there, of one size.
fn resident(size: ByteSize, pages: Geometry) -> Result<(Space, Buffer<u64>), RowError> {
    let huge = pages == Geometry::M2;
    let device = MemDevice::private(ByteSize::mib(4)).map_err(RowError::unavailable)?;
    let space = Space::builder().device(Arc::new(device)).huge_pages(huge);
    let space = space.build().map_err(RowError::unavailable)?;
    let buffer = marked(&space, size, pages)?;
    Ok((space, buffer))
}

/// What the kernel's own walk takes to tell as much.
fn scan(scanner: &PagemapScan, range: VaRange) -> Result<Duration, RowError> {
    const THERE: Query = Query {
        required: Categories::PRESENT,
        excluded: Categories::NONE,
        any: Categories::NONE,
        report: Categories::WRITTEN.union(Categories::ZERO).union(Categories::HUGE),
    };
    let mut found = [Region::UNUSED; 64];
    let start = Instant::now();
    let scanned = scanner.scan(range, THERE, &mut found).map_err(|why| RowError::yardstick(why.into()))?;
    let took = start.elapsed();
    let pages: usize = found[..scanned.regions].iter().map(|region| region.range.pages().get()).sum();
    if pages == range.pages().get() { Ok(took) } else { Err(RowError::WrongData { page: pages }) }
}

/// The first page that is not told to be in RAM and writable.
fn expect_there(views: &[PageView]) -> Result<(), RowError> {
    let wrong = views.iter().position(|view| !matches!(view, PageView::Ram { write: true, .. }));
    wrong.map_or(Ok(()), |page| Err(RowError::WrongData { page }))
}

/// The device's own page table: what is known of each page.
struct Table {
    first: Vpn,
    entries: Vec<PageView>,
}

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, _event: Event) {
        let at = range.first().since(self.first).get();
        self.entries[at..at + range.pages().get()].fill(PageView::Absent);
    }
}

impl Table {
    fn new(range: VaRange) -> Self {
        Self { first: range.first(), entries: vec![PageView::Absent; range.pages().get()] }
    }
}

/// A snapshot of pages that are all there.
pub(crate) fn snapshot(name: &'static str, pages: Geometry, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(ByteSize::mib(256), ByteSize::mib(8));
    let (space, buffer) = resident(size, pages)?;
    let range = buffer.range();
    let mirror = space.mirror(range, Table::new(range)).map_err(RowError::unavailable)?;
    let scanner = PagemapScan::open().map_err(RowError::yardstick)?;
    let mut views = vec![PageView::Absent; range.pages().get()];
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        views.fill(PageView::Absent);
        let start = Instant::now();
        mirror.snapshot(range, &mut views).map_err(RowError::unavailable)?;
        let took = start.elapsed();
        expect_there(&views)?;
        pair.add(scale, round, took, scan(&scanner, range)?);
    }
    Ok(pair.measure(name, "ns", nanoseconds(range.pages()), SCAN, 0.80))
}

/// A table is filled with pages that are all there.
pub(crate) fn populate(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(ByteSize::gib(1), ByteSize::mib(8));
    let (space, buffer) = resident(size, Geometry::K4)?;
    let range = buffer.range();
    let mirror = space.mirror(range, Table::new(range)).map_err(RowError::unavailable)?;
    let scanner = PagemapScan::open().map_err(RowError::yardstick)?;
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let start = Instant::now();
        let populated = mirror.populate(range, Want::Write, |table, pages| {
            let at = pages.range().first().since(table.first).get();
            table.entries[at..at + pages.views().len()].copy_from_slice(pages.views());
        });
        let took = start.elapsed();
        populated.map_err(RowError::unavailable)?;
        mirror.look(|table| expect_there(&table.entries))?;
        pair.add(scale, round, took, scan(&scanner, range)?);
    }
    Ok(pair.measure(name, "ns", nanoseconds(range.pages()), SCAN, 0.80))
}

/// Pages are pinned and let go, a chunk at a time.
pub(crate) fn pin(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(ByteSize::mib(64), ByteSize::mib(8));
    let (space, buffer) = resident(size, Geometry::K4)?;
    let range = buffer.range();
    let counts: Vec<AtomicU64> = (0..range.pages().get()).map(|_| AtomicU64::new(0)).collect();
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let start = Instant::now();
        for chunk in range.chunks() {
            drop(space.pin(chunk, PinFor::Write).map_err(RowError::unavailable)?);
        }
        let took = start.elapsed();
        if !space.pins().is_empty() {
            return Err(RowError::WrongData { page: 0 });
        }
        let start = Instant::now();
        for chunk in counts.chunks(CHUNK_PAGES) {
            chunk.iter().for_each(|count| _ = count.fetch_add(1, Ordering::AcqRel));
            chunk.iter().for_each(|count| _ = count.fetch_sub(1, Ordering::AcqRel));
        }
        pair.add(scale, round, took, start.elapsed());
    }
    Ok(pair.measure(name, "ns", nanoseconds(range.pages()), "two atomic additions a page", 0.50))
}

/// Nobody waits for anybody here.
pub(crate) struct Alone;

impl Park for Alone {
    fn park(&self, _word: &AtomicU32, _expected: u32) {
        std::thread::yield_now();
    }

    fn unpark(&self, _word: &AtomicU32) {}
}

/// Must not be told of anything.
struct Elsewhere(AtomicU64);

impl Subscriber for Elsewhere {
    fn invalidate(&self, _change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        self.0.fetch_add(1, Ordering::Relaxed);
        mark.set();
        Ok(())
    }
}

/// A change is begun and ended, about which none of many subscribers is told.
pub(crate) fn bracket(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let (subscriptions, times) = (10_000, scale.pick(20_000, 500));
    let (notifiers, told) = (Notifiers::new(), Arc::new(Elsewhere(AtomicU64::new(0))));
    let page = |n: usize| VaRange::page(Vpn::new(0x10_0000 + n));
    // Every other page, so that changes fall in between.
    let subscribed: Vec<_> =
        (0..subscriptions).map(|n| notifiers.subscribe(&Alone, page(2 * n), told.clone())).collect();
    let lock = std::sync::Mutex::new(0_u64);
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let start = Instant::now();
        for n in 0..times {
            let between = page(2 * (n * 7919 % subscriptions) + 1);
            let begun = notifiers.begin(&Alone, &Change::new(between, Event::Migrate));
            drop(begun.map_err(RowError::unavailable)?);
        }
        let took = start.elapsed();
        let start = Instant::now();
        for _ in 0..2 * times {
            *std::hint::black_box(&lock).lock().unwrap_or_else(std::sync::PoisonError::into_inner) += 1;
        }
        pair.add(scale, round, took, start.elapsed());
    }
    drop(subscribed);
    if told.0.load(Ordering::Relaxed) > 0 {
        return Err(RowError::WrongData { page: 0 });
    }
    let one = nanoseconds(PageCount::new(times));
    Ok(pair.measure(name, "ns", one, "a mutex locked twice", 0.05))
}
