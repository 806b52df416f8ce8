//! Namespaces in the mode system-ram as nodes of a space, on the running kernel.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{Bed, Under, readable};
use uhmm::managed::BuildError;
use uhmm::space::{AddMemoryError, Builder, RemoveMemoryError, SpaceError};
use uhmm::{Buffer, ByteSize, Counter, Engine, Geometry, MemDevice, PageCount, PinFor, Space, VaRange};
use uhmm_dax::device::DeviceError;
use uhmm_dax::store::{Change, ChangeError, Mode};
use uhmm_dax::{Reach, SystemRam};
use uhmm_sys::hugetlb::Huge;

const WORDS: usize = 512;
const LONG: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug)]
struct Setup {
    engine: Engine,
    forced_fallback: bool,
    under: Under,
    reach: Reach,
}

/// Both engines, both ways, and what a node may lie on.
fn setups() -> Vec<Setup> {
    let mut all = Vec::new();
    for engine in [Engine::Signal, Engine::Threads] {
        for (under, reach) in [(Under::Memory, Reach::Copied), (Under::File, Reach::Copied)] {
            for forced_fallback in [false, true] {
                all.push(Setup { engine, forced_fallback, under, reach });
            }
        }
        all.push(Setup { engine, forced_fallback: false, under: Under::Memory, reach: Reach::InPlace });
    }
    all
}

impl Setup {
    fn builder(self) -> Builder {
        let device = Arc::new(MemDevice::private(ByteSize::mib(16)).unwrap());
        Space::builder().engine(self.engine).forced_fallback(self.forced_fallback).device(device)
    }

    fn bed(self, size: ByteSize) -> Bed {
        Bed::new(self.under, size, Geometry::K4, Mode::SystemRam).unwrap()
    }

    fn ram(self, bed: &Bed) -> Arc<SystemRam> {
        Arc::new(SystemRam::open(&bed.store, bed.id, self.reach).unwrap())
    }
}

/// Nothing, with a word, where userfaultfd is not to be had.
fn built(builder: Builder) -> Option<Space> {
    match builder.build() {
        Err(SpaceError::Build(BuildError::Uffd(why))) if std::env::var_os("UHMM_REQUIRE_UFFD").is_none() => {
            println!("skipped: {why}");
            None
        }
        space => Some(space.unwrap()),
    }
}

fn fill(buffer: &mut Buffer<u64>, seed: u64) {
    for (n, word) in buffer.iter_mut().enumerate().step_by(WORDS / 2) {
        *word = seed + n as u64;
    }
}

#[track_caller]
fn check(buffer: &Buffer<u64>, seed: u64) {
    for (n, word) in buffer.iter().enumerate().step_by(WORDS / 2) {
        assert_eq!(*word, seed + n as u64, "word {n}");
    }
}

fn pages(pages: usize) -> PageCount {
    PageCount::new(pages)
}

/// A part of a buffer.
fn part(buffer: &Buffer<u64>, first: usize, count: usize) -> VaRange {
    buffer.range().skip(pages(first)).unwrap().take(pages(count))
}

fn eventually(mut what: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + LONG;
    while !what() {
        assert!(std::time::Instant::now() < end, "it does not come to pass");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_namespace_of_another_mode_is_refused_with_the_command() {
    let bed = Bed::new(Under::File, ByteSize::mib(4), Geometry::K4, Mode::DevDax).unwrap();
    let error = SystemRam::open(&bed.store, bed.id, Reach::Copied).unwrap_err();
    let path = bed.store.medium().path().unwrap().display().to_string();
    let expected = format!(
        "dax0.0 is in the mode devdax, and system-ram is needed; to change it: \
         uhmm dax reconfigure {path} dax0.0 --mode system-ram"
    );
    assert_eq!(error.to_string(), expected);
    let change = Change { mode: Some(Mode::SystemRam), ..Change::default() };
    bed.store.reconfigure(bed.id, &change).unwrap();
    let ram = SystemRam::open(&bed.store, bed.id, Reach::Copied).unwrap();
    assert_eq!(ram.size(), ByteSize::mib(4));
    let told = SystemRam::open(&bed.store, bed.id, Reach::InPlace).unwrap_err();
    assert!(matches!(told, DeviceError::NotInPlace { .. }), "{told}");
    assert!(told.to_string().starts_with("dax0.0 lies on a file whose pages are copies"), "{told}");
}

#[test]
fn what_is_used_as_ram_is_not_changed_and_is_zero_afterwards() {
    for setup in setups() {
        let Some(space) = built(setup.builder()) else { return };
        let bed = setup.bed(ByteSize::mib(4));
        let node = space.add_memory(setup.ram(&bed)).unwrap();
        let mut buffer = space.map::<u64>(256 * WORDS).unwrap();
        fill(&mut buffer, 1);
        assert_eq!(space.migrate_to(buffer.range(), node).unwrap().moved, pages(256), "{setup:?}");
        let change = Change { mode: Some(Mode::DevDax), ..Change::default() };
        let refused = [bed.store.reconfigure(bed.id, &change), bed.store.destroy(bed.id)];
        for refused in refused {
            let Err(ChangeError::Busy { holders, .. }) = &refused else { panic!("{refused:?}") };
            assert!(holders.iter().any(|holder| holder.pid == std::process::id()), "{holders:?}");
        }
        space.remove_memory(node, LONG).unwrap();
        check(&buffer, 1);
        bed.store.reconfigure(bed.id, &change).unwrap();
        let device = uhmm_dax::Device::open(&bed.store, bed.id, uhmm_dax::Faults::Kernel).unwrap();
        let mut bytes = vec![1; 4 << 20];
        device.read_at(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0), "{setup:?}: what was on the node is there");
    }
}

#[test]
fn cold_pages_go_to_the_node_before_any_goes_to_the_device() {
    for setup in setups() {
        let bed = setup.bed(ByteSize::mib(4));
        let ram = setup.ram(&bed);
        let Some(space) = built(setup.builder().ram(ByteSize::mib(2))) else { return };
        let node = space.add_memory(ram).unwrap();
        let mut first = space.map::<u64>(3 * 256 * WORDS).unwrap();
        fill(&mut first, 1);
        eventually(|| space.residency(first.range()).resident <= pages(512));
        // A page is taken on the node a moment before it is said to be there.
        eventually(|| space.residency(first.range()).node >= pages(200));
        let nodes = space.nodes();
        assert_eq!((nodes.len(), nodes[0].device, nodes[0].name.as_str()), (1, node, "dax0.0"));
        assert!(nodes[0].used >= pages(200), "{setup:?}: {nodes:?}");
        assert_eq!(space.device_pages(0), Some(PageCount::ZERO), "{setup:?}: there was room on the node");
        assert!(space.residency(first.range()).node >= pages(200));
        // More than RAM and node have room for.
        let mut second = space.map::<u64>(6 * 256 * WORDS).unwrap();
        fill(&mut second, 2);
        eventually(|| !space.device_pages(0).unwrap().is_zero());
        check(&first, 1);
        check(&second, 2);
        fill(&mut first, 3);
        check(&first, 3);
        space.remove_memory(node, LONG).unwrap();
        assert_eq!((space.nodes(), space.device_pages(node)), (vec![], Some(PageCount::ZERO)));
        check(&first, 3);
        check(&second, 2);
    }
}

#[test]
fn a_node_in_place_is_loaded_from_and_stored_to_where_it_is() {
    for setup in setups().into_iter().filter(|setup| setup.reach == Reach::InPlace) {
        let bed = setup.bed(ByteSize::mib(4));
        let Some(space) = built(setup.builder()) else { return };
        let node = space.add_memory(setup.ram(&bed)).unwrap();
        let mut buffer = space.map::<u64>(256 * WORDS).unwrap();
        fill(&mut buffer, 1);
        assert_eq!(space.migrate_to(buffer.range(), node).unwrap().moved, pages(256));
        check(&buffer, 1);
        let there = space.residency(buffer.range());
        assert_eq!(
            (there.resident, there.node, there.mapped),
            (pages(0), pages(256), pages(256)),
            "{there:?}"
        );
        let faults = space.count(Counter::MovedIn);
        fill(&mut buffer, 2);
        check(&buffer, 2);
        assert_eq!(space.count(Counter::MovedIn), faults, "no page has moved");
        // Promoted, and demoted again.
        assert_eq!(space.recall(buffer.range(), node).unwrap().moved, pages(256));
        assert_eq!(space.residency(buffer.range()).resident, pages(256));
        assert_eq!(space.migrate_to(part(&buffer, 0, 8), node).unwrap().moved, pages(8));
        check(&buffer, 2);
        space.remove_memory(node, LONG).unwrap();
        assert_eq!(space.residency(buffer.range()).resident, pages(256));
        check(&buffer, 2);
    }
}

#[test]
fn a_pinned_page_keeps_the_node_and_is_named() {
    for setup in setups().into_iter().filter(|setup| setup.reach == Reach::InPlace) {
        let bed = setup.bed(ByteSize::mib(1));
        let Some(space) = built(setup.builder()) else { return };
        let node = space.add_memory(setup.ram(&bed)).unwrap();
        let mut buffer = space.map::<u64>(4 * WORDS).unwrap();
        fill(&mut buffer, 1);
        assert_eq!(space.migrate_to(buffer.range(), node).unwrap().moved, pages(4));
        check(&buffer, 1);
        let pin = space.pin_in_place(part(&buffer, 1, 1), PinFor::Write).unwrap();
        let refused = space.remove_memory(node, Duration::from_millis(20)).unwrap_err();
        let told = refused.to_string();
        assert!(matches!(refused, RemoveMemoryError::InUse { .. }) && told.contains("kmem.rs"), "{told}");
        assert_eq!(space.nodes()[0].used, pages(1), "the others are home");
        assert_eq!(space.migrate_to(part(&buffer, 2, 1), node).unwrap().moved, pages(1), "usable as before");
        drop(pin);
        space.remove_memory(node, LONG).unwrap();
        check(&buffer, 1);
    }
}

#[test]
fn bad_pages_are_given_to_nobody() {
    for setup in setups() {
        let bed = setup.bed(ByteSize::mib(1));
        let Some(space) = built(setup.builder()) else { return };
        bed.store.mark(bed.id, 3 << 12, 2 << 12, true).unwrap();
        let ram = setup.ram(&bed);
        let node = space.add_memory(ram.clone()).unwrap();
        ram.inject_error(9 << 12, 1 << 12).unwrap();
        assert_eq!(space.nodes()[0].lost, pages(3), "{setup:?}");
        let mut buffer = space.map::<u64>(256 * WORDS).unwrap();
        fill(&mut buffer, 1);
        let done = space.migrate_to(buffer.range(), node).unwrap();
        assert_eq!(done.moved, pages(253), "{setup:?}: {done:?}");
        check(&buffer, 1);
    }
}

/// The kernel says `EFAULT` where a program gets SIGBUS, but it does so with the signal engine for any absent page.
#[test]
fn a_page_that_breaks_in_use_raises_sigbus_and_its_neighbours_are_as_before() {
    for setup in setups().into_iter().filter(|setup| setup.engine == Engine::Threads) {
        for touched in [false, true] {
            let bed = setup.bed(ByteSize::mib(1));
            let Some(space) = built(setup.builder().clean_copies(false).fault_around(false)) else { return };
            let ram = setup.ram(&bed);
            let node = space.add_memory(ram.clone()).unwrap();
            let mut buffer = space.map::<u64>(16 * WORDS).unwrap();
            fill(&mut buffer, 1);
            assert_eq!(space.migrate_to(buffer.range(), node).unwrap().moved, pages(16));
            let in_place = setup.reach == Reach::InPlace;
            if touched && in_place {
                check(&buffer, 1);
            }
            // Which of its pages is where on the device: in the order in which they went.
            ram.inject_error(5 << 12, 1 << 12).unwrap();
            let at = |page: usize| std::ptr::from_ref(&buffer[page * WORDS]).cast::<u8>();
            for page in 0..16 {
                assert_eq!(readable(at(page)), page != 5, "{setup:?} {touched}: page {page}");
            }
            assert_eq!(space.residency(buffer.range()).poisoned, pages(1));
            assert_eq!(space.nodes()[0].lost, pages(1));
            space.remove_memory(node, LONG).unwrap();
        }
    }
}

#[test]
fn what_cannot_be_a_node_is_refused() {
    let setup =
        Setup { engine: Engine::Signal, forced_fallback: true, under: Under::Memory, reach: Reach::InPlace };
    let Some(space) = built(setup.builder()) else { return };
    let bed = setup.bed(ByteSize::mib(1));
    let told = space.add_memory(setup.ram(&bed)).unwrap_err();
    assert!(matches!(&told, AddMemoryError::Coherent { device } if device == "dax0.0"), "{told}");
    for number in [0, 1, 77] {
        let told = space.remove_memory(number, LONG).unwrap_err().to_string();
        assert_eq!(told, format!("number {number} is no node of this space: its nodes are []"));
    }
    let small = || Arc::new(MemDevice::private(ByteSize::kib(4)).unwrap());
    for n in 0..64 {
        let node = space.add_memory(small()).unwrap();
        assert_eq!(node, n + 1);
        if n % 2 == 0 {
            space.remove_memory(node, LONG).unwrap();
            assert!(
                space.remove_memory(node, LONG).is_err()
                    && space.migrate_to(VaRange::page(uhmm::Vpn::new(1)), node).is_err()
            );
        }
    }
    let told = space.add_memory(small()).unwrap_err().to_string();
    assert!(told.contains("64 pagemaps were added"), "{told}");
    // The namespace that was refused is nobody's.
    bed.store.destroy(bed.id).unwrap();
}

#[test]
fn on_huge_pages() {
    let setup = Setup {
        engine: Engine::Signal,
        forced_fallback: false,
        under: Under::Huge(Huge::M2),
        reach: Reach::Copied,
    };
    let Some(bed) = Bed::new(setup.under, ByteSize::mib(4), Geometry::M2, Mode::SystemRam) else { return };
    let Some(space) = built(setup.builder()) else { return };
    let node = space.add_memory(setup.ram(&bed)).unwrap();
    let mut buffer = space.map::<u64>(1024 * WORDS).unwrap();
    fill(&mut buffer, 1);
    assert_eq!(space.migrate_to(buffer.range(), node).unwrap().moved, pages(1024));
    check(&buffer, 1);
    space.remove_memory(node, LONG).unwrap();
    check(&buffer, 1);
}

/// Ends the threads that look at it.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A node that comes and goes beside threads that load, store and migrate: nothing is lost.
#[test]
fn nodes_come_and_go_under_load() {
    for setup in setups() {
        let Some(space) = built(setup.builder().ram(ByteSize::mib(1))) else { return };
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            // Also if this one fails.
            let _stop = Stop(&stop);
            for seed in 0..2_u64 {
                let (space, stop) = (&space, &stop);
                scope.spawn(move || {
                    let mut buffer = space.map::<u64>(300 * WORDS).unwrap();
                    let mut round = 0;
                    while !stop.load(Ordering::Relaxed) {
                        fill(&mut buffer, seed << 32 | round);
                        check(&buffer, seed << 32 | round);
                        round += 1;
                    }
                });
            }
            for round in 0..3 {
                let bed = setup.bed(ByteSize::mib(1));
                let node = space.add_memory(setup.ram(&bed)).unwrap();
                thread::sleep(Duration::from_millis(10 + 10 * round));
                let removed = space.remove_memory(node, LONG);
                removed.unwrap_or_else(|error| panic!("{setup:?}, round {round}: {error}"));
                bed.store.destroy(bed.id).unwrap();
            }
        });
    }
}
