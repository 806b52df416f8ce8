//! What the tests on the running kernel share: the engines and ways that a scenario runs with, patterns,
//! memory, a watchdog.
//!
//! Where the kernel permits no userfaultfd to this user a scenario says so and passes, unless
//! `UHMM_REQUIRE_UFFD=1` is set: then it fails.
#![allow(dead_code, reason = "every test binary uses a part of it")]

pub(crate) mod child;
pub(crate) mod deaf;

use std::env;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use uhmm::managed::BuildError;
use uhmm::space::{Adoption, Builder, Residency, SpaceError};
use uhmm::{ByteSize, Counter, Device, Engine, FileDevice, MemDevice, PageCount, Space, VaRange, VirtAddr};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// `u64` words of a page.
pub(crate) const WORDS: usize = PAGE / 8;

/// The name of the one case that a process of its own is to run.
const CASE: &str = "UHMM_TEST_CASE";
const PATIENCE: Duration = Duration::from_secs(60);

/// What a scenario runs with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// How faults are served.
    pub(crate) engine: Engine,
    /// Whether pages are copied out instead of moved.
    pub(crate) forced_fallback: bool,
}

impl Setup {
    /// A space to be, with nothing else said.
    pub(crate) fn builder(self) -> Builder {
        Space::builder().engine(self.engine).forced_fallback(self.forced_fallback)
    }

    /// A space with a device in memory.
    pub(crate) fn space(self, device: ByteSize) -> Space {
        self.with(memory(device))
    }

    /// A space with this device.
    pub(crate) fn with(self, device: Arc<dyn Device>) -> Space {
        self.builder().device(device).build().unwrap()
    }

    /// Whether reads keep the device's copy of a page.
    pub(crate) fn keeps_copies(self) -> bool {
        self.engine == Engine::Threads
    }
}

/// The four setups of every scenario named, each a test: `scenario::engine_way`.
#[macro_export]
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        $crate::with_engine!(Signal, signal_move, signal_fallback: $($name),*);
        $crate::with_engine!(Threads, threads_move, threads_fallback: $($name),*);
    };
}

/// Both ways of one engine.
#[macro_export]
macro_rules! with_engine {
    ($engine:ident, $moved:ident, $fallback:ident: $($name:ident),* $(,)?) => {
        mod $moved {
            use $crate::common::{Setup, run};
            $(#[test]
            fn $name() {
                let setup = Setup { engine: uhmm::Engine::$engine, forced_fallback: false };
                run(concat!(stringify!($moved), "::", stringify!($name)), setup, super::$name);
            })*
        }
        mod $fallback {
            use $crate::common::{Setup, run};
            $(#[test]
            fn $name() {
                let setup = Setup { engine: uhmm::Engine::$engine, forced_fallback: true };
                run(concat!(stringify!($fallback), "::", stringify!($name)), setup, super::$name);
            })*
        }
    };
}

/// Runs a scenario under a watchdog, or says why not.
pub(crate) fn run(name: &str, setup: Setup, scenario: fn(Setup)) {
    if env::var_os(CASE).is_none()
        && let Some(why) = missing(setup)
    {
        let required = env::var_os("UHMM_REQUIRE_UFFD").is_some_and(|value| value == "1");
        assert!(!required, "{name} must run here, but {why}");
        skip(name, &why);
        return;
    }
    let _watchdog = Watchdog::start(name);
    scenario(setup);
}

/// Says, past the harness, what does not run and why.
pub(crate) fn skip(name: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
}

fn missing(setup: Setup) -> Option<String> {
    match setup.builder().build() {
        Err(SpaceError::Build(error @ (BuildError::Uffd(_) | BuildError::Feature(_)))) => {
            Some(error.to_string())
        }
        built => {
            drop(built.unwrap());
            None
        }
    }
}

/// Runs `case` in a process of its own: this test binary again, from the start of the test called `name`.
/// The process is to end by `signal`, or well.
pub(crate) fn in_process(name: &str, signal: Option<i32>, case: impl FnOnce()) {
    if env::var_os(CASE).is_some_and(|asked| asked == name) {
        case();
        return;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads", "1"])
        .env(CASE, name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("running 1 test"), "{name}: {text}");
    assert_eq!(output.status.signal(), signal, "{name}: {text}");
    assert_eq!(output.status.success(), signal.is_none(), "{name}: {text}");
}

/// The full name of the test that runs `scenario` with `setup`.
pub(crate) fn name_of(setup: Setup, scenario: &str) -> String {
    let engine = match setup.engine {
        Engine::Signal => "signal",
        Engine::Threads => "threads",
    };
    format!("{engine}_{}::{scenario}", if setup.forced_fallback { "fallback" } else { "move" })
}

/// Ends the process, with the name of the test, if it is not dropped in time: a hang is a bug to be seen.
pub(crate) struct Watchdog(#[expect(dead_code, reason = "its drop is the message")] Sender<()>);

impl Watchdog {
    /// Starts to wait.
    pub(crate) fn start(name: &str) -> Self {
        let (done, over) = channel();
        let name = name.to_owned();
        std::thread::spawn(move || {
            if over.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                let _ = writeln!(std::io::stderr(), "{name} hangs: not done after {PATIENCE:?}");
                std::process::abort();
            }
        });
        Self(done)
    }
}

/// For tests that must not run beside others of their binary.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device in memory of this process.
pub(crate) fn memory(size: ByteSize) -> Arc<MemDevice> {
    Arc::new(MemDevice::private(size).unwrap())
}

/// A device in an unlinked file.
pub(crate) fn file(size: ByteSize) -> Arc<FileDevice> {
    Arc::new(FileDevice::temporary(None, Some(size)).unwrap())
}

/// `pages` pages of `range` from page `first` on.
pub(crate) fn part(range: VaRange, first: usize, pages: usize) -> VaRange {
    range.skip(PageCount::new(first)).unwrap().take(PageCount::new(pages))
}

/// The word that belongs at `index`, for a pattern that `seed` stands for.
pub(crate) const fn word(seed: u64, index: usize) -> u64 {
    (index as u64 ^ seed.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Fills `words` with a pattern.
pub(crate) fn fill(words: &mut [u64], seed: u64) {
    for (index, place) in words.iter_mut().enumerate() {
        *place = word(seed, index);
    }
}

/// Whether `words` hold a pattern; names the first word that does not.
#[track_caller]
pub(crate) fn check(words: &[u64], seed: u64) {
    check_from(words, seed, 0);
}

/// As [`check`], for the part of a pattern that begins with word `first`.
#[track_caller]
pub(crate) fn check_from(words: &[u64], seed: u64, first: usize) {
    for (index, found) in words.iter().enumerate() {
        let index = first + index;
        assert_eq!(*found, word(seed, index), "word {} of page {}", index % WORDS, index / WORDS);
    }
}

/// Expects so many pages resident, and so many on the device.
///
/// The handler of the last fault may be yet to note that the page came; this waits for it.
#[track_caller]
pub(crate) fn expect_places(space: &Space, range: VaRange, resident: usize, device: usize) {
    let expected = Residency {
        resident: PageCount::new(resident),
        device: PageCount::new(device),
        absent: range.pages().minus(PageCount::new(resident + device)),
        ..Residency::default()
    };
    settle(space, range);
    assert_eq!(space.residency(range), expected);
}

/// Waits until no page of `range` is on its way: a thread goes on as soon as its page is there, a moment before
/// the handler has noted that.
pub(crate) fn settle(space: &Space, range: VaRange) {
    eventually(|| space.residency(range).staged.is_zero());
}

/// Faults so far, when those that threads have left behind are counted: a handler counts after it has woken them.
pub(crate) fn faults(space: &Space) -> u64 {
    loop {
        let seen = space.count(Counter::Faults);
        std::thread::sleep(Duration::from_millis(20));
        if space.count(Counter::Faults) == seen {
            return seen;
        }
    }
}

/// Waits for what another thread is about to do. The watchdog limits it.
pub(crate) fn eventually(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

/// Random numbers, the same in every run.
pub(crate) struct Random(u64);

impl Random {
    /// Numbers that `seed` stands for.
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// One below `bound`.
    pub(crate) const fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}

/// Private anonymous memory of the test's own, unmapped when dropped.
pub(crate) struct Memory {
    start: NonNull<u8>,
    pages: usize,
}

impl Memory {
    /// Fresh memory.
    pub(crate) fn new(pages: usize) -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free place.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), pages * PAGE, protection, MapFlags::PRIVATE) };
        Self { start: NonNull::new(start.unwrap().cast()).unwrap(), pages }
    }

    /// Where it begins.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Page `n`.
    pub(crate) fn page(&self, n: usize) -> *mut u8 {
        assert!(n <= self.pages);
        self.start.as_ptr().wrapping_add(n * PAGE)
    }

    /// Its pages.
    pub(crate) fn range(&self) -> VaRange {
        VaRange::new(VirtAddr::of(self.start()), self.pages * PAGE).unwrap()
    }

    /// Puts it under management. The adoption is to be dropped first.
    pub(crate) fn adopt(&self, space: &Space) -> Adoption {
        // SAFETY: mapped until dropped; the tests give no absent address to system calls with the signal
        // engine, except to see them fail.
        unsafe { space.adopt(self.start(), self.pages * PAGE) }.unwrap()
    }

    /// Its words from page `first` on.
    pub(crate) fn words(&self, first: usize, pages: usize) -> &[u64] {
        assert!(first + pages <= self.pages);
        // SAFETY: inside the mapping, as long as nobody unmaps or protects that part, as the tests see to.
        unsafe { std::slice::from_raw_parts(self.page(first).cast_const().cast(), pages * WORDS) }
    }

    /// The same, to be written.
    pub(crate) fn words_mut(&mut self, first: usize, pages: usize) -> &mut [u64] {
        assert!(first + pages <= self.pages);
        // SAFETY: as above; borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.page(first).cast(), pages * WORDS) }
    }

    /// Changes the protection of some pages.
    pub(crate) fn protect(&self, first: usize, pages: usize, protection: rustix::mm::MprotectFlags) {
        // SAFETY: pages of this mapping, to which no reference is held that the protection would break.
        unsafe { rustix::mm::mprotect(self.page(first).cast(), pages * PAGE, protection) }.unwrap();
    }

    /// Gives up the contents of some pages.
    pub(crate) fn give_up(&self, first: usize, pages: usize) {
        let advice = rustix::mm::Advice::LinuxDontNeed;
        // SAFETY: pages of this mapping, whose contents the test gives up.
        unsafe { rustix::mm::madvise(self.page(first).cast(), pages * PAGE, advice) }.unwrap();
    }

    /// Unmaps pages, and keeps other threads from mapping something else there, by mapping nothing over them.
    pub(crate) fn unmap(&self, first: usize, pages: usize) {
        let (nothing, flags) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: pages of the test's own, not touched again.
        unsafe { mmap_anonymous(self.page(first).cast(), pages * PAGE, nothing, flags) }.unwrap();
    }

    /// Leaves the memory mapped, or to somebody else to unmap.
    pub(crate) fn forget(self) {
        std::mem::forget(self);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, or a hole.
        unsafe { munmap(self.start().cast(), self.pages * PAGE) }.unwrap();
    }
}

/// A number from a file of `/proc/self`, in KiB: the first that follows `key`.
pub(crate) fn proc_kib(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/{file}")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
}
