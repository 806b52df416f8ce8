//! The limits that figures are measured against: the bare primitives, with nothing of uhmm around them.
//!
//! What     [`Copying`] (memcpy in pieces), [`SignalFaults`] and [`ThreadFaults`] (one page per fault, with the
//!          least that a fault can be resolved with), [`first_touch`] (what fresh memory costs) and [`make_own`] (what
//!          the system takes to see to it that pages are there and the process's own).
//! Why      a figure by itself says more about the machine than about the code. Measured in one run with its
//!          limit, between the same kinds of memory and in the same order, it says what the code adds.
//! Owns     its own memory, descriptors and threads; nothing of a [`Space`](crate::Space).
//! Fails    where the system refuses memory or userfaultfd. Every run checks the bytes that it moved and says
//!          so if they are wrong ([`io::ErrorKind::InvalidData`]).

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uhmm_addr::{ByteSize, Geometry, PAGE_SIZE, PageCount, VaRange, VirtAddr};
use uhmm_core::host::{Install, Progress};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::placement;
use uhmm_sys::signals::{BareHandler, Blocked};
use uhmm_sys::uffd::{Event, EventBuffer, Features, Mode, ReadOutcome, Uffd};

use crate::buffer::Plain;

/// Memory whose pages are of one size and all there, filled with [`pattern`].
fn memory(size: ByteSize, pages: Geometry) -> io::Result<Mapping> {
    let len = (size.bytes() as usize).next_multiple_of(Geometry::M2.bytes());
    let mapping = Mapping::reserve_aligned(len, Geometry::M2.bytes(), "uhmm-yardstick")?;
    if pages == Geometry::K4 {
        mapping.advise_no_huge()?
    } else {
        mapping.advise_huge()?
    }
    mapping.populate()?;
    Ok(mapping)
}

/// The first word of page `page`, by which a page that came to the wrong place is known.
#[must_use]
pub const fn pattern(page: usize) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Gives every page of `mapping` its [`pattern`].
fn mark(mapping: &Mapping) {
    for page in 0..mapping.range().pages().get() {
        // SAFETY: inside the mapping, aligned to pages, and reached by nobody else.
        unsafe { mapping.as_ptr().add(page * PAGE_SIZE).cast::<u64>().write(pattern(page)) }
    }
}

fn first_word(mapping: &Mapping, page: usize) -> u64 {
    assert!(page < mapping.range().pages().get());
    // SAFETY: inside the mapping (checked), aligned to pages. Volatile: the read is a fault, and is meant.
    unsafe { mapping.as_ptr().add(page * PAGE_SIZE).cast::<u64>().read_volatile() }
}

fn wrong(page: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("page {page} came back with other contents"))
}

/// memcpy from one kind of memory to another.
#[derive(Debug)]
pub struct Copying {
    from: Mapping,
    to: Mapping,
}

impl Copying {
    /// `size` bytes in pages of size `from`, to be copied to memory in pages of size `to`. All of it is there.
    pub fn new(size: ByteSize, from: Geometry, to: Geometry) -> io::Result<Self> {
        let (from, to) = (memory(size, from)?, memory(size, to)?);
        mark(&from);
        Ok(Self { from, to })
    }

    /// Copies everything once, `piece` bytes at a time.
    pub fn run(&mut self, piece: Geometry) -> io::Result<Duration> {
        let start = Instant::now();
        for at in (0..self.from.len()).step_by(piece.bytes()) {
            // SAFETY: both mappings have that length, a multiple of 2 MiB; they are two, and ours alone.
            unsafe {
                let from = std::hint::black_box(self.from.as_ptr().add(at));
                from.copy_to_nonoverlapping(self.to.as_ptr().add(at), piece.bytes());
            }
        }
        let took = start.elapsed();
        let last = self.from.range().pages().get() - 1;
        if first_word(&self.to, last) == pattern(last) { Ok(took) } else { Err(wrong(last)) }
    }
}

/// Touches `size` bytes of fresh memory, one byte in every 4 KiB page.
pub fn first_touch(size: ByteSize) -> io::Result<Duration> {
    let mapping = Mapping::reserve(size.pages().bytes(), "uhmm-yardstick")?;
    mapping.advise_no_huge()?;
    let start = Instant::now();
    for page in 0..mapping.range().pages().get() {
        // SAFETY: inside the mapping, which is ours alone.
        unsafe { mapping.as_ptr().add(page * PAGE_SIZE).write_volatile(1) }
    }
    Ok(start.elapsed())
}

/// Has the system look at every page of `size` bytes that were just written, one by one, and make it the process's own if
/// it is not: a chunk of 2 MiB at a time, as somebody does who is going to pin them (`MADV_POPULATE_WRITE`).
pub fn make_own(size: ByteSize) -> io::Result<Duration> {
    let len = (size.bytes() as usize).next_multiple_of(Geometry::M2.bytes());
    let mapping = Mapping::reserve_aligned(len, Geometry::M2.bytes(), "uhmm-yardstick")?;
    mapping.advise_no_huge()?;
    mark(&mapping);
    let start = Instant::now();
    for chunk in mapping.range().chunks() {
        let at = std::ptr::with_exposed_provenance_mut(chunk.start().get());
        // SAFETY: a part of the mapping, whose contents stay.
        unsafe { rustix::mm::madvise(at, chunk.bytes(), rustix::mm::Advice::LinuxPopulateWrite) }?;
    }
    let took = start.elapsed();
    let last = mapping.range().pages().get() - 1;
    if first_word(&mapping, last) == pattern(last) { Ok(took) } else { Err(wrong(last)) }
}

/// Numbers below `len`, each once, in an order that no window policy takes for a sequence.
#[must_use]
pub fn shuffled(len: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    let mut state = 0x1234_5678_9abc_def1_u64;
    for last in (1..len).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % (last as u64 + 1)) as usize);
    }
    order
}

/// Adds the first word of the page of every index in `order` up; each is a fault if the page is not there.
pub fn touch<T: Plain + Into<u64>>(memory: &[T], order: &[usize]) -> u64 {
    let step = PAGE_SIZE / size_of::<T>();
    order.iter().fold(0, |sum, page| sum.wrapping_add(std::hint::black_box(memory[page * step]).into()))
}

/// What both ways of resolving one page have: pages on a "device", frames, and where the pages shall be.
#[derive(Debug)]
struct Pages {
    device: Mapping,
    frames: Mapping,
    target: Mapping,
    uffd: Uffd,
    used: AtomicUsize,
}

impl Pages {
    fn new(size: ByteSize, features: Features) -> io::Result<Self> {
        let uffd = Uffd::open(features.union(Features::MOVE)).map_err(io::Error::other)?;
        let device = memory(size, Geometry::M2)?;
        mark(&device);
        let frames = memory(size, Geometry::K4)?;
        let target = Mapping::reserve_aligned(frames.len(), Geometry::M2.bytes(), "uhmm-yardstick")?;
        target.advise_no_huge()?;
        for mapping in [&frames, &target] {
            // SAFETY: the memory is this value's own; its faults are resolved while `run` lasts, and nobody
            // touches absent pages at other times.
            unsafe { uffd.register(mapping.range(), Mode::MISSING) }.map_err(io::Error::other)?;
        }
        Ok(Self { device, frames, target, uffd, used: AtomicUsize::new(0) })
    }

    fn can_move(&self) -> bool {
        self.uffd.features().contains(Features::MOVE)
    }

    /// Resolves a fault at `addr`: reads the page from the device and puts it where it was touched.
    fn resolve(&self, addr: VirtAddr, by_move: bool, wake: bool) -> Progress {
        let page = addr.page().since(self.target.range().first()).get();
        assert!(page < self.device.range().pages().get());
        let frame = if by_move { self.used.fetch_add(1, Ordering::Relaxed) } else { 0 };
        let target = VaRange::page(addr.page());
        // SAFETY: page and frame lie in their mappings (frames are as many as pages, and each run starts at 0
        // and touches a page once); nobody else uses them. The moved frame's absence is known: `used`.
        unsafe {
            let device = self.device.as_ptr().add(page * PAGE_SIZE);
            let frame = self.frames.as_ptr().add(frame * PAGE_SIZE);
            device.copy_to_nonoverlapping(frame, PAGE_SIZE);
            if by_move {
                let from = VirtAddr::of(frame.as_ptr());
                self.uffd.move_pages(target.start(), from, PageCount::ONE, wake)
            } else {
                self.uffd.copy(target, frame, Install::Writable, wake)
            }
        }
    }

    /// Everything as it was before the run: the target empty, every frame there.
    fn reset(&self) -> io::Result<()> {
        if self.used.swap(0, Ordering::Relaxed) > 0 {
            let (to, from) = (self.frames.range(), self.target.range());
            // SAFETY: both are ours and nobody touches them; all frames are away, because a run takes all.
            let progress = unsafe { self.uffd.move_pages(to.start(), from.start(), from.pages(), false) };
            if !progress.is_complete() {
                return Err(io::Error::other(format!("frames did not come back: {:?}", progress.stop)));
            }
        } else {
            self.target.discard(self.target.range())?;
        }
        Ok(())
    }

    /// Touches every page once, in the given order, and returns the time that took.
    fn touch(&self, order: &[usize]) -> io::Result<Duration> {
        let mut sum = 0_u64;
        let start = Instant::now();
        for page in order {
            sum = sum.wrapping_add(first_word(&self.target, *page));
        }
        let took = start.elapsed();
        let expected = order.iter().fold(0_u64, |sum, page| sum.wrapping_add(pattern(*page)));
        if sum == expected { Ok(took) } else { Err(wrong(order.len())) }
    }

    fn whole(&self) -> usize {
        self.target.range().pages().get()
    }
}

/// What the bare signal handler works on, while a run lasts.
static PAGES: AtomicPtr<Pages> = AtomicPtr::new(std::ptr::null_mut());

fn on_bare_fault(addr: VirtAddr) {
    let pages = NonNull::new(PAGES.load(Ordering::Acquire)).expect("set while the handler is installed");
    // SAFETY: `SignalFaults::run` keeps the value alive as long as the handler is installed.
    let progress = unsafe { pages.as_ref() }.resolve(addr, true, false);
    assert!(progress.is_complete(), "the bare move failed: {:?}", progress.stop);
}

/// One page per fault, resolved by the faulting thread: SIGBUS, memcpy of a page, `UFFDIO_MOVE`.
#[derive(Debug)]
pub struct SignalFaults {
    pages: Box<Pages>,
}

impl SignalFaults {
    /// So much memory. Fails where frames cannot be moved.
    pub fn new(size: ByteSize) -> io::Result<Self> {
        let pages = Box::new(Pages::new(size, Features::SIGBUS)?);
        if !pages.can_move() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { pages })
    }

    /// Pages that a run touches.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.whole()
    }

    /// Touches every page once in the order given, which names each of [`SignalFaults::pages`] once. No other
    /// thread of the process may touch absent managed memory meanwhile.
    pub fn run(&mut self, order: &[usize]) -> io::Result<Duration> {
        assert_eq!(order.len(), self.pages.whole());
        PAGES.store((&raw const *self.pages).cast_mut(), Ordering::Release);
        // SAFETY: the handler makes one system call and copies a page; it resolves all faults of the memory
        // that is touched here, and the caller keeps others away.
        let handler = unsafe { BareHandler::install(on_bare_fault) }?;
        let took = self.pages.touch(order);
        drop(handler);
        self.pages.reset()?;
        took
    }
}

/// How a bare handler thread puts a page in its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// memcpy into a frame, and `UFFDIO_MOVE`.
    Move,
    /// memcpy into a buffer, and `UFFDIO_COPY`.
    Copy,
}

/// One page per fault, resolved by a handler thread on the same processor: read, memcpy, move or copy, wake.
#[derive(Debug)]
pub struct ThreadFaults {
    pages: std::sync::Arc<Pages>,
}

impl ThreadFaults {
    /// So much memory.
    pub fn new(size: ByteSize) -> io::Result<Self> {
        Ok(Self { pages: std::sync::Arc::new(Pages::new(size, Features::NONE)?) })
    }

    /// Pages that a run touches.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.whole()
    }

    /// Touches every page once in the order given, which names each of [`ThreadFaults::pages`] once, on the
    /// processor on which the calling thread runs now; and leaves that thread free to run anywhere.
    pub fn run(&mut self, order: &[usize], way: Way) -> io::Result<Duration> {
        assert_eq!(order.len(), self.pages.whole());
        let by_move = way == Way::Move;
        if by_move && !self.pages.can_move() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let took = on_one_processor(|cpu| {
            let stop = std::sync::Arc::new(AtomicBool::new(false));
            let handler: JoinHandle<io::Result<()>> = {
                let (pages, stop) = (self.pages.clone(), stop.clone());
                std::thread::spawn(move || {
                    let _blocked = Blocked::all();
                    placement::set_affinity(cpu)?;
                    serve(&pages, by_move, &stop)
                })
            };
            let took = self.pages.touch(order);
            stop.store(true, Ordering::Release);
            handler.join().map_err(|_| io::Error::other("the handler thread failed"))??;
            took
        })??;
        self.pages.reset()?;
        Ok(took)
    }
}

/// Runs `work` with the calling thread tied to the processor on which it runs now, whose number it gets.
pub fn on_one_processor<T>(work: impl FnOnce(u32) -> T) -> io::Result<T> {
    let allowed = placement::allowed_cpus()?;
    let cpu = placement::current_cpu();
    placement::set_affinity(cpu)?;
    let result = work(cpu);
    placement::set_affinity_to(&allowed)?;
    Ok(result)
}

fn serve(pages: &Pages, by_move: bool, stop: &AtomicBool) -> io::Result<()> {
    let mut events = EventBuffer::new();
    let nap = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while !stop.load(Ordering::Acquire) {
        poll(&mut [PollFd::new(&pages.uffd, PollFlags::IN)], Some(&nap))?;
        if !matches!(pages.uffd.read(&mut events), ReadOutcome::Events(_)) {
            continue;
        }
        for event in &mut events {
            if let Event::Fault { addr, .. } = event {
                let progress = pages.resolve(addr, by_move, true);
                assert!(progress.is_complete(), "the bare request failed: {:?}", progress.stop);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: ByteSize = ByteSize::mib(2);

    #[test]
    fn every_yardstick_moves_the_right_bytes() -> io::Result<()> {
        Copying::new(SIZE, Geometry::K4, Geometry::M2)?.run(Geometry::K4)?;
        first_touch(SIZE)?;
        let Ok(mut faults) = ThreadFaults::new(SIZE) else { return Ok(()) };
        let order = shuffled(faults.pages());
        for _ in 0..2 {
            faults.run(&order, Way::Copy)?;
            match faults.run(&order, Way::Move) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    #[test]
    fn a_shuffled_order_names_every_page_once() {
        let mut order = shuffled(1000);
        assert!(order.windows(2).filter(|pair| pair[1] == pair[0] + 1).count() < 20);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }
}
