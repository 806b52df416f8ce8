//! Rows about mirrors: what a range of pages is, how fast a table is filled with it, what it costs to be told of
//! changes, and what it costs to keep pages where they are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uhmm::mirror::{MirrorTable, PageView, Pages, Segment, Want};
use uhmm::notifier::Event;
use uhmm::yardstick::make_own;
use uhmm::{Buffer, ByteSize, Engine, Geometry, MemDevice, PageCount, PinFor, Space, VaRange, Vpn};
use uhmm_addr::CHUNK_PAGES;
use uhmm_core::host::Rights;
use uhmm_core::notifier::{Change, Mark, Notifiers, Subscriber, WouldBlock};
use uhmm_core::sync::Park;
use uhmm_sys::rights::MappingRights;
use uhmm_sys::scan::{Categories, PagemapScan, Query, Region};

use super::Measure;
use super::migrate::marked;
use super::row::{Pair, RowError, Scale};

/// By then whatever was under way is over.
const SETTLED: Duration = Duration::from_secs(1);
const SCAN: &str = "one PAGEMAP_SCAN of the same pages, for what is unusual";
const ASK: &str = "one PROCMAP_QUERY, one PAGEMAP_SCAN of the same pages";

const NO_RIGHTS: Rights =
    Rights { range: VaRange::page(Vpn::new(0)), read: false, write: false, shared: false, file: false };

/// Seconds for so many pages as nanoseconds for one.
fn nanoseconds(pages: PageCount) -> impl Fn(f64) -> f64 {
    move |seconds| seconds * 1e9 / pages.get() as f64
}

/// A buffer whose pages are all there, of one size, in a space that hears what the program does to them.
fn resident(size: ByteSize, pages: Geometry) -> Result<(Space, Buffer<u64>), RowError> {
    let huge = pages == Geometry::M2;
    let device = MemDevice::private(ByteSize::mib(4)).map_err(RowError::unavailable)?;
    let space = Space::builder().device(Arc::new(device)).huge_pages(huge).engine(Engine::Threads);
    let space = space.build().map_err(RowError::unavailable)?;
    let buffer = marked(&space, size, pages)?;
    // A thread goes on as soon as its page is there, a moment before that is known of it.
    let (range, start) = (buffer.range(), Instant::now());
    loop {
        let mut there = PageCount::ZERO;
        let count = |segment: Segment| {
            if is_there(&segment, pages) {
                there = there.plus(segment.range().pages());
            }
        };
        space.segments(range, None, count).map_err(RowError::unavailable)?;
        if there == range.pages() {
            return Ok((space, buffer));
        }
        if start.elapsed() > SETTLED {
            return Err(RowError::WrongData { page: there.get() });
        }
        std::thread::yield_now();
    }
}

/// What the kernel's own walk takes to tell that all pages are there, may be written, and are of that size: it is
/// fastest where it is asked for those that are not.
fn scan(scanner: &PagemapScan, range: VaRange, pages: Geometry) -> Result<Duration, RowError> {
    let there = Categories::PRESENT.union(Categories::WRITTEN);
    let (any, lacking) = match pages {
        Geometry::K4 => (Categories::ZERO.union(Categories::HUGE), there),
        _ => (Categories::ZERO, there.union(Categories::HUGE)),
    };
    let others = Query { any, lacking, report: any.union(lacking), ..Query::default() };
    let mut found = [Region::UNUSED; 64];
    let start = Instant::now();
    let scanned = scanner.scan(range, others, &mut found).map_err(|why| RowError::yardstick(why.into()))?;
    let took = start.elapsed();
    match found[..scanned.regions].first() {
        None => Ok(took),
        Some(other) => Err(RowError::WrongData { page: other.range.first().since(range.first()).get() }),
    }
}

/// What the system's own calls take to tell that all pages are there, whether they may be written, and of what size they are,
/// to somebody who knows nothing of them: what may be done with the mapping, and one walk, for whatever is not an ordinary
/// small page.
fn ask(
    rights: &MappingRights,
    scanner: &PagemapScan,
    range: VaRange,
    pages: Geometry,
) -> Result<Duration, RowError> {
    let there = Categories::PRESENT.union(Categories::WRITTEN);
    let any = Categories::ZERO.union(Categories::HUGE);
    let unusual = Query { any, lacking: there, report: any.union(there), ..Query::default() };
    let (mut found, mut mapped) = ([Region::UNUSED; 64], [NO_RIGHTS; 16]);
    let start = Instant::now();
    let (count, _) = rights.list(range, &mut mapped).map_err(RowError::yardstick)?;
    let scanned = scanner.scan(range, unusual, &mut found).map_err(|why| RowError::yardstick(why.into()))?;
    let took = start.elapsed();
    let writable = count == 1 && mapped[0].write && mapped[0].range == range;
    let huge = there.union(Categories::HUGE);
    let right = match (&found[..scanned.regions], pages) {
        ([], Geometry::K4) => true,
        ([region], Geometry::M2) => region.range == range && region.categories == huge,
        _ => false,
    };
    if writable && right { Ok(took) } else { Err(RowError::WrongData { page: 0 }) }
}

/// Whether a segment is told to be in RAM, writable, and of pages of that size.
fn is_there(segment: &Segment, pages: Geometry) -> bool {
    segment.view() == PageView::Ram { write: true, order: pages }
}

/// A device's own page table, as devices have them: a word for each page, with its address and what is permitted.
struct Table {
    first: Vpn,
    entries: Vec<u64>,
}

const READ: u64 = 1;
const WRITE: u64 = 2;

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, _event: Event) {
        self.entries_of(range).fill(0);
    }
}

impl Table {
    fn new(range: VaRange) -> Self {
        Self { first: range.first(), entries: vec![0; range.pages().get()] }
    }

    fn entries_of(&mut self, range: VaRange) -> &mut [u64] {
        let at = range.first().since(self.first).get();
        &mut self.entries[at..at + range.pages().get()]
    }

    fn install(&mut self, pages: Pages<'_>) {
        for segment in pages.segments() {
            let entries = self.entries_of(segment.range());
            let PageView::Ram { write, .. } = segment.view() else {
                entries.fill(0);
                continue;
            };
            let access = if write { READ | WRITE } else { READ };
            for (entry, page) in entries.iter_mut().zip(segment.range().iter()) {
                *entry = page.base().get() as u64 | access;
            }
        }
    }

    /// Whether every page is there and may be written.
    fn check(&self) -> Result<(), RowError> {
        let expected = |page: usize| ((self.first.get() + page) as u64 * 4096) | READ | WRITE;
        let wrong = (0..self.entries.len()).find(|page| self.entries[*page] != expected(*page));
        wrong.map_or(Ok(()), |page| Err(RowError::WrongData { page }))
    }
}

/// What a mirror knows when it is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// Nothing: it was just made.
    First,
    /// What it found before, as it was told of no change since.
    Again,
}

fn limit(
    look: Look,
    rights: &MappingRights,
    scanner: &PagemapScan,
    range: VaRange,
    pages: Geometry,
) -> Result<Duration, RowError> {
    match look {
        Look::First => ask(rights, scanner, range, pages),
        Look::Again => scan(scanner, range, pages),
    }
}

const fn limit_name(look: Look) -> &'static str {
    match look {
        Look::First => ASK,
        Look::Again => SCAN,
    }
}

/// A snapshot of pages that are all there.
pub(crate) fn snapshot(
    name: &'static str,
    pages: Geometry,
    look: Look,
    scale: Scale,
) -> Result<Measure, RowError> {
    let size = scale.pick(ByteSize::mib(256), ByteSize::mib(8));
    let (space, buffer) = resident(size, pages)?;
    let range = buffer.range();
    let new = || space.mirror(range, Table::new(range)).map_err(RowError::unavailable);
    let mut mirror = new()?;
    let scanner = PagemapScan::open().map_err(RowError::yardstick)?;
    let rights = MappingRights::open().map_err(RowError::yardstick)?;
    let most = if pages == Geometry::K4 { 5.0 } else { 0.05 };
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        if look == Look::First {
            mirror = new()?;
        }
        let mut there = PageCount::ZERO;
        let start = Instant::now();
        let looked = mirror.segments(range, |segment| {
            if is_there(&segment, pages) {
                there = there.plus(segment.range().pages());
            }
        });
        let took = start.elapsed();
        looked.map_err(RowError::unavailable)?;
        if there != range.pages() {
            return Err(RowError::WrongData { page: there.get() });
        }
        pair.add(scale, round, took, limit(look, &rights, &scanner, range, pages)?);
    }
    Ok(pair.measure(name, "ns", nanoseconds(range.pages()), limit_name(look), 0.80).at_most(most))
}

/// A table is filled with pages that are all there.
pub(crate) fn populate(name: &'static str, look: Look, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(ByteSize::gib(1), ByteSize::mib(8));
    let (space, buffer) = resident(size, Geometry::K4)?;
    let range = buffer.range();
    let new = || space.mirror(range, Table::new(range)).map_err(RowError::unavailable);
    let mut mirror = new()?;
    let scanner = PagemapScan::open().map_err(RowError::yardstick)?;
    let rights = MappingRights::open().map_err(RowError::yardstick)?;
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        if look == Look::First {
            mirror = new()?;
        }
        let start = Instant::now();
        let populated = mirror.populate(range, Want::Write, Table::install);
        let took = start.elapsed();
        populated.map_err(RowError::unavailable)?;
        mirror.look(Table::check)?;
        pair.add(scale, round, took, limit(look, &rights, &scanner, range, Geometry::K4)?);
    }
    // 2 ms for a gibibyte.
    let most = 2e6 / ByteSize::gib(1).pages().get() as f64;
    Ok(pair.measure(name, "ns", nanoseconds(range.pages()), limit_name(look), 0.80).at_most(most))
}

/// Pins the pages of `range` and lets them go, a chunk at a time.
fn pin_all(space: &Space, range: VaRange) -> Result<Duration, RowError> {
    let start = Instant::now();
    for chunk in range.chunks() {
        drop(space.pin(chunk, PinFor::Write).map_err(RowError::unavailable)?);
    }
    let took = start.elapsed();
    if space.pins().is_empty() { Ok(took) } else { Err(RowError::WrongData { page: 0 }) }
}

/// Pages are pinned again and let go, beside what it takes at least to count pages of 4 KiB one by one.
pub(crate) fn pin(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let (space, buffer) = resident(scale.pick(ByteSize::mib(64), ByteSize::mib(8)), Geometry::K4)?;
    let range = buffer.range();
    let counts: Vec<AtomicU64> = (0..range.pages().get()).map(|_| AtomicU64::new(0)).collect();
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let took = pin_all(&space, range)?;
        let start = Instant::now();
        for chunk in counts.chunks(CHUNK_PAGES) {
            chunk.iter().for_each(|count| _ = count.fetch_add(1, Ordering::AcqRel));
            chunk.iter().for_each(|count| _ = count.fetch_sub(1, Ordering::AcqRel));
        }
        pair.add(scale, round, took, start.elapsed());
    }
    Ok(pair.measure(name, "ns", nanoseconds(range.pages()), "two atomic additions a page", 10.0))
}

/// Pages that were just written are pinned for the first time and let go. Counting is the least of that: each page is
/// looked at by the system, which shares it with nobody from then on.
pub(crate) fn pin_first(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(ByteSize::mib(64), ByteSize::mib(8));
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let (space, buffer) = resident(size, Geometry::K4)?;
        let took = pin_all(&space, buffer.range())?;
        drop((buffer, space));
        pair.add(scale, round, took, make_own(size).map_err(RowError::yardstick)?);
    }
    Ok(pair.measure(name, "ns", nanoseconds(size.pages()), "MADV_POPULATE_WRITE of such pages", 0.80))
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
    Ok(pair.measure(name, "ns", one, "a mutex locked twice", 0.25).at_most(200.0))
}
