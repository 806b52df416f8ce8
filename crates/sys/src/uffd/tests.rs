//! Against the running kernel. Where it permits no userfaultfd, a test says so and passes.

use core::ptr::NonNull;
use core::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use uhmm_addr::{PAGE_SIZE, PageCount, VaRange, VirtAddr, Vpn};
use uhmm_core::fault::Access;
use uhmm_core::host::{Install, Progress, Stop};

use super::*;

/// Pages of our own, unmapped at the end.
pub(crate) struct Memory {
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: the memory is reached through raw pointers only, and each test says which thread touches what.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn new(pages: usize) -> Self {
        /// Far below where the kernel puts what is mapped anywhere: a test that leaves a hole finds it again, and not
        /// another test's mapping in it.
        static NEXT: AtomicUsize = AtomicUsize::new(0x1000_0000_0000);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let wish = NEXT.fetch_add((pages + 1) * PAGE_SIZE, Ordering::Relaxed);
        let wish = core::ptr::without_provenance_mut(wish);
        // SAFETY: the kernel chooses an address that nothing uses.
        let start =
            unsafe { rustix::mm::mmap_anonymous(wish, pages * PAGE_SIZE, protection, MapFlags::PRIVATE) };
        let start = NonNull::new(start.unwrap()).unwrap().cast::<u8>();
        start.as_ptr().expose_provenance();
        let memory = Self { start, pages };
        // SAFETY: it is our own mapping. A neighbouring huge page would blur which pages are present.
        unsafe { rustix::mm::madvise(memory.at(0).cast(), pages * PAGE_SIZE, Advice::LinuxNoHugepage) }
            .unwrap();
        memory.inherit(false);
        memory
    }

    /// Whether children get it: while one lives, the pages that it shares cannot be moved, in any test.
    pub(crate) fn inherit(&self, inherit: bool) {
        let advice = if inherit { Advice::LinuxDoFork } else { Advice::LinuxDontFork };
        // SAFETY: it is our own mapping, and its contents stay.
        unsafe { rustix::mm::madvise(self.at(0).cast(), self.pages * PAGE_SIZE, advice) }.unwrap();
    }

    pub(crate) fn at(&self, page: usize) -> *mut u8 {
        self.start.as_ptr().wrapping_add(page * PAGE_SIZE)
    }

    pub(crate) fn addr(&self, page: usize) -> VirtAddr {
        VirtAddr::of(self.at(page))
    }

    pub(crate) fn first(&self) -> Vpn {
        self.addr(0).page()
    }

    pub(crate) fn range(&self) -> VaRange {
        self.part(0, self.pages)
    }

    pub(crate) fn part(&self, page: usize, pages: usize) -> VaRange {
        VaRange::new(self.addr(page), pages * PAGE_SIZE).unwrap()
    }

    /// Writes `value` over each page.
    pub(crate) fn fill(&self, page: usize, pages: usize, value: u8) {
        // SAFETY: within our own writable mapping.
        unsafe { self.at(page).write_bytes(value, pages * PAGE_SIZE) };
    }

    /// First and last byte of a page.
    pub(crate) fn ends(&self, page: usize) -> (u8, u8) {
        // SAFETY: within our own readable mapping.
        unsafe { (self.at(page).read_volatile(), self.at(page).add(PAGE_SIZE - 1).read_volatile()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody has a reference to it.
        unsafe { rustix::mm::munmap(self.at(0).cast(), self.pages * PAGE_SIZE) }.unwrap();
    }
}

/// A descriptor, or a word on why there is none.
pub(crate) fn open(wanted: Features) -> Option<Uffd> {
    match Uffd::open(wanted) {
        Ok(uffd) if uffd.features().contains(wanted) => Some(uffd),
        Ok(uffd) => {
            println!("skipped: of {wanted:?} the kernel permits {:?}", uffd.features());
            None
        }
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

pub(crate) fn register(uffd: &Uffd, range: VaRange, mode: Mode) {
    // SAFETY: the tests own this memory and resolve its faults themselves.
    unsafe { uffd.register(range, mode) }.unwrap();
}

fn copy(uffd: &Uffd, dst: VaRange, source: &Memory) -> Progress {
    // SAFETY: `source` is ordinary memory, at least as long in every test.
    unsafe { uffd.copy(dst, source.start, Install::Writable, true) }
}

fn moved(uffd: &Uffd, dst: &Memory, at: usize, src: &Memory, from: usize, pages: usize) -> Progress {
    // SAFETY: both are the test's own.
    unsafe { uffd.move_pages(dst.addr(at), src.addr(from), PageCount::new(pages), true) }
}

fn stopped(done: usize, stop: Stop) -> Progress {
    Progress::stopped(PageCount::new(done), stop)
}

fn next_event(uffd: &Uffd, buffer: &mut EventBuffer) -> Event {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        match uffd.read(buffer) {
            ReadOutcome::Events(_) => return buffer.next().unwrap(),
            ReadOutcome::Empty => std::thread::sleep(Duration::from_micros(100)),
            other => panic!("{other:?}"),
        }
    }
    panic!("no event within ten seconds");
}

#[test]
fn copy_and_zero_fill_and_report_what_is_there_already() {
    let Some(uffd) = open(Features::NONE) else { return };
    let (memory, source) = (Memory::new(8), Memory::new(8));
    source.fill(0, 8, 0x5a);
    register(&uffd, memory.range(), Mode::MISSING);
    assert!(copy(&uffd, memory.part(0, 4), &source).is_complete());
    assert!(uffd.zero(memory.part(6, 2), true).is_complete());
    assert_eq!((memory.ends(3), memory.ends(7)), ((0x5a, 0x5a), (0, 0)));
    assert_eq!(copy(&uffd, memory.part(0, 1), &source), stopped(0, Stop::Present));
    assert_eq!(uffd.zero(memory.part(6, 1), true), stopped(0, Stop::Present));
    // Two pages fit before the zero page; what stopped it shows when it is called again.
    assert_eq!(copy(&uffd, memory.part(4, 4), &source), stopped(2, Stop::Pending));
    assert_eq!(copy(&uffd, memory.part(6, 2), &source), stopped(0, Stop::Present));
    // Where nothing is registered.
    let other = Memory::new(1);
    assert_eq!(copy(&uffd, other.range(), &source), stopped(0, Stop::Unmapped));
}

#[test]
fn frames_move_and_holes_and_read_only_memory_stop_them() {
    let Some(uffd) = open(Features::MOVE) else { return };
    let (memory, arena) = (Memory::new(8), Memory::new(8));
    register(&uffd, arena.range(), Mode::MISSING);
    memory.fill(0, 4, 7);
    assert!(moved(&uffd, &arena, 0, &memory, 0, 3).is_complete());
    assert_eq!((arena.ends(2), memory.ends(0)), ((7, 7), (0, 0)));
    // memory: zero, absent, absent, 7, absent...
    assert_eq!(moved(&uffd, &arena, 3, &memory, 3, 3), stopped(1, Stop::Pending), "part of the way");
    assert_eq!(moved(&uffd, &arena, 4, &memory, 4, 2), stopped(0, Stop::Hole), "the reason");
    memory.fill(5, 1, 9);
    assert_eq!(moved(&uffd, &arena, 0, &memory, 5, 1), stopped(0, Stop::Present));
    // SAFETY: our own mapping; a write to it would be this test's own fault.
    unsafe { rustix::mm::mprotect(memory.at(5).cast(), PAGE_SIZE, MprotectFlags::READ) }.unwrap();
    assert_eq!(moved(&uffd, &arena, 5, &memory, 5, 1), stopped(0, Stop::Refused));
    assert_eq!(memory.ends(5), (9, 9));
}

#[test]
fn missing_faults_name_the_access_and_the_thread() {
    let Some(uffd) = open(Features::THREAD_ID.union(Features::EXACT_ADDRESS)) else { return };
    let (memory, source) = (Memory::new(2), Memory::new(1));
    source.fill(0, 1, 0x33);
    register(&uffd, memory.range(), Mode::MISSING);
    let mut buffer = EventBuffer::new();
    assert_eq!(uffd.read(&mut buffer), ReadOutcome::Empty);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            // SAFETY: within the mapping; the other thread resolves the fault.
            let value = unsafe { memory.at(0).add(5).read_volatile() };
            (value, rustix::thread::gettid().as_raw_nonzero().get() as u32)
        });
        let Event::Fault { addr, access, thread } = next_event(&uffd, &mut buffer) else { panic!() };
        assert_eq!((addr.get(), access), (memory.addr(0).get() + 5, Access::Read));
        assert!(copy(&uffd, memory.part(0, 1), &source).is_complete());
        let (value, id) = reader.join().unwrap();
        assert_eq!((value, thread), (0x33, Some(id)));

        let writer = scope.spawn(|| memory.fill(1, 1, 4));
        let Event::Fault { access, .. } = next_event(&uffd, &mut buffer) else { panic!() };
        assert_eq!(access, Access::Write);
        assert!(uffd.zero(memory.part(1, 1), false).is_complete());
        uffd.wake(memory.part(1, 1));
        writer.join().unwrap();
    });
    assert_eq!(memory.ends(1), (4, 4));
}

#[test]
fn a_write_to_a_protected_page_waits_until_it_is_lifted() {
    let Some(uffd) = open(Features::WP) else { return };
    let memory = Memory::new(1);
    memory.fill(0, 1, 1);
    register(&uffd, memory.range(), Mode::MISSING_AND_WP);
    assert!(uffd.write_protect(memory.range(), true, false).is_complete());
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| memory.fill(0, 1, 2));
        let mut buffer = EventBuffer::new();
        let Event::Fault { access, thread, addr } = next_event(&uffd, &mut buffer) else { panic!() };
        assert_eq!((access, thread, addr), (Access::WriteProtected, None, memory.addr(0)));
        assert_eq!(memory.ends(0), (1, 1));
        assert!(uffd.write_protect(memory.range(), false, true).is_complete());
        writer.join().unwrap();
    });
    assert_eq!(memory.ends(0), (2, 2));
    let other = Memory::new(1);
    assert_eq!(uffd.write_protect(other.range(), true, false), stopped(0, Stop::Unmapped));
}

/// The kernel refuses to fill while an event waits: EAGAIN with -EAGAIN in the count.
#[test]
fn a_pending_event_stops_a_copy_until_it_is_read() {
    let Some(uffd) = open(Features::EVENT_REMOVE) else { return };
    let (memory, source) = (Memory::new(4), Memory::new(4));
    source.fill(0, 4, 0x77);
    register(&uffd, memory.range(), Mode::MISSING);
    std::thread::scope(|scope| {
        let remover = scope.spawn(|| {
            let part = memory.part(2, 2);
            // SAFETY: the test's own memory.
            unsafe { rustix::mm::madvise(memory.at(2).cast(), part.bytes(), Advice::LinuxDontNeed) }
        });
        // Fill and empty the first pages until the other thread's event is in the way.
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut page = 0;
        let refused = loop {
            assert!(Instant::now() < deadline, "the event never showed");
            std::thread::sleep(Duration::from_millis(20));
            let progress = copy(&uffd, memory.part(page, 1), &source);
            if !progress.is_complete() {
                break progress;
            }
            page += 1;
        };
        assert_eq!(refused, stopped(0, Stop::Pending));
        assert_eq!(uffd.zero(memory.part(1, 1), true), stopped(0, Stop::Pending));
        let mut buffer = EventBuffer::new();
        let Event::Remove(range) = next_event(&uffd, &mut buffer) else { panic!() };
        assert_eq!(range, memory.part(2, 2));
        remover.join().unwrap().unwrap();
        assert!(copy(&uffd, memory.part(2, 2), &source).is_complete());
    });
    assert_eq!(memory.ends(3), (0x77, 0x77));
}

#[test]
fn unmap_and_remap_are_told() {
    let wanted = Features::EVENT_UNMAP.union(Features::EVENT_REMAP);
    let Some(uffd) = open(wanted) else { return };
    let (memory, target) = (Memory::new(4), Memory::new(2));
    register(&uffd, memory.range(), Mode::MISSING);
    let mut buffer = EventBuffer::new();
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let flags = rustix::mm::MremapFlags::MAYMOVE;
            let bytes = 2 * PAGE_SIZE;
            // SAFETY: both are the test's own mappings, and nothing refers to them.
            unsafe {
                rustix::mm::mremap_fixed(memory.at(2).cast(), bytes, bytes, flags, target.at(0).cast())
                    .unwrap();
                rustix::mm::munmap(memory.at(0).cast(), PAGE_SIZE).unwrap();
            }
        });
        let mut events = Vec::new();
        while !mover.is_finished() {
            if let ReadOutcome::Events(_) = uffd.read(&mut buffer) {
                events.extend(buffer.by_ref());
            }
        }
        mover.join().unwrap();
        let text = format!("{events:?}");
        let [Event::Remap { from, to, len }, Event::Unmap(old), Event::Unmap(first)] = events[..] else {
            panic!("{text}")
        };
        assert_eq!((from, to, len), (memory.addr(2), target.addr(0), 2 * PAGE_SIZE));
        assert_eq!((old, first), (memory.part(2, 2), memory.part(0, 1)));
    });
    // Still registered where it went.
    assert!(uffd.zero(target.range(), true).is_complete());
    drop(uffd);
    // Most of it is unmapped, and somebody else's by now.
    core::mem::forget(memory);
}

/// The kernel looks for the mapping before it looks whether an event waits, so that a request which meets an mremap
/// half way finds none; taken at its word, the page would be given up that is elsewhere now.
#[test]
fn a_mapping_that_is_on_its_way_is_not_called_unmapped() {
    let source = Memory::new(1);
    let mut buffer = EventBuffer::new();
    for _ in 0..200 {
        let (memory, target) = (Memory::new(64), Memory::new(64));
        // Closed before they are unmapped, which nobody would read.
        let Some(uffd) = open(Features::EVENT_UNMAP.union(Features::EVENT_REMAP)) else { return };
        memory.fill(0, 64, 1);
        register(&uffd, memory.range(), Mode::MISSING);
        let refused = std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                let (bytes, flags) = (64 * PAGE_SIZE, rustix::mm::MremapFlags::MAYMOVE);
                // SAFETY: both are the test's own mappings, and nothing refers to them.
                unsafe {
                    rustix::mm::mremap_fixed(memory.at(0).cast(), bytes, bytes, flags, target.at(0).cast())
                }
                .unwrap();
            });
            let refused = loop {
                let progress = copy(&uffd, memory.part(7, 1), &source);
                if progress.stop != Stop::Present {
                    break progress;
                }
            };
            // Whatever it was, the other thread must get on.
            while !mover.is_finished() {
                if let ReadOutcome::Events(_) = uffd.read(&mut buffer) {
                    buffer.by_ref().for_each(drop);
                }
            }
            refused
        });
        assert_eq!(refused, stopped(0, Stop::Pending));
        assert_eq!(target.ends(7), (1, 1));
        core::mem::forget(memory);
    }
}

#[test]
fn a_forked_child_comes_with_a_usable_descriptor() {
    let _alone = FORKING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(uffd) = open(Features::EVENT_FORK.union(Features::MOVE)) else { return };
    let memory = Memory::new(1);
    memory.inherit(true);
    let source = Memory::new(1);
    source.fill(0, 1, 0x42);
    register(&uffd, memory.range(), Mode::MISSING);
    std::thread::scope(|scope| {
        let child = scope.spawn(|| fork_and_read(memory.at(0)));
        let mut buffer = EventBuffer::new();
        let Event::Fork(theirs) = next_event(&uffd, &mut buffer) else { panic!() };
        assert_eq!(theirs.features(), uffd.features());
        let Event::Fault { addr, access, .. } = next_event(&theirs, &mut buffer) else { panic!() };
        assert_eq!((addr, access), (memory.addr(0), Access::Read));
        assert!(copy(&theirs, memory.range(), &source).is_complete());
        assert_eq!(child.join().unwrap(), 0x42, "the child's exit status is what it read");
    });
}

/// A fork is told to every descriptor that asked, so that two such tests at once would read each other's.
static FORKING: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Forks; the child reads one byte and exits with it.
fn fork_and_read(at: *const u8) -> i32 {
    // SAFETY: the child only reads one byte of a mapping that it inherits and then exits, so that it needs
    // no lock that another thread may have held.
    match unsafe { libc_free_fork() } {
        // SAFETY: as above; the parent resolves the fault.
        0 => exit_group(i32::from(unsafe { at.read_volatile() })),
        pid => {
            let pid = rustix::process::Pid::from_raw(pid).expect("fork works");
            let status = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            status.unwrap().unwrap().1.exit_status().unwrap()
        }
    }
}

unsafe extern "C" {
    #[link_name = "fork"]
    fn libc_free_fork() -> i32;
    #[link_name = "_exit"]
    safe fn exit_group(status: i32) -> !;
}

#[test]
fn an_unread_fork_closes_its_descriptor() {
    let _alone = FORKING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(uffd) = open(Features::EVENT_FORK) else { return };
    let memory = Memory::new(1);
    memory.inherit(true);
    register(&uffd, memory.range(), Mode::MISSING);
    let mut buffer = EventBuffer::new();
    std::thread::scope(|scope| {
        // The child's read is let go when the buffer closes its descriptor, and finds zeros.
        let child = scope.spawn(|| fork_and_read(memory.at(0)));
        let deadline = Instant::now() + Duration::from_secs(10);
        while uffd.read(&mut buffer) == ReadOutcome::Empty {
            assert!(Instant::now() < deadline);
        }
        assert_eq!(uffd.read(&mut buffer), ReadOutcome::Events(1), "a full buffer is kept");
        drop(buffer);
        assert_eq!(child.join().unwrap(), 0);
    });
}

#[test]
fn registering_says_why_not() {
    let (Some(uffd), Some(other)) = (open(Features::NONE), open(Features::NONE)) else { return };
    let memory = Memory::new(2);
    register(&uffd, memory.range(), Mode::MISSING);
    register(&uffd, memory.range(), Mode::MISSING);
    // SAFETY: the tests' own memory, and the calls fail.
    unsafe {
        assert_eq!(other.register(memory.range(), Mode::MISSING), Err(RegisterError::Taken));
        // Low addresses that the kernel hands out to nobody.
        let gone = VaRange::page(Vpn::new(256));
        assert_eq!(uffd.register(gone, Mode::MISSING), Err(RegisterError::Unmapped));
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let none = core::ptr::null_mut();
        let page = rustix::mm::mmap(none, PAGE_SIZE, ProtFlags::READ, MapFlags::PRIVATE, &file, 0).unwrap();
        let range = VaRange::new(VirtAddr::of(page), PAGE_SIZE).unwrap();
        assert_eq!(uffd.register(range, Mode::MISSING_AND_WP), Err(RegisterError::Refused));
        rustix::mm::munmap(page, PAGE_SIZE).unwrap();
    }
    uffd.unregister(memory.range()).unwrap();
    register(&other, memory.range(), Mode::MISSING);
}

#[test]
fn poison_fills_like_a_page() {
    let Some(uffd) = open(Features::POISON) else { return };
    let memory = Memory::new(2);
    register(&uffd, memory.range(), Mode::MISSING);
    assert!(uffd.poison(memory.part(0, 1)).is_complete());
    assert_eq!(uffd.zero(memory.part(0, 1), true), stopped(0, Stop::Present));
}

#[test]
fn errors_say_what_would_help() {
    let error = OpenError::Denied { syscall: Errno::PERM, device: Errno::ACCESS };
    let text = error.to_string();
    for part in ["vm.unprivileged_userfaultfd=1", "/dev/userfaultfd", "CAP_SYS_PTRACE"] {
        assert!(text.contains(part), "{text}");
    }
    let error = OpenError::Denied { syscall: Errno::NOSYS, device: Errno::NOENT };
    assert!(error.to_string().contains("CONFIG_USERFAULTFD"));
}

#[test]
fn both_ways_to_open_are_known() {
    for (name, way) in [("system call", open_syscall()), ("device", open_device())] {
        match way {
            Ok(fd) => assert!(handshake(fd.as_fd(), Features::NONE).is_ok(), "{name}"),
            Err(errno) => println!("{name}: {errno}"),
        }
    }
}
