//! What 32 MiB cost, page by page: to the device and back, and to be looked at. The figures of `cargo xtask oracle
//! --figures`, which has the kernel's own device do the same in the same virtual machine.
//!
//! A line is who, what, and microseconds for a page, the median of some rounds: `device` is this crate's, asked what
//! the kernel's is asked by its ioctls, contents handed back included; `library` is a space by itself, with the engine
//! that is its default, which no change of the program's mappings is told to; `threads` the same with the engine that
//! hears of them; `one-by-one` the default with no more than the page that was touched brought home by a fault.

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm::{ByteSize, Engine, MemDevice, PAGE_SIZE, PageCount, Space, VaRange, VirtAddr};
use uhmm_dmirror::{Dmirror, Node};

const SIZE: ByteSize = ByteSize::mib(32);
const ROUNDS: usize = 5;
const WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// How long each round of a thing took.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn measure<R>(&mut self, what: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = what();
        self.0.push(start.elapsed());
        result
    }

    fn print(mut self, who: &str, what: &str) {
        self.0.sort_unstable();
        let median = self.0[self.0.len() / 2];
        let pages = SIZE.bytes() as f64 / PAGE_SIZE as f64;
        println!("{who} {what} {:.4}", median.as_secs_f64() * 1e6 / pages);
    }
}

/// All four.
#[derive(Default)]
struct Figures {
    out: Times,
    fault: Times,
    back: Times,
    look: Times,
}

impl Figures {
    fn print(self, who: &str) {
        self.out.print(who, "migrate-to-device");
        self.fault.print(who, "fault-back");
        self.back.print(who, "migrate-to-system");
        self.look.print(who, "snapshot");
    }
}

/// Every page is written.
fn fill(words: &mut [u64], round: u64) {
    words.fill(round + 1);
}

/// One word of every page, in order.
fn touch(words: &[u64]) -> u64 {
    words.iter().step_by(WORDS).map(|word| *black_box(word)).sum()
}

fn expect(right: bool, what: &str) -> Result<(), Box<dyn Error>> {
    if right { Ok(()) } else { Err(what.into()) }
}

fn device() -> Result<(), Box<dyn Error>> {
    // SAFETY: the device is asked about the memory below only, to which no reference is held across its calls.
    let machine = unsafe { Dmirror::new(SIZE) }?;
    let handle = machine.open(Node::ALL[0])?;
    let len = SIZE.bytes() as usize;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping, which stays to the end of the process.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    expect(start != libc::MAP_FAILED, "no memory")?;
    // SAFETY: pages of 4 KiB, as the kernel's device has them.
    unsafe { libc::madvise(start, len, libc::MADV_NOHUGEPAGE) };
    let range = VaRange::new(VirtAddr::of(start), len)?;
    let words = || {
        // SAFETY: the mapping, mapped and writable as long as the process lives; the slice is let go of before a device
        // is asked about it.
        unsafe { std::slice::from_raw_parts_mut(start.cast::<u64>(), len / size_of::<u64>()) }
    };
    let (mut bytes, mut seen) = (vec![0; len], vec![0; range.pages().get()]);
    let mut figures = Figures::default();
    for round in 0..ROUNDS as u64 {
        fill(words(), round);
        let moved = figures.out.measure(|| handle.migrate_to_device(range, &mut bytes))?;
        expect(moved.pages == range.pages(), "not all of it moved")?;
        let sum = figures.fault.measure(|| touch(words()));
        expect(sum == (round + 1) * range.pages().get() as u64, "wrong contents")?;
        handle.migrate_to_device(range, &mut bytes)?;
        let back = figures.back.measure(|| handle.migrate_to_system(range))?;
        expect(back.pages == range.pages(), "not all of it came back")?;
        figures.look.measure(|| handle.snapshot(range, &mut seen))?;
        expect(seen.iter().all(|byte| *byte == 2), "a page is not there")?;
    }
    figures.print("device");
    Ok(())
}

fn library(who: &str, engine: Engine, fault_around: bool) -> Result<(), Box<dyn Error>> {
    let device = Arc::new(MemDevice::private(SIZE)?);
    let space = Space::builder().device(device).engine(engine).fault_around(fault_around).clean_copies(false);
    let space = space.build()?;
    let mut buffer = space.map::<u64>(SIZE.bytes() as usize / size_of::<u64>())?;
    buffer.advise_no_huge()?;
    let range = buffer.range();
    let all = |pages: PageCount| expect(pages == range.pages(), "not all of it moved");
    let mut found = Vec::with_capacity(range.pages().get());
    let mut figures = Figures::default();
    for round in 0..ROUNDS as u64 {
        fill(&mut buffer, round);
        all(figures.out.measure(|| space.migrate(range))?.moved)?;
        let sum = figures.fault.measure(|| touch(&buffer));
        expect(sum == (round + 1) * range.pages().get() as u64, "wrong contents")?;
        all(space.migrate(range)?.moved)?;
        all(figures.back.measure(|| space.prefetch(range))?)?;
        found.clear();
        figures.look.measure(|| space.segments(range, Some(0), |segment| found.push(segment)))?;
        let writable =
            found.iter().filter(|segment| segment.view().may_write()).map(|segment| segment.range().pages());
        expect(writable.fold(PageCount::ZERO, PageCount::plus) == range.pages(), "a page is not there")?;
    }
    figures.print(who);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    library("library", Engine::Signal, true)?;
    library("threads", Engine::Threads, true)?;
    library("one-by-one", Engine::Signal, false)?;
    device()
}
