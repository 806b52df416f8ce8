//! The keeper on the running kernel, with this process in the place of an agent.
//!
//! Where the kernel permits no userfaultfd with fork events, a test says so and passes. The tests take turns:
//! a userfaultfd hears of every fork of the process.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::mm::{Advice, MremapFlags};
use rustix::process::Pid;
use uhmm::tree::client::{self, ClientError, Joined};
use uhmm::tree::keeper::{Tree, TreeOptions};
use uhmm::tree::protocol::{FIRST_PFN, Farewell, Refusal};
use uhmm::tree::shared::ProcessBlock;
use uhmm::tree::table::Table;
use uhmm_addr::{ByteSize, PAGE_SIZE, PageCount, Pfn, VaRange, Vpn};
use uhmm_core::device::Transfer;
use uhmm_core::host::Install;
use uhmm_core::pagemap::{DescriptorMemory, Pagemap};
use uhmm_core::pagetable::PageWord;
use uhmm_core::stats::Counter;
use uhmm_devices::{DeviceUrl, Handle, OpenOptions, Opened};
use uhmm_sys::child::{self, Change, Side};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::socket::Connection;
use uhmm_sys::uffd::{Event, EventBuffer, Features, Mode, ReadOutcome, Uffd};

static TURN: Mutex<()> = Mutex::new(());

/// A keeper in a thread, and the front's end of its connection.
struct Kept {
    name: String,
    front: Option<Connection>,
    keeper: Option<JoinHandle<()>>,
    _turn: MutexGuard<'static, ()>,
}

impl Kept {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let url = DeviceUrl::Memory { size: ByteSize::mib(8) };
        let device = Opened::open(&url, OpenOptions { shared: true, ..OpenOptions::default() }).unwrap();
        let options = TreeOptions { budget: ByteSize::mib(64), force_fallback: false, track: true };
        let tree = Tree::prepare(&device, b"no library", options).unwrap();
        let name = tree.socket_name().to_owned();
        let (front, end) = Connection::pair().unwrap();
        let keeper = Some(thread::spawn(move || tree.keep(end)));
        Self { name, front: Some(front), keeper, _turn: turn }
    }

    fn join(&self, cookie: u64) -> Result<Joined, ClientError> {
        client::join(&self.name, cookie)
    }

    fn totals(&self) -> uhmm::tree::shared::Totals {
        client::report(self.front.as_ref().unwrap()).unwrap()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        drop(self.front.take());
        let ended = self.keeper.take().unwrap().join();
        if !thread::panicking() {
            ended.unwrap();
        }
    }
}

/// The device and its counts, as an agent has them.
struct Shared {
    pagemap: Pagemap,
    _counts: Mapping,
}

impl Shared {
    fn of(joined: &Joined) -> Self {
        let welcome = joined.welcome;
        let fd = joined.device.try_clone().unwrap();
        let handle = Handle { backing: welcome.backing, size: welcome.device_size, fd };
        let device = uhmm_devices::from_handle(handle).unwrap();
        let bytes = DescriptorMemory::bytes_for(device.capacity()).next_multiple_of(PAGE_SIZE);
        let counts = Mapping::shared(joined.descriptors.as_fd(), 0, bytes, "").unwrap();
        let memory = DescriptorMemory::new(counts.as_ptr().cast());
        // SAFETY: the file is the device's own, and the mapping lives behind the pagemap.
        let pagemap = unsafe { Pagemap::over(FIRST_PFN, device, memory) };
        Self { pagemap, _counts: counts }
    }

    /// Device pages with the given first bytes, each with one reference.
    fn pages(&self, bytes: &[u8]) -> Vec<Pfn> {
        let room = Mapping::reserve(PAGE_SIZE, "uhmm test").unwrap();
        let one = |byte: &u8| {
            let pfn = self.pagemap.allocate(PageCount::ONE).unwrap().start;
            // SAFETY: a page of our own, reached through pointers alone.
            let transfer = unsafe {
                room.as_ptr().write_bytes(*byte, PAGE_SIZE);
                Transfer::new(self.pagemap.device_page(pfn), room.as_ptr(), PageCount::ONE)
            };
            let mut batch = [transfer];
            self.pagemap.device().write(&mut batch);
            batch[0].outcome().unwrap();
            pfn
        };
        bytes.iter().map(one).collect()
    }

    fn live(&self) -> usize {
        self.pagemap.live().get()
    }
}

fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_process_gets_all_it_needs_and_what_it_counts_is_kept() {
    let kept = Kept::new();
    let joined = kept.join(0).unwrap();
    let welcome = joined.welcome;
    assert_eq!((welcome.budget, welcome.track, welcome.child), (ByteSize::mib(64), true, false));
    assert_eq!(welcome.device_pages(), PageCount::new(2048));
    let shared = Shared::of(&joined);
    assert_eq!(shared.pages(b"ab").len(), 2);
    let table = Table::adopt(joined.table.try_clone().unwrap()).unwrap();
    assert_eq!(table.load(Vpn::new(5)), PageWord::EMPTY);
    let block = Mapping::shared(joined.stats.as_fd(), welcome.block_offset(), PAGE_SIZE, "").unwrap();
    // SAFETY: the mapping is that of a block, and lives to the end of the test.
    let counted = unsafe { ProcessBlock::at(block.as_ptr()) };
    assert_eq!(counted.pid.load(Ordering::Relaxed), u64::from(std::process::id()));
    counted.note_resident(ByteSize::mib(9));
    counted.stats.add(Counter::Faults, 3);
    counted.latency.record(10_000);
    let totals = kept.totals();
    assert_eq!((totals.processes, totals.peak_resident_bytes, totals.device_pages), (1, 9 << 20, 2));
    client::farewell(&joined.connection, Farewell::DeviceFull).unwrap();
    drop(joined);
    eventually("the block is free", || counted.pid.load(Ordering::Relaxed) == 0);
    let totals = kept.totals();
    assert_eq!((totals.processes, totals.get(Counter::Faults), totals.out_of_memory), (1, 3, 1));
    assert_eq!(totals.latency.total(), 1);
}

#[test]
fn what_a_process_owned_is_free_when_it_is_gone() {
    let kept = Kept::new();
    let (joined, other) = (kept.join(0).unwrap(), kept.join(0).unwrap());
    let shared = Shared::of(&other);
    let table = Table::adopt(joined.table.try_clone().unwrap()).unwrap();
    let pfns = shared.pages(b"abcd");
    for (page, word) in [
        (9, PageWord::device(pfns[0])),
        (700, PageWord::tracked(pfns[1])),
        (1 << 30, PageWord::moving_in(pfns[2])),
        (11, PageWord::RESIDENT),
        (12, PageWord::POISONED),
        // Nobody's: a table may hold anything.
        (13, PageWord::device(Pfn::new(5))),
    ] {
        table.store(Vpn::new(page), word).unwrap();
    }
    // A second reference to one, and a page that no table knows.
    shared.pagemap.get(pfns[0]);
    drop(joined);
    eventually("what the words owned is free", || shared.live() == 2);
    assert_eq!(shared.pagemap.count(pfns[0]), 1);
    drop(other);
    eventually("nobody is left, and so no page is in use", || shared.live() == 0);
}

#[test]
fn children_that_nobody_announces_and_strangers_are_refused() {
    let kept = Kept::new();
    let began = Instant::now();
    let silent = Connection::connect(&kept.name).unwrap();
    let rude = Connection::connect(&kept.name).unwrap();
    rude.send(b"GET / HTTP/1.1", &[]).unwrap();
    match kept.join(77) {
        Err(ClientError::Refused(Refusal::UnknownChild)) => {}
        other => panic!("{other:?}"),
    }
    assert!(began.elapsed() >= Duration::from_secs(4));
    assert_eq!(kept.totals().failed, 1);
    let mut buffer = [0; 16];
    for connection in [silent, rude] {
        connection.set_receive_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(connection.recv(&mut buffer, &mut Default::default()).unwrap(), 0);
    }
}

// --- fork ---------------------------------------------------------------------------------------------------

const WANTED: Features = Features::EVENT_FORK
    .union(Features::EVENT_REMAP)
    .union(Features::EVENT_REMOVE)
    .union(Features::EVENT_UNMAP)
    .union(Features::WP);
const PAGES: usize = 16;
/// What the first pages hold: four on the device, then one in RAM, then a tracked one, then one that is absent.
const BYTES: &[u8] = b"abcd";

/// A process with memory on the device, whose forks are announced to the keeper.
struct Parent {
    joined: Joined,
    shared: Shared,
    // Before the memory: unmapping would wait until somebody reads the event.
    uffd: Uffd,
    memory: Mapping,
    pfns: Vec<Pfn>,
    cookies: AtomicU32,
    /// How long the announcement is held back.
    delay: Duration,
}

impl Parent {
    fn new(kept: &Kept) -> Option<Self> {
        let uffd = match Uffd::open(WANTED) {
            Ok(uffd) if uffd.features().contains(WANTED) => uffd,
            other => {
                println!("skipped: no userfaultfd with fork events: {other:?}");
                return None;
            }
        };
        let joined = kept.join(0).unwrap();
        let shared = Shared::of(&joined);
        let pfns = shared.pages(b"abcdt");
        let memory = Mapping::reserve(PAGES * PAGE_SIZE, "uhmm test").unwrap();
        memory.advise_no_huge().unwrap();
        let this =
            Self { joined, shared, memory, uffd, pfns, cookies: AtomicU32::new(0), delay: Duration::ZERO };
        // SAFETY: the page is ours and writable.
        unsafe { this.at(4).write_bytes(b'r', PAGE_SIZE) };
        // SAFETY: the memory is ours, and only children touch what is absent.
        unsafe { this.uffd.register(this.memory.range(), Mode::MISSING_AND_WP) }.unwrap();
        let source = Mapping::reserve(PAGE_SIZE, "uhmm test").unwrap();
        // SAFETY: a page of our own; what is installed is what the device page of the word holds.
        let installed = unsafe {
            source.as_ptr().write_bytes(b't', PAGE_SIZE);
            this.uffd.copy(this.range(5, 1), source.as_ptr(), Install::Tracked, true)
        };
        assert!(installed.is_complete());
        Some(this)
    }

    fn at(&self, page: usize) -> *mut u8 {
        self.memory.as_ptr().as_ptr().wrapping_add(page * PAGE_SIZE)
    }

    fn range(&self, page: usize, pages: usize) -> VaRange {
        let first = self.memory.range().first().forward(PageCount::new(page));
        VaRange::of_pages(first, PageCount::new(pages)).unwrap()
    }

    /// A child that runs `run` and ends with what it says.
    fn fork(&self, run: impl FnOnce() -> i32) -> Pid {
        let (ready, done) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| self.announce_forks(&ready, &done));
            // While the kernel waits for the event to be read, the C library holds the allocator's locks, and
            // a thread that is only being made wants them.
            while !ready.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            // SAFETY: the child reads memory, makes system calls and ends.
            let side = unsafe { child::fork() }.unwrap();
            if side == Side::Child {
                child::exit_now(run());
            }
            done.store(true, Ordering::Relaxed);
            match side {
                Side::Parent(pid) => pid,
                Side::Child => unreachable!(),
            }
        })
    }

    fn announce_forks(&self, ready: &AtomicBool, done: &AtomicBool) {
        let mut buffer = EventBuffer::new();
        let mut seen = false;
        ready.store(true, Ordering::Relaxed);
        while !(seen && done.load(Ordering::Relaxed)) {
            match self.uffd.read(&mut buffer) {
                ReadOutcome::Events(_) => {}
                ReadOutcome::Empty => thread::sleep(Duration::from_micros(100)),
                other => panic!("{other:?}"),
            }
            for event in &mut buffer {
                let Event::Fork(uffd) = event else { panic!("{event:?}") };
                thread::sleep(self.delay);
                let cookie = u64::from(self.cookies.fetch_add(1, Ordering::Relaxed)) + 1;
                let table = self.child_table();
                client::announce(&self.joined.connection, cookie, &uffd, table.as_fd()).unwrap();
                seen = true;
            }
        }
    }

    fn child_table(&self) -> Table {
        let table = Table::create().unwrap();
        let store = |page, word| table.store(self.range(page, 1).first(), word).unwrap();
        for (page, pfn) in self.pfns.iter().enumerate() {
            self.shared.pagemap.get(*pfn);
            if page < 4 {
                store(page, PageWord::device(*pfn));
            } else {
                store(5, PageWord::tracked(*pfn));
            }
        }
        store(4, PageWord::RESIDENT);
        table
    }

    fn counts(&self) -> Vec<u32> {
        self.pfns.iter().map(|pfn| self.shared.pagemap.count(*pfn)).collect()
    }

    fn all_once(&self) {
        eventually("the child's references are gone", || self.counts() == [1; 5]);
    }
}

/// First and last byte of a page, if they are equal. Safe in a child after fork.
fn byte(at: *mut u8) -> u8 {
    // SAFETY: every caller passes a page that is mapped and readable.
    let (first, last) = unsafe { (at.read_volatile(), at.add(PAGE_SIZE - 1).read_volatile()) };
    if first == last { first } else { 0xff }
}

fn expect(at: *mut u8, bytes: &[u8]) -> bool {
    bytes.iter().enumerate().all(|(page, wanted)| byte(at.wrapping_add(page * PAGE_SIZE)) == *wanted)
}

fn end_of(pid: Pid) -> Change {
    let mut change = None;
    eventually("the child ends", || {
        change = child::change_of(pid).unwrap();
        change.is_some()
    });
    change.unwrap()
}

#[test]
fn a_child_without_an_agent_finds_its_pages() {
    let kept = Kept::new();
    let Some(parent) = Parent::new(&kept) else { return };
    let at = parent.at(0);
    let child = parent.fork(|| if expect(at, b"abcdrt\0\0") { 0 } else { 1 });
    assert_eq!(end_of(child), Change::Exited(0));
    parent.all_once();
}

#[test]
fn after_a_second_a_child_has_everything_and_needs_nobody() {
    let kept = Kept::new();
    let Some(parent) = Parent::new(&kept) else { return };
    let at = parent.at(0);
    let child = parent.fork(|| {
        thread::sleep(Duration::from_millis(2500));
        if expect(at, b"abcdrt\0\0") { 0 } else { 1 }
    });
    parent.all_once();
    assert_eq!(child::change_of(child).unwrap(), None);
    // Its agent, late, starts afresh.
    let late = kept.join(1).unwrap();
    assert!(!late.welcome.child && late.uffd.is_none());
    assert_eq!(end_of(child), Change::Exited(0));
}

#[test]
fn a_child_that_changes_its_mappings_finds_what_it_should() {
    let kept = Kept::new();
    let Some(parent) = Parent::new(&kept) else { return };
    let at = parent.at(0);
    let child = parent.fork(|| {
        let page = |n: usize| at.wrapping_add(n * PAGE_SIZE);
        // SAFETY: the child is alone, and all of this is memory of its own.
        let moved = unsafe {
            // `b` is given up, `d` goes away, `c` moves.
            rustix::mm::madvise(page(1).cast(), PAGE_SIZE, Advice::LinuxDontNeed).unwrap();
            rustix::mm::munmap(page(3).cast(), PAGE_SIZE).unwrap();
            let flags = MremapFlags::MAYMOVE;
            rustix::mm::mremap_fixed(page(2).cast(), PAGE_SIZE, PAGE_SIZE, flags, page(3).cast()).unwrap()
        };
        // A write to a page that is write-protected because the device has it too.
        // SAFETY: its own writable page.
        unsafe { page(5).write_bytes(b'w', PAGE_SIZE) };
        let good = expect(at, b"a\0") && byte(moved.cast()) == b'c' && expect(page(4), b"rw\0");
        if good { 0 } else { 1 }
    });
    assert_eq!(end_of(child), Change::Exited(0));
    parent.all_once();
    assert_eq!(byte(parent.at(5)), b't');
}

#[test]
fn a_grandchild_finds_its_pages_too() {
    let kept = Kept::new();
    let Some(parent) = Parent::new(&kept) else { return };
    let at = parent.at(0);
    let child = parent.fork(|| {
        let first = byte(at) == b'a';
        // SAFETY: the child has one thread.
        match unsafe { child::fork() } {
            Ok(Side::Child) => child::exit_now(if first && expect(at, b"abcdrt\0") { 0 } else { 1 }),
            Ok(Side::Parent(grandchild)) => loop {
                match child::change_of(grandchild) {
                    Ok(Some(change)) => return if change == Change::Exited(0) { 0 } else { 2 },
                    _ => thread::sleep(Duration::from_millis(1)),
                }
            },
            Err(_) => 3,
        }
    });
    assert_eq!(end_of(child), Change::Exited(0));
    parent.all_once();
}

#[test]
fn a_child_that_is_killed_leaves_nothing() {
    let kept = Kept::new();
    let Some(parent) = Parent::new(&kept) else { return };
    let child = parent.fork(|| {
        thread::sleep(Duration::from_secs(60));
        0
    });
    rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
    assert!(matches!(end_of(child), Change::Killed(9)));
    parent.all_once();
}

fn claim(delay: Duration, early: bool) {
    let kept = Kept::new();
    let Some(mut parent) = Parent::new(&kept) else { return };
    parent.delay = delay;
    let flags =
        Mapping::shared(uhmm_sys::memfd::Memfd::create("uhmm-test", 4096, None).unwrap().fd(), 0, 4096, "")
            .unwrap();
    // SAFETY: an aligned word of shared memory, used as an atomic by parent and child.
    let flag: &AtomicU32 = unsafe { NonNull::cast(flags.as_ptr()).as_ref() };
    let at = parent.at(0);
    let (child, joined) = thread::scope(|scope| {
        // The child's agent may be faster than its parent's message.
        let agent = early.then(|| scope.spawn(|| kept.join(1).unwrap()));
        let child = parent.fork(|| {
            let first = byte(at) == b'a';
            while flag.load(Ordering::Acquire) == 0 {
                std::hint::spin_loop();
            }
            if first && expect(at, b"aBcdrt\0") { 0 } else { 1 }
        });
        let joined = match agent {
            Some(agent) => agent.join().unwrap(),
            None => {
                eventually("the keeper has served the child", || parent.counts()[0] == 1);
                kept.join(1).unwrap()
            }
        };
        (child, joined)
    });
    assert!(joined.welcome.child);
    let uffd = joined.uffd.as_ref().unwrap();
    let table = Table::adopt(joined.table.try_clone().unwrap()).unwrap();
    let word = table.load(parent.range(0, 1).first());
    let was_served = word == PageWord::RESIDENT;
    assert!(was_served || (early && word == PageWord::device(parent.pfns[0])), "{word:?}");
    assert_eq!(table.load(parent.range(1, 1).first()), PageWord::device(parent.pfns[1]));
    // From here on nobody but us serves it. The second page is changed to show who did.
    let room = Mapping::reserve(PAGE_SIZE, "uhmm test").unwrap();
    let mut buffer = EventBuffer::new();
    flag.store(1, Ordering::Release);
    let change = loop {
        if let Some(change) = child::change_of(child).unwrap() {
            break change;
        }
        let _ = uffd.read(&mut buffer);
        for event in &mut buffer {
            let Event::Fault { addr, .. } = event else { panic!("{event:?}") };
            let page = addr.page();
            let byte = match page.since(parent.memory.range().first()).get() {
                1 => b'B',
                n => *BYTES.get(n).unwrap_or(&0),
            };
            // SAFETY: a page of our own.
            unsafe { room.as_ptr().write_bytes(byte, PAGE_SIZE) };
            // SAFETY: as above; the child is to find what is in it.
            let _ = unsafe { uffd.copy(VaRange::page(page), room.as_ptr(), Install::Writable, true) };
        }
        thread::sleep(Duration::from_micros(100));
    };
    assert_eq!(change, Change::Exited(0));
    assert_eq!(parent.counts()[1..], [2; 4]);
    drop(joined);
    parent.all_once();
}

#[test]
fn a_child_is_handed_over_to_its_agent() {
    claim(Duration::ZERO, false);
}

#[test]
fn a_child_that_comes_before_its_announcement_waits() {
    claim(Duration::from_millis(300), true);
}
