//! Pagemaps that come and go beside threads that use their pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange};
use uhmm_core::device::MemoryType;
use uhmm_core::migrate::Select;
use uhmm_core::mirror::{PageView, Request, Want};
use uhmm_core::pagemap::{
    PageError, Pagemap, PagemapOps, RegisterError, Registry, UnregisterError, release_pages,
};
use uhmm_core::sync::{AtomicU32, Park};
use uhmm_testdev::sim_host::{Attempts, Bed, Program, Setup, page_at, pages_at};

struct Nap;

impl Park for Nap {
    fn park(&self, _word: &AtomicU32, _expected: u32) {
        thread::yield_now();
    }

    fn unpark(&self, _word: &AtomicU32) {}
}

/// Numbers that depend on each other in no way that matters.
fn next(seed: &mut u64) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as usize
}

/// That nobody uses pages of a pagemap that is gone, nor one page for two things.
#[derive(Default)]
struct Life {
    gone: AtomicBool,
    freed: AtomicUsize,
}

impl PagemapOps for Life {
    fn page_free(&self, map: &Pagemap, pages: PfnRange) {
        assert!(!self.gone.load(Ordering::SeqCst), "a page of a pagemap that is gone");
        assert_eq!(map.count(pages.start), 0);
        self.freed.fetch_add(1, Ordering::Relaxed);
    }

    fn released(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }
}

const ROUNDS: usize = if cfg!(debug_assertions) { 60 } else { 1_500 };

/// Registers and unregisters a pagemap again and again. Returns how many pages were freed.
fn come_and_go(registry: &Registry, range: PfnRange) -> usize {
    let mut freed = 0;
    for round in 0..ROUNDS {
        let geometry = if round % 2 == 0 { Geometry::M2 } else { Geometry::K4 };
        let life = Arc::new(Life::default());
        let builder = Pagemap::builder("dax0.0", MemoryType::FsDax).geometry(geometry).range(range);
        let map = registry.register(builder.ops(life.clone())).unwrap();
        for n in 0..20 {
            if let Ok(alone) = map.claim(PfnRange::new(range.start, geometry.pages())) {
                assert_eq!(map.count(range.start), 1, "round {round}, {n}");
                drop(alone);
            }
            thread::yield_now();
        }
        let gone = registry.unregister(&map, &mut |_| {
            thread::yield_now();
            true
        });
        gone.unwrap();
        assert!(life.gone.load(Ordering::SeqCst));
        freed += life.freed.load(Ordering::Relaxed);
    }
    freed
}

#[test]
fn look_ups_and_pins_race_the_teardown() {
    let registry = Arc::new(Registry::new(Arc::new(Nap)));
    let stop = Arc::new(AtomicBool::new(false));
    let range = PfnRange::new(Pfn::new(CHUNK_PAGES as u64), PageCount::new(8 * CHUNK_PAGES));
    let other = PfnRange::new(range.end(), range.pages);
    let users: Vec<_> = (0..3)
        .map(|user| {
            let (registry, stop) = (registry.clone(), stop.clone());
            thread::spawn(move || {
                let (mut seed, mut had) = (user, 0_usize);
                let mut kept = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let pfn = range.start.forward(PageCount::new(next(&mut seed) % (2 * range.pages.get())));
                    match registry.page(pfn) {
                        Ok(page) => {
                            had += 1;
                            assert!(page.pages().contains(pfn) && page.count() > 0);
                            kept.push(page.clone());
                            let pinned = page.pagemap().pin(PfnRange::new(pfn, PageCount::ONE));
                            drop((page, pinned));
                        }
                        Err(PageError::Dying(_) | PageError::Outside(_) | PageError::Claimed(_)) => {
                            release_pages(kept.drain(..));
                        }
                        Err(why) => panic!("{why}"),
                    }
                    if kept.len() > 16 {
                        release_pages(kept.drain(..));
                    }
                }
                had
            })
        })
        .collect();
    // Two pagemaps come and go beside each other.
    let owners: Vec<_> = [range, other]
        .map(|range| {
            let registry = registry.clone();
            thread::spawn(move || come_and_go(&registry, range))
        })
        .into();
    let freed: usize = owners.into_iter().map(|owner| owner.join().unwrap()).sum();
    stop.store(true, Ordering::Relaxed);
    let had: usize = users.into_iter().map(|user| user.join().unwrap()).sum();
    assert!(had > 0 && freed > 0, "{had} pages were had and {freed} freed");
}

#[test]
fn pages_are_given_to_one_at_a_time() {
    let registry = Registry::new(Arc::new(Nap));
    let range = PfnRange::new(Pfn::new(0), PageCount::new(64));
    let map = registry.register(Pagemap::builder("pmem0", MemoryType::FsDax).range(range)).unwrap();
    let owners: Vec<_> = (0..64).map(|_| AtomicU64::new(0)).collect();
    let rounds = if cfg!(debug_assertions) { 20_000 } else { 1_000_000 };
    thread::scope(|scope| {
        for me in 1..=3_u64 {
            let (map, owners) = (&map, &owners);
            scope.spawn(move || {
                let mut seed = me;
                for _ in 0..rounds {
                    let (first, len) = (next(&mut seed) % 60, 1 + next(&mut seed) % 4);
                    let pages = PfnRange::new(Pfn::new(first as u64), PageCount::new(len));
                    if next(&mut seed).is_multiple_of(2) {
                        // A truncation: what is claimed is nobody else's.
                        let Ok(alone) = map.claim(pages) else { continue };
                        for owner in &owners[first..first + len] {
                            assert_eq!(owner.swap(me, Ordering::Relaxed), 0, "claimed twice");
                        }
                        owners[first..first + len].iter().for_each(|owner| owner.store(0, Ordering::Relaxed));
                        drop(alone);
                    } else if let Ok(pinned) = map.pin(pages) {
                        for owner in &owners[first..first + len] {
                            assert_eq!(owner.load(Ordering::Relaxed), 0, "pinned while claimed");
                        }
                        drop(pinned);
                    }
                }
            });
        }
    });
    assert!(map.live().is_zero());
    registry.unregister(&map, &mut |_| false).unwrap();
}

/// A space's device goes away while its program runs, migrates and is looked at: every page comes home first.
#[test]
fn a_device_goes_away_beside_faults_migrations_and_range_faults() {
    for can_move in [true, false] {
        let bed = Bed::new(Setup { can_move, window: (4, 16), track: true, ..Setup::default() });
        bed.fill(0, 200);
        let stop = AtomicBool::new(false);
        let (seen, moved) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            let looker = scope.spawn(|| {
                let (program, mut views) = (Program::new(bed.mm.clone()), vec![PageView::Absent; 64]);
                let range = pages_at(0, 64);
                while !stop.load(Ordering::Relaxed) {
                    let own = Request::all(Want::Read).owning(&bed.pagemap);
                    let patience = &mut Attempts::new(&bed.mm, 100);
                    let looked = program.with_scratch(|scratch| {
                        bed.mm.range_fault(range, &own, &mut views, scratch, patience)
                    });
                    // Its own pages are reported where they are; what went meanwhile is looked at again.
                    if looked.is_ok() {
                        assert!(views.iter().all(|view| view.is_valid()), "{views:?}");
                        seen.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            let toucher = scope.spawn(|| {
                let (program, mut seed) = (Program::new(bed.mm.clone()), 5);
                while !stop.load(Ordering::Relaxed) {
                    let n = next(&mut seed) % 200;
                    assert_eq!(program.load(page_at(n)), Ok(100 + n as u64));
                }
            });
            let migrator = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let done = bed.mm.migrate(pages_at(0, 200), bed.mm.epoch(), &bed.pagemap, Select::All);
                    moved.fetch_add(done.moved.get() as usize, Ordering::Relaxed);
                }
            });
            // The device goes away in the middle of both, however late their threads began.
            while seen.load(Ordering::Relaxed) < 10 || moved.load(Ordering::Relaxed) < 1000 {
                // One that failed ends the others; its join says why.
                if looker.is_finished() || toucher.is_finished() || migrator.is_finished() {
                    break;
                }
                thread::yield_now();
            }
            let mut rounds = 0;
            let gone = bed.registry.unregister(&bed.pagemap, &mut |_| {
                let _ = bed.evict(None);
                rounds += 1;
                rounds < 10_000
            });
            stop.store(true, Ordering::Relaxed);
            looker.join().unwrap();
            toucher.join().unwrap();
            migrator.join().unwrap();
            gone.unwrap();
        });
        assert!(bed.pagemap.live().is_zero());
        assert_eq!(bed.migrate(0, 8).moved, PageCount::ZERO, "nothing is given out any more");
        assert!(bed.registry.find(bed.pagemap.range().start).is_none());
        bed.check(0, 200);
        bed.check_nothing_leaked();
    }
}

#[test]
fn a_space_that_keeps_pages_on_a_device_is_named() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    let first = bed.word(0).pfn().unwrap();
    let busy = bed.registry.unregister(&bed.pagemap, &mut |_| false).unwrap_err();
    let UnregisterError::Busy { live, holders, .. } = &busy else { panic!("{busy}") };
    assert_eq!((live.get(), holders.len()), (8, 1), "{busy}");
    assert_eq!((holders[0].pages, holders[0].references), (PfnRange::new(first, PageCount::new(8)), 1));
    // The device can be used as before.
    bed.check(0, 4);
    bed.fill(8, 4);
    assert_eq!(bed.migrate(8, 4).moved.get(), 4);
    bed.check(0, 12);
    let again =
        Pagemap::builder("again", MemoryType::Private).range(bed.other_map.range()).device(bed.other.clone());
    let taken = bed.registry.register(again).unwrap_err();
    assert!(
        matches!(&taken, RegisterError::Conflict(with) if with.range == bed.other_map.range()),
        "{taken}"
    );
    bed.registry.unregister(&bed.other_map, &mut |_| false).unwrap();
    bed.check_nothing_leaked();
}
