//! Private mappings of files, whose written pages become memory that can be moved, beside everything that a program may
//! do with them meanwhile.

mod common;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::child::{expect_well, fork};
use common::{PAGE, Random, Setup, WORDS, eventually, in_process, name_of, part, settle, word};
use rustix::mm::{Advice, MapFlags, MprotectFlags, MsyncFlags, ProtFlags};
use uhmm::space::{DetachError, Detached, MapError, MappingKind};
use uhmm::{ByteSize, Counter, PageCount, PinFor, Skip, Space, VaRange, VirtAddr};

with_engine!(Signal, signal_move, signal_fallback: who_hears_nothing_detaches_nothing);
with_engine!(Threads, threads_move, threads_fallback:
    written_pages_move_and_the_files_own_stay,
    what_is_read_only_moves_as_well,
    what_is_special_stays,
    a_program_that_locks_what_it_maps,
    what_is_shared_stays,
    no_store_is_lost,
    discards_beside_it,
    a_file_that_becomes_shorter,
    mappings_that_move_and_go,
    a_child_has_the_pages,
    forks_beside_it,
);

const PAGES: usize = 64;

/// A file without a name, each word of which says where it is.
fn file(pages: usize) -> File {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = std::env::temp_dir().join(format!("uhmm-detach-{}-{number}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&name).unwrap();
    std::fs::remove_file(name).unwrap();
    let bytes: Vec<u8> = (0..pages * WORDS).flat_map(|n| word(0, n).to_ne_bytes()).collect();
    rustix::io::pwrite(&file, &bytes, 0).unwrap();
    file
}

/// A mapping of a file, unmapped when dropped.
struct Mapped {
    range: VaRange,
}

impl Mapped {
    fn new(file: &File, pages: usize, flags: MapFlags) -> Self {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free place.
        let at =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), pages * PAGE, prot, flags, file.as_fd(), 0) };
        let at = at.unwrap().cast::<u8>();
        at.expose_provenance();
        Self { range: VaRange::new(VirtAddr::of(at), pages * PAGE).unwrap() }
    }

    fn private(file: &File, pages: usize) -> Self {
        Self::new(file, pages, MapFlags::PRIVATE)
    }

    fn at(&self, page: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.range.start().get() + page * PAGE)
    }

    /// Word `n` of page `page`, which everybody uses as an atomic.
    fn word(&self, page: usize, n: usize) -> &AtomicU64 {
        // SAFETY: an aligned word of the mapping.
        unsafe { &*self.at(page).cast::<AtomicU64>().add(n) }
    }

    /// Writes the pattern of `seed` to some pages.
    fn fill(&self, first: usize, pages: usize, seed: u64) {
        for at in first * WORDS..(first + pages) * WORDS {
            self.word(at / WORDS, at % WORDS).store(word(seed, at), Ordering::Relaxed);
        }
    }

    /// Whether they have it. For children as well, which must not panic.
    fn holds(&self, first: usize, pages: usize, seed: u64) -> bool {
        (first * WORDS..(first + pages) * WORDS)
            .all(|at| self.word(at / WORDS, at % WORDS).load(Ordering::Relaxed) == word(seed, at))
    }

    fn advise(&self, first: usize, pages: usize, advice: Advice) {
        // SAFETY: the test's own memory, of which it knows what becomes.
        unsafe { rustix::mm::madvise(self.at(first).cast(), pages * PAGE, advice) }.unwrap();
    }

    fn protect(&self, space: &Space, first: usize, pages: usize, how: MprotectFlags) {
        // SAFETY: as above.
        let protect = || unsafe { rustix::mm::mprotect(self.at(first).cast(), pages * PAGE, how) }.unwrap();
        space.protecting(part(self.range, first, pages), protect);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, or what took its place.
        unsafe { rustix::mm::munmap(self.at(0).cast(), self.range.bytes()) }.unwrap();
    }
}

/// `None`, and a word of it, where the kernel lets no pages be held.
fn detach(space: &Space, range: VaRange) -> Option<Detached> {
    // SAFETY: the tests' own memory, unmapped or unwatched at the end; mappings change by way of the space, and nothing
    // is transferred past the page table.
    let done = unsafe { space.detach(range) }.unwrap();
    if done.pages.is_zero() && done.busy > PageCount::ONE {
        let test = thread::current();
        common::skip(
            test.name().unwrap_or("detach"),
            "no pages can be held: io_uring is not permitted, or Linux is older than 6.5",
        );
        return None;
    }
    Some(done)
}

fn counts(pages: usize, clean: usize, special: usize) -> Detached {
    let [pages, clean, special] = [pages, clean, special].map(PageCount::new);
    Detached { pages, clean, special, ..Detached::default() }
}

/// What the mappings of a range are, without their addresses.
fn kinds(space: &Space, range: VaRange) -> Vec<(MappingKind, usize)> {
    let mut found: Vec<(MappingKind, usize)> = Vec::new();
    for mapping in space.mappings(range).unwrap() {
        match found.last_mut() {
            Some((kind, pages)) if *kind == mapping.kind => *pages += mapping.range.pages().get(),
            _ => found.push((mapping.kind, mapping.range.pages().get())),
        }
    }
    found
}

fn who_hears_nothing_detaches_nothing(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let file = file(PAGES);
    let mapped = Mapped::private(&file, PAGES);
    mapped.fill(0, PAGES, 1);
    // SAFETY: the test's own memory.
    assert!(matches!(unsafe { space.detach(mapped.range) }, Err(DetachError::Deaf)));
    assert_eq!(kinds(&space, mapped.range), [(MappingKind::PrivateFile, PAGES)]);
    // SAFETY: as above.
    assert!(unsafe { space.adopt(mapped.at(0), PAGES * PAGE) }.is_err());
    assert!(mapped.holds(0, PAGES, 1));
}

fn written_pages_move_and_the_files_own_stay(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let file = file(PAGES);
    let mapped = Mapped::private(&file, PAGES);
    // Written, read, and never touched; in a mapping of which nobody asks about the ends.
    mapped.fill(2, 20, 1);
    mapped.fill(40, 10, 1);
    assert!(mapped.holds(22, 8, 0));
    // SAFETY: the test's own memory.
    assert!(matches!(unsafe { space.watch(part(mapped.range, 2, 20)) }, Err(MapError::Register(_))));
    let Some(done) = detach(&space, part(mapped.range, 1, PAGES - 2)) else { return };
    assert_eq!(done, counts(30, 32, 0));
    use MappingKind::{Anonymous, PrivateFile};
    let expected =
        [(PrivateFile, 2), (Anonymous, 20), (PrivateFile, 18), (Anonymous, 10), (PrivateFile, PAGES - 50)];
    assert_eq!(kinds(&space, mapped.range), expected);
    assert!(mapped.holds(2, 20, 1) && mapped.holds(22, 18, 0) && mapped.holds(40, 10, 1));
    // Watched from the start, and only these.
    for (first, pages) in [(2, 20), (40, 10)] {
        assert_eq!(space.migrate(part(mapped.range, first, pages)).unwrap().moved.get(), pages);
    }
    assert!(space.migrate(part(mapped.range, 22, 1)).is_err());
    // What is not written is the file's, as ever.
    rustix::io::pwrite(&file, &7_u64.to_ne_bytes(), (30 * PAGE) as u64).unwrap();
    rustix::io::pwrite(&file, &7_u64.to_ne_bytes(), (41 * PAGE) as u64).unwrap();
    assert_eq!(mapped.word(30, 0).load(Ordering::Relaxed), 7);
    assert!(mapped.holds(2, 20, 1) && mapped.holds(40, 10, 1));
    // And what is written never gets there.
    let mut found = [0; 8];
    rustix::io::pread(&file, &mut found, (2 * PAGE) as u64).unwrap();
    assert_eq!(u64::from_ne_bytes(found), word(0, 2 * WORDS));
    // Nothing is left to do, until more is written.
    assert_eq!(detach(&space, mapped.range), Some(counts(0, PAGES - 30, 0)));
    mapped.fill(30, 1, 2);
    assert_eq!(detach(&space, mapped.range), Some(counts(1, PAGES - 31, 0)));
    assert!(mapped.holds(30, 1, 2));
    // SAFETY: it looks for the mappings only.
    unsafe { rustix::mm::msync(mapped.at(0).cast(), PAGES * PAGE, MsyncFlags::SYNC) }.unwrap();
    space.unwatch(mapped.range);
    assert!(mapped.holds(2, 20, 1) && mapped.holds(40, 10, 1));
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}

fn what_is_read_only_moves_as_well(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mapped = Mapped::private(&file(PAGES), PAGES);
    mapped.fill(0, 16, 1);
    mapped.protect(&space, 0, 16, MprotectFlags::READ);
    let Some(done) = detach(&space, mapped.range) else { return };
    assert_eq!(done, counts(16, PAGES - 16, 0));
    let range = part(mapped.range, 0, 16);
    assert!(space.mappings(range).unwrap().iter().all(|mapping| mapping.read && !mapping.write));
    let done = space.migrate(range).unwrap();
    assert_eq!(done.moved.get(), 16, "{done:?}");
    assert!(mapped.holds(0, 16, 1));
    mapped.protect(&space, 0, 16, MprotectFlags::READ | MprotectFlags::WRITE);
    mapped.fill(0, 16, 2);
    settle(&space, range);
    assert_eq!(space.migrate(range).unwrap().moved.get(), 16);
    assert!(mapped.holds(0, 16, 2));
    space.unwatch(mapped.range);
}

fn what_is_special_stays(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mapped = Mapped::private(&file(PAGES), PAGES);
    mapped.fill(0, PAGES, 1);
    // SAFETY: the test's own memory.
    unsafe { rustix::mm::mlock(mapped.at(0).cast(), 8 * PAGE) }.unwrap();
    mapped.advise(16, 8, Advice::LinuxDontFork);
    mapped.advise(24, 8, Advice::LinuxDontDump);
    mapped.protect(&space, 32, 8, MprotectFlags::empty());
    let pin = space.pin(part(mapped.range, 63, 1), PinFor::Read).is_ok();
    assert!(!pin, "what is not managed cannot be pinned");
    let Some(done) = detach(&space, mapped.range) else { return };
    assert_eq!(done, counts(32, 0, 32));
    mapped.protect(&space, 32, 8, MprotectFlags::READ);
    assert!(mapped.holds(0, PAGES, 1));
    assert_eq!(kinds(&space, part(mapped.range, 0, 8)), [(MappingKind::PrivateFile, 8)]);
    space.unwatch(mapped.range);
}

/// Pages that are locked as soon as they are mapped would be there before the contents are.
fn a_program_that_locks_what_it_maps(setup: Setup) {
    in_process(&name_of(setup, "a_program_that_locks_what_it_maps"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let mapped = Mapped::private(&file(PAGES), PAGES);
        mapped.fill(0, PAGES, 1);
        // SAFETY: it locks what is mapped from now on.
        assert_eq!(unsafe { libc::mlockall(libc::MCL_FUTURE) }, 0);
        // SAFETY: the test's own memory, to which nobody does anything meanwhile.
        let done = unsafe { space.detach(mapped.range) }.unwrap();
        assert_eq!(done.pages.plus(done.busy), PageCount::new(PAGES));
        assert!(mapped.holds(0, PAGES, 1));
        // SAFETY: as above.
        unsafe { libc::munlockall() };
        space.unwatch(mapped.range);
        assert!(mapped.holds(0, PAGES, 1));
    });
}

fn what_is_shared_stays(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let file = file(PAGES);
    let mapped = Mapped::new(&file, PAGES, MapFlags::SHARED);
    mapped.fill(0, PAGES, 1);
    assert_eq!(detach(&space, mapped.range), Some(Detached::default()));
    assert_eq!(kinds(&space, mapped.range), [(MappingKind::Other, PAGES)]);
    mapped.fill(0, 1, 2);
    let mut found = [0; 8];
    rustix::io::pread(&file, &mut found, 0).unwrap();
    assert_eq!(u64::from_ne_bytes(found), word(2, 0));
}

/// Threads add, a thread reads, and the kernel stores, in every page of a mapping that is detached and moved: nothing is
/// lost, nothing goes back, and no call fails.
fn no_store_is_lost(setup: Setup) {
    const ROUNDS: usize = 60;
    const PAGES: usize = 16;
    const READ: usize = 500;
    let space = setup.space(ByteSize::mib(4));
    let file = file(PAGES);
    let numbers = file.try_clone().unwrap();
    let mut added = 0;
    for round in 0..ROUNDS {
        let mapped = Mapped::private(&file, PAGES);
        for page in 0..PAGES {
            [0, 1, READ].iter().for_each(|n| mapped.word(page, *n).store(0, Ordering::Relaxed));
        }
        let (over, start) = (AtomicBool::new(false), Barrier::new(4));
        let mapped = &mapped;
        let usable = thread::scope(|scope| {
            let writers = [0, 1].map(|writer| {
                let (over, start) = (&over, &start);
                scope.spawn(move || {
                    let (mut random, mut tally) = (Random::new(writer as u64), [0_u64; PAGES]);
                    start.wait();
                    while !over.load(Ordering::Relaxed) {
                        let page = random.below(PAGES);
                        for _ in 0..8 {
                            // No atomic step: a store that another thread's copy would undo.
                            let word = mapped.word(page, writer);
                            let seen = word.load(Ordering::Relaxed);
                            assert_eq!(seen, tally[page], "page {page} goes back");
                            word.store(seen + 1, Ordering::Relaxed);
                            tally[page] += 1;
                        }
                    }
                    tally
                })
            });
            let kernel = scope.spawn(|| {
                let mut random = Random::new(9);
                start.wait();
                let mut last = [None; PAGES];
                while !over.load(Ordering::Relaxed) {
                    let (page, from) = (random.below(PAGES), random.below(PAGES * WORDS));
                    let into = std::ptr::from_ref(mapped.word(page, READ)).cast_mut().cast();
                    // SAFETY: the kernel writes to a word of the test's memory, which is used as an atomic.
                    let got = unsafe { libc::pread(numbers.as_raw_fd(), into, 8, from as i64 * 8) };
                    assert_eq!(got, 8, "{}", std::io::Error::last_os_error());
                    last[page] = Some(word(0, from));
                    let old = random.below(PAGES);
                    let found = mapped.word(old, READ).load(Ordering::Relaxed);
                    assert_eq!(found, last[old].unwrap_or(0), "page {old}: what the kernel stored");
                }
                last
            });
            start.wait();
            let done = detach(&space, mapped.range);
            for _ in 0..round % 4 {
                let _ = space.migrate(mapped.range).map(|done| done.moved);
            }
            over.store(true, Ordering::Relaxed);
            let last = kernel.join().unwrap();
            let tallies = writers.map(|writer| writer.join().unwrap());
            for page in 0..PAGES {
                for (writer, tally) in tallies.iter().enumerate() {
                    assert_eq!(mapped.word(page, writer).load(Ordering::Relaxed), tally[page], "page {page}");
                    added += tally[page];
                }
                assert_eq!(mapped.word(page, READ).load(Ordering::Relaxed), last[page].unwrap_or(0));
            }
            if let Some(done) = done {
                assert_eq!(done, counts(PAGES, 0, 0));
            }
            done.is_some()
        });
        if !usable {
            return;
        }
        assert_eq!(space.migrate(mapped.range).unwrap().skipped.get(Skip::Failed), 0);
        space.unwatch(mapped.range);
    }
    assert!(added > 0 && space.count(Counter::Poisoned) == 0);
}

/// The program discards pages and writes them again.
fn discards_beside_it(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let file = file(PAGES);
    for round in 1..30 {
        let mapped = Mapped::private(&file, PAGES);
        mapped.fill(0, PAGES, round);
        let start = Barrier::new(2);
        let done = thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                for page in 0..PAGES {
                    space.remapping(|| mapped.advise(page, 1, Advice::LinuxDontNeed));
                    space.discarded(part(mapped.range, page, 1));
                    let found = mapped.word(page, 0).load(Ordering::Relaxed);
                    assert!(
                        found == word(0, page * WORDS) || found == 0,
                        "page {page} has what was discarded"
                    );
                    mapped.fill(page, 1, round + 100);
                }
            });
            start.wait();
            // Again for what is written anew meanwhile.
            (0..8).fold(None, |_, _| detach(&space, mapped.range))
        });
        if done.is_none() {
            return;
        }
        assert!(mapped.holds(0, PAGES, round + 100));
        let _ = detach(&space, mapped.range);
        let _ = space.migrate(mapped.range).unwrap().moved;
        assert!(mapped.holds(0, PAGES, round + 100));
        space.unwatch(mapped.range);
    }
}

fn a_file_that_becomes_shorter(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    const HALF: usize = PAGES / 2;
    for round in 0..30 {
        let file = file(PAGES);
        let mapped = Mapped::private(&file, PAGES);
        mapped.fill(0, PAGES, 1);
        let start = Barrier::new(2);
        let done = thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                file.set_len((HALF * PAGE) as u64).unwrap();
            });
            if round == 0 {
                start.wait();
                eventually(|| file.metadata().unwrap().len() == (HALF * PAGE) as u64);
            } else {
                start.wait();
            }
            detach(&space, mapped.range)
        });
        let Some(done) = done else { return };
        // Of what is behind the file's end, each page was there in time, or is gone for good.
        let (pages, all) = (done.pages.get(), done.pages.plus(done.clean).plus(done.busy).get());
        assert!(pages <= PAGES && all == PAGES && (round > 0 || pages == HALF), "{done:?}");
        assert!(mapped.holds(0, HALF, 1));
        // From now on the file is nobody's business.
        file.set_len(0).unwrap();
        assert!(mapped.holds(0, HALF, 1));
        let moved = space.migrate(part(mapped.range, 0, HALF)).unwrap().moved;
        assert_eq!(moved.get(), HALF);
        assert!(mapped.holds(0, HALF, 1));
        space.unwatch(mapped.range);
    }
}

fn mappings_that_move_and_go(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mapped = Mapped::private(&file(PAGES), PAGES);
    mapped.fill(0, PAGES, 1);
    if detach(&space, mapped.range).is_none() {
        return;
    }
    assert_eq!(space.migrate(mapped.range).unwrap().moved.get(), PAGES);
    let to = Mapped::private(&file(PAGES), PAGES);
    let (from, size) = (mapped.at(0).cast(), PAGES * PAGE);
    // SAFETY: the test's own memory, to its own memory.
    let moved = space.remapping(|| unsafe {
        rustix::mm::mremap_fixed(from, size, size, rustix::mm::MremapFlags::MAYMOVE, to.at(0).cast())
    });
    assert_eq!(moved.unwrap().cast::<u8>(), to.at(0));
    std::mem::forget(mapped);
    assert!(to.holds(0, PAGES, 1));
    // SAFETY: the test's own memory, unmapped at the end.
    unsafe { space.watch(to.range) }.unwrap();
    settle(&space, to.range);
    let _ = space.migrate(to.range).unwrap().moved;
    drop(to);
    eventually(|| space.device_pages(0) == Some(PageCount::ZERO));
}

fn a_child_has_the_pages(setup: Setup) {
    in_process(&name_of(setup, "a_child_has_the_pages"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let mapped = Mapped::private(&file(PAGES), PAGES);
        mapped.fill(0, PAGES / 2, 1);
        if detach(&space, mapped.range).is_none() {
            return;
        }
        let _ = space.migrate(part(mapped.range, 0, 8)).unwrap().moved;
        let half = PAGES / 2;
        let child = fork(|| {
            let right = mapped.holds(0, half, 1) && mapped.holds(half, half, 0);
            mapped.fill(0, PAGES, 2);
            right && mapped.holds(0, PAGES, 2)
        });
        expect_well(child);
        assert!(mapped.holds(0, half, 1) && mapped.holds(half, half, 0));
        space.unwatch(mapped.range);
    });
}

/// A child that is made between the old mapping and the new one's last page has everything.
fn forks_beside_it(setup: Setup) {
    const PAGES: usize = 1024;
    in_process(&name_of(setup, "forks_beside_it"), None, || {
        let space = setup.space(ByteSize::mib(8));
        let file = file(PAGES);
        const ROUNDS: u64 = 24;
        // How long it takes by itself: a fork falls into another part of it each time.
        let mut took = Duration::ZERO;
        for round in 0..ROUNDS {
            let mapped = Mapped::private(&file, PAGES);
            let says = |page: usize| word(round, page);
            (0..PAGES).for_each(|page| mapped.word(page, 9).store(says(page), Ordering::Relaxed));
            let start = Barrier::new(2);
            let holds = || (0..PAGES).all(|page| mapped.word(page, 9).load(Ordering::Relaxed) == says(page));
            let (done, elapsed) = thread::scope(|scope| {
                let detached = scope.spawn(|| {
                    start.wait();
                    let since = Instant::now();
                    (detach(&space, mapped.range), since.elapsed())
                });
                start.wait();
                let (since, wait) = (Instant::now(), took.mul_f64(round as f64 / ROUNDS as f64));
                if round > 0 {
                    while since.elapsed() < wait {
                        std::hint::spin_loop();
                    }
                    expect_well(fork(|| {
                        let right = holds();
                        (0..PAGES).for_each(|page| mapped.word(page, 9).store(0, Ordering::Relaxed));
                        right
                    }));
                }
                detached.join().unwrap()
            });
            if round == 0 {
                took = elapsed;
            }
            if done.is_none() {
                return;
            }
            assert!(holds());
            let _ = space.migrate(mapped.range).unwrap().moved;
            assert!(holds());
            space.unwatch(mapped.range);
        }
        assert_eq!(space.count(Counter::Poisoned), 0);
    });
}
