//! Devices that fail: a page that cannot be read back is poisoned and nothing else is, pages that cannot be
//! written stay home, and nothing hangs.

mod common;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use common::{
    Setup, WORDS, check, check_from, expect_places, fill, in_process, memory, name_of, part, settle,
};
use rustix::io::Errno;
use uhmm::{
    Buffer, ByteSize, Counter, Device, Engine, MemDevice, MemoryType, PageCount, Skip, Space, Transfer,
    TransferError,
};
use uhmm_core::device::DevicePage;

scenarios!(
    a_lost_page_is_poisoned_and_its_neighbours_are_not,
    touching_a_lost_page_raises_sigbus,
    a_device_that_is_full_takes_what_it_can,
    a_device_that_cannot_be_written_leaves_pages_home,
    a_device_that_fills_up_half_way_loses_nothing,
    eviction_to_a_failing_device_loses_nothing,
    a_read_that_fails_once_is_tried_again,
);
with_engine!(Threads, threads_calls, threads_calls_fallback: a_system_call_on_a_lost_page_fails);

const PAGES: usize = 64;
const BAD: usize = 21;

/// A device that fails as it is told.
struct Faulty {
    memory: Arc<MemDevice>,
    /// A page that begins with this word cannot be read; zero for none.
    lost: AtomicU64,
    /// So many reads fail.
    reads_to_fail: AtomicUsize,
    /// So many transfers are written; then `error` comes.
    writes: AtomicUsize,
    error: TransferError,
}

impl Faulty {
    fn new() -> Self {
        Self {
            memory: memory(ByteSize::mib(16)),
            lost: AtomicU64::new(0),
            reads_to_fail: AtomicUsize::new(0),
            writes: AtomicUsize::new(usize::MAX),
            error: TransferError::Io(5),
        }
    }
}

fn take_one(counter: &AtomicUsize) -> bool {
    let less = |seen: usize| if seen == usize::MAX { Some(seen) } else { seen.checked_sub(1) };
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
}

impl Device for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }

    fn memory_type(&self) -> MemoryType {
        self.memory.memory_type()
    }

    fn capacity(&self) -> PageCount {
        self.memory.capacity()
    }

    fn write(&self, batch: &mut [Transfer]) {
        for transfer in batch {
            if take_one(&self.writes) {
                self.memory.write(std::slice::from_mut(transfer));
            } else {
                transfer.fail(self.error);
            }
        }
    }

    fn read(&self, batch: &mut [Transfer]) {
        for transfer in batch {
            self.memory.read(std::slice::from_mut(transfer));
            let lost = self.lost.load(Ordering::Relaxed);
            let found = (0..transfer.pages().get()).any(|page| {
                // SAFETY: the transfer's memory is the device's until it returns.
                lost != 0 && unsafe { transfer.ram().cast::<u64>().add(page * WORDS).read() } == lost
            });
            if found || take_one(&self.reads_to_fail) {
                // What a failed read leaves behind is nobody's business.
                // SAFETY: as above.
                unsafe { transfer.ram().write_bytes(0xee, transfer.bytes()) };
                transfer.fail(TransferError::Io(5));
            }
        }
    }

    fn discard(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.memory.discard(page, pages)
    }
}

/// A buffer on a device, one page of which is lost.
fn one_lost(setup: Setup) -> (Space, Buffer<u64>) {
    let device = Arc::new(Faulty::new());
    let space = setup.builder().device(device.clone()).window(PageCount::new(8)).build().unwrap();
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    settle(&space, buffer.range());
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, PageCount::new(PAGES));
    device.lost.store(common::word(1, BAD * WORDS), Ordering::Relaxed);
    (space, buffer)
}

fn check_neighbours(buffer: &Buffer<u64>) {
    check(&buffer[..BAD * WORDS], 1);
    check_from(&buffer[(BAD + 1) * WORDS..], 1, (BAD + 1) * WORDS);
}

fn a_lost_page_is_poisoned_and_its_neighbours_are_not(setup: Setup) {
    let (space, buffer) = one_lost(setup);
    check_neighbours(&buffer);
    assert_eq!(space.count(Counter::Poisoned), 0, "nobody has asked for the page");
    let bad = part(buffer.range(), BAD, 1);
    assert_eq!(space.prefetch(bad).unwrap(), PageCount::ZERO);
    assert_eq!(space.count(Counter::Poisoned), 1);
    settle(&space, buffer.range());
    let found = space.residency(buffer.range());
    assert_eq!((found.poisoned, found.resident), (PageCount::ONE, PageCount::new(PAGES - 1)), "{found:?}");
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Failed)), (PAGES - 1, 1), "{:?}", done.skipped);
    check_neighbours(&buffer);
    drop(buffer);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}

fn touching_a_lost_page_raises_sigbus(setup: Setup) {
    let name = name_of(setup, "touching_a_lost_page_raises_sigbus");
    in_process(&name, Some(libc::SIGBUS), || {
        let (_space, buffer) = one_lost(setup);
        check_neighbours(&buffer);
        let value = std::hint::black_box(&buffer)[BAD * WORDS + 7];
        let _ = writeln!(std::io::stderr(), "read {value:#x} from a page that is lost");
    });
}

fn a_system_call_on_a_lost_page_fails(setup: Setup) {
    assert_eq!(setup.engine, Engine::Threads);
    let (space, buffer) = one_lost(setup);
    let (_read, write) = rustix::pipe::pipe().unwrap();
    // SAFETY: the page's bytes, which only the kernel reads.
    let page = unsafe { std::slice::from_raw_parts(buffer.as_ptr().add(BAD * WORDS).cast::<u8>(), 4096) };
    for _ in 0..2 {
        assert_eq!(rustix::io::write(&write, page), Err(Errno::FAULT));
    }
    common::eventually(|| space.count(Counter::Poisoned) == 1);
    check_neighbours(&buffer);
}

fn a_device_that_is_full_takes_what_it_can(setup: Setup) {
    let space = setup.space(ByteSize::kib(128));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 2);
    settle(&space, buffer.range());
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!(done.moved, PageCount::new(32), "{:?}", done.skipped);
    assert_eq!(done.skipped.get(Skip::Full), 32, "{:?}", done.skipped);
    expect_places(&space, buffer.range(), 32, 32);
    check(&buffer, 2);
    fill(&mut buffer, 3);
    let _ = space.evict(PageCount::new(PAGES)).unwrap();
    check(&buffer, 3);
}

fn a_device_that_cannot_be_written_leaves_pages_home(setup: Setup) {
    let device = Arc::new(Faulty::new());
    device.writes.store(0, Ordering::Relaxed);
    let space = setup.with(device.clone());
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 4);
    settle(&space, buffer.range());
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Failed)), (0, PAGES as u64), "{:?}", done.skipped);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
    check(&buffer, 4);
    device.writes.store(usize::MAX, Ordering::Relaxed);
    settle(&space, buffer.range());
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, PageCount::new(PAGES));
    check(&buffer, 4);
}

fn a_device_that_fills_up_half_way_loses_nothing(setup: Setup) {
    let device = Arc::new(Faulty { error: TransferError::Full, ..Faulty::new() });
    let space = setup.with(device.clone());
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    for (round, writes) in [0, 1, 2, 3, 5].into_iter().enumerate() {
        fill(&mut buffer, round as u64);
        settle(&space, buffer.range());
        device.writes.store(writes, Ordering::Relaxed);
        let mut moved = 0;
        // Pieces of eight pages, each a transfer or more.
        for piece in 0..PAGES / 8 {
            let done = space.migrate(part(buffer.range(), piece * 8, 8)).unwrap();
            assert_eq!(done.moved.get() as u64 + done.skipped.total(), 8, "{:?}", done.skipped);
            assert_eq!(done.skipped.total(), done.skipped.get(Skip::Full), "{:?}", done.skipped);
            moved += done.moved.get();
        }
        assert!(moved <= writes * 8, "{moved} pages moved by {writes} transfers");
        expect_places(&space, buffer.range(), PAGES - moved, moved);
        check(&buffer, round as u64);
    }
}

fn eviction_to_a_failing_device_loses_nothing(setup: Setup) {
    let device = Arc::new(Faulty::new());
    device.writes.store(20, Ordering::Relaxed);
    let space = setup.builder().device(device.clone()).ram(ByteSize::mib(1)).build().unwrap();
    let mut buffer = space.map::<u64>(1024 * WORDS).unwrap();
    fill(&mut buffer, 6);
    check(&buffer, 6);
    device.writes.store(usize::MAX, Ordering::Relaxed);
    fill(&mut buffer, 7);
    check(&buffer, 7);
    assert_eq!(space.count(Counter::Poisoned), 0);
}

fn a_read_that_fails_once_is_tried_again(setup: Setup) {
    let device = Arc::new(Faulty::new());
    let space = setup.builder().device(device.clone()).window(PageCount::new(16)).build().unwrap();
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 8);
    settle(&space, buffer.range());
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, PageCount::new(PAGES));
    device.reads_to_fail.store(1, Ordering::Relaxed);
    check(&buffer, 8);
    assert_eq!(space.count(Counter::Poisoned), 0);
}
