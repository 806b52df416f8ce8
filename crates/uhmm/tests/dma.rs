//! Memory that a device reaches by addresses of its own, on the running kernel. The device is io_uring with registered
//! buffers, which the kernel pins as it does for VFIO: a page that is mapped cannot be moved, and moves all the same.

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{PAGE, Setup, WORDS, check, eventually, fill, memory, part, word};
use io_uring::{IoUring, opcode, types};
use uhmm::dma::{DmaAddr, DmaError, Identity, Iommu, IommuError};
use uhmm::mirror::{MirrorError, RangeFaultError};
use uhmm::{ByteSize, PageCount, Skip, VaRange};

scenarios!(
    what_is_mapped_is_unmapped_before_it_moves,
    a_device_writes_beside_migration,
    a_space_with_a_limit_evicts_what_is_mapped,
    what_is_not_managed_is_not_mapped,
);

const PAGES: usize = 32;

/// Runs that are mapped at a time.
const RUNS: usize = 64;

/// A ring as the IOMMU: each run is a registered buffer, whose pages the kernel pins.
#[derive(Clone)]
struct Ring(Arc<Mutex<Inside>>);

struct Inside {
    ring: IoUring,
    runs: [Option<VaRange>; RUNS],
}

impl Ring {
    fn new() -> Self {
        let ring = IoUring::new(4).unwrap();
        ring.submitter().register_buffers_sparse(RUNS as u32).unwrap();
        Self(Arc::new(Mutex::new(Inside { ring, runs: [None; RUNS] })))
    }

    fn mapped(&self) -> usize {
        self.0.lock().unwrap().runs.iter().flatten().map(|run| run.pages().get()).sum()
    }

    /// Has the device read a page of the file to where it finds `addr`, which must be mapped.
    fn read(&self, file: &File, offset: usize, addr: DmaAddr) {
        let mut inside = self.0.lock().unwrap();
        let holds = |run: &Option<VaRange>| {
            run.is_some_and(|run| addr.get() - (run.start().get() as u64) < run.bytes() as u64)
        };
        let slot = inside.runs.iter().position(holds).expect("mapped");
        let to = std::ptr::with_exposed_provenance_mut(addr.get() as usize);
        let entry = opcode::ReadFixed::new(types::Fd(file.as_raw_fd()), to, PAGE as u32, slot as u16)
            .offset(offset as u64)
            .build();
        // SAFETY: the buffer is registered, and stays so until the read is done, as the lock is held.
        unsafe { inside.ring.submission().push(&entry) }.unwrap();
        inside.ring.submit_and_wait(1).unwrap();
        let done = inside.ring.completion().next().unwrap().result();
        assert_eq!(done, PAGE as i32);
    }
}

impl Inside {
    fn update(&self, slot: usize, start: *mut libc::c_void, len: usize) -> std::io::Result<()> {
        let vector = libc::iovec { iov_base: start, iov_len: len };
        // SAFETY: the memory stays mapped as long as the space, which outlives the mirror that asks for this.
        unsafe { self.ring.submitter().register_buffers_update(slot as u32, &[vector], None) }
    }
}

impl Iommu for Ring {
    fn map(&mut self, pages: VaRange, _write: bool) -> Result<DmaAddr, IommuError> {
        let mut inside = self.0.lock().unwrap();
        let slot = inside.runs.iter().position(Option::is_none).ok_or(IommuError::Full)?;
        let start = std::ptr::with_exposed_provenance_mut(pages.start().get());
        inside
            .update(slot, start, pages.bytes())
            .map_err(|why| IommuError::Refused(why.raw_os_error().unwrap_or(0)))?;
        inside.runs[slot] = Some(pages);
        Ok(DmaAddr::new(pages.start().get() as u64))
    }

    fn unmap(&mut self, pages: VaRange) {
        let mut inside = self.0.lock().unwrap();
        let slot = inside.runs.iter().position(|run| *run == Some(pages)).expect("as it was mapped");
        inside.update(slot, std::ptr::null_mut(), 0).unwrap();
        inside.runs[slot] = None;
    }
}

fn what_is_mapped_is_unmapped_before_it_moves(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    let range = buffer.range();
    assert_eq!(space.migrate(part(range, 0, 8)).unwrap().moved, PageCount::new(8));
    let ring = Ring::new();
    let mirror = space.dma_mirror(range, ring.clone()).unwrap();
    mirror.dma_map(range, true).unwrap();
    assert_eq!(ring.mapped(), PAGES);
    let done = space.migrate(part(range, 4, 8)).unwrap();
    assert_eq!((done.moved, done.skipped.get(Skip::Busy)), (PageCount::new(8), 0));
    assert_eq!(ring.mapped(), 0, "the run was one");
    mirror.dma_map(part(range, 16, 16), true).unwrap();
    assert_eq!(mirror.dma_unmap(part(range, 20, 1)), PageCount::new(16));
    mirror.dma_map(range, true).unwrap();
    drop(mirror);
    assert_eq!(ring.mapped(), 0);
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
    check(&buffer, 1);
}

/// The device writes pages by addresses that it looked up, while others move them out.
fn a_device_writes_beside_migration(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 2);
    let range = buffer.range();
    let mut file = tempfile();
    for at in 0..PAGES * WORDS {
        file.write_all(&word(3, at).to_ne_bytes()).unwrap();
    }
    let ring = Ring::new();
    let mirror = space.dma_mirror(range, ring.clone()).unwrap();
    let over = AtomicBool::new(false);
    let moved = thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut moved = 0;
            let mut last = false;
            while !last {
                last = over.load(Ordering::Acquire);
                moved += space.migrate(range).unwrap().moved.get();
                thread::yield_now();
            }
            moved
        });
        for n in 0..PAGES {
            let page = part(range, n, 1);
            while !mirror.look(|table| {
                let found = table.address(page.start(), true);
                found.inspect(|addr| ring.read(&file, n * PAGE, *addr)).is_some()
            }) {
                match mirror.dma_map(page, true) {
                    Ok(()) | Err(DmaError::Pages(RangeFaultError::TimedOut(_))) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
        over.store(true, Ordering::Release);
        mover.join().unwrap()
    });
    assert!(moved > 0);
    check(&buffer, 3);
    drop(mirror);
    assert_eq!(ring.mapped(), 0);
}

fn a_space_with_a_limit_evicts_what_is_mapped(setup: Setup) {
    let (pages, run) = (1024, 16);
    let space = setup.builder().device(memory(ByteSize::mib(16))).ram(ByteSize::mib(1)).build().unwrap();
    let mut buffer = space.map::<u64>(pages * WORDS).unwrap();
    fill(&mut buffer, 4);
    // From when on the limit is kept.
    eventually(|| space.residency(buffer.range()).resident.get() < pages / 2);
    let ring = Ring::new();
    let mirror = space.dma_mirror(buffer.range(), ring.clone()).unwrap();
    for first in (0..pages).step_by(run) {
        mirror.dma_map(part(buffer.range(), first, run), true).unwrap();
    }
    assert!(ring.mapped() < pages, "more was mapped than may be resident: {} pages", ring.mapped());
    drop(mirror);
    check(&buffer, 4);
}

fn what_is_not_managed_is_not_mapped(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let elsewhere = common::Memory::new(1);
    let refused = space.dma_mirror(elsewhere.range(), Identity);
    assert!(matches!(refused, Err(MirrorError::Unmanaged(range)) if range == elsewhere.range()));
}

fn tempfile() -> File {
    let name = format!("uhmm-dma-{}-{:?}", std::process::id(), thread::current().id());
    let path = std::env::temp_dir().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file
}
