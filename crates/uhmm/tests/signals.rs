//! Signals beside managed memory: the program's own SIGBUS handler, alternate stacks, and handlers that touch
//! managed memory at any moment.
//!
//! Dispositions belong to the process, so that each case runs in a process of its own.

mod common;

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use common::{Memory, PAGE, Random, Setup, WORDS, check, fill, in_process, name_of, part};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use uhmm::{ByteSize, PageCount, Space};

with_engine!(Signal, signal_move, signal_fallback:
    the_programs_own_handler_is_called_for_its_own,
    a_handler_of_the_program_that_comes_later_may_pass_on,
    faults_on_an_alternate_stack,
    faults_on_a_small_alternate_stack,
    handlers_touch_memory_that_migrates,
    handlers_touch_memory_while_other_memory_comes_and_goes,
    handlers_touch_memory_inside_a_limit,
);
with_engine!(Threads, threads_move, threads_fallback:
    handlers_touch_memory_that_migrates,
    handlers_touch_memory_while_other_memory_comes_and_goes,
    handlers_touch_memory_inside_a_limit,
);

const PAGES: usize = 64;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static LOCAL: AtomicUsize = AtomicUsize::new(0);
static FILE: AtomicUsize = AtomicUsize::new(0);

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

fn install(signal: i32, handler: Handler, flags: i32) -> libc::sigaction {
    // SAFETY: all zero is a value of the structure.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | flags;
    // SAFETY: both structures are valid, and the handlers of this file use atomics and system calls only.
    assert_eq!(unsafe { libc::sigaction(signal, &raw const action, &raw mut before) }, 0);
    before
}

/// Notes the call, and lets the file grow so that the access succeeds.
extern "C" fn mend(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let local = 0_u8;
    LOCAL.store((&raw const local) as usize, Ordering::SeqCst);
    // SAFETY: the kernel, or who passes on, hands the signal's information over.
    ADDRESS.store(unsafe { (*info).si_addr() } as usize, Ordering::SeqCst);
    CALLS.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the descriptor stays open.
    let file = unsafe { rustix::fd::BorrowedFd::borrow_raw(FILE.load(Ordering::SeqCst) as i32) };
    let _ = ftruncate(file, 8 * PAGE as u64);
}

/// A mapped file without bytes: touching it is a SIGBUS, until the handler lets it grow.
fn truncated_file() -> *mut u8 {
    let file = memfd_create("truncated", MemfdFlags::CLOEXEC).unwrap();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses a free place.
    let start = unsafe { mmap(std::ptr::null_mut(), 8 * PAGE, protection, MapFlags::SHARED, &file, 0) };
    FILE.store(rustix::fd::IntoRawFd::into_raw_fd(file) as usize, Ordering::SeqCst);
    start.unwrap().cast()
}

/// Touches a truncated file, and expects the program's handler to see it.
fn touch_truncated() -> usize {
    let at = truncated_file().wrapping_add(3 * PAGE + 17);
    let calls = CALLS.load(Ordering::SeqCst);
    // SAFETY: mapped, and mended by the handler.
    unsafe { at.write_volatile(1) };
    assert_eq!(CALLS.load(Ordering::SeqCst), calls + 1);
    assert_eq!(ADDRESS.load(Ordering::SeqCst), at as usize);
    LOCAL.load(Ordering::SeqCst)
}

fn migrate_and_touch(space: &Space) {
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    for _ in 0..3 {
        assert_eq!(space.migrate(buffer.range()).unwrap().moved, PageCount::new(PAGES));
        check(&buffer, 1);
    }
}

fn the_programs_own_handler_is_called_for_its_own(setup: Setup) {
    in_process(&name_of(setup, "the_programs_own_handler_is_called_for_its_own"), None, || {
        install(libc::SIGBUS, mend, 0);
        let space = setup.space(ByteSize::mib(1));
        migrate_and_touch(&space);
        assert_eq!(CALLS.load(Ordering::SeqCst), 0, "managed memory is nobody else's business");
        touch_truncated();
        migrate_and_touch(&space);
        assert_eq!(CALLS.load(Ordering::SeqCst), 1);
        // After the last space is gone the handler works all the same.
        drop(space);
        touch_truncated();
        migrate_and_touch(&setup.space(ByteSize::mib(1)));
        assert_eq!(CALLS.load(Ordering::SeqCst), 2);
    });
}

static PASS_ON: AtomicUsize = AtomicUsize::new(0);

extern "C" fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: holds the handler that was there before, of this type.
    let before = unsafe { std::mem::transmute::<usize, Handler>(PASS_ON.load(Ordering::SeqCst)) };
    CALLS.fetch_add(1, Ordering::SeqCst);
    before(signal, info, context);
}

fn a_handler_of_the_program_that_comes_later_may_pass_on(setup: Setup) {
    in_process(&name_of(setup, "a_handler_of_the_program_that_comes_later_may_pass_on"), None, || {
        let space = setup.space(ByteSize::mib(1));
        let before = install(libc::SIGBUS, pass_on, libc::SA_ONSTACK);
        PASS_ON.store(before.sa_sigaction, Ordering::SeqCst);
        migrate_and_touch(&space);
        assert!(CALLS.load(Ordering::SeqCst) >= 3);
        // Another space puts no second handler in front.
        migrate_and_touch(&setup.space(ByteSize::mib(1)));
        migrate_and_touch(&space);
    });
}

/// Runs `case` on a thread with an alternate stack of `size` bytes; tells where that stack is.
fn with_alternate_stack(size: usize, case: impl FnOnce(std::ops::Range<usize>) + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let memory = Memory::new(size / PAGE);
            // SAFETY: all zero is a value of the structure.
            let mut before: libc::stack_t = unsafe { std::mem::zeroed() };
            let stack = libc::stack_t { ss_sp: memory.start().cast(), ss_flags: 0, ss_size: size };
            // SAFETY: the memory is this thread's until the stack before is back.
            assert_eq!(unsafe { libc::sigaltstack(&raw const stack, &raw mut before) }, 0);
            case(memory.start() as usize..memory.start() as usize + size);
            // SAFETY: what was there before.
            assert_eq!(unsafe { libc::sigaltstack(&raw const before, std::ptr::null_mut()) }, 0);
        });
    });
}

fn faults_on_an_alternate_stack(setup: Setup) {
    in_process(&name_of(setup, "faults_on_an_alternate_stack"), None, || {
        install(libc::SIGBUS, mend, libc::SA_ONSTACK);
        let space = setup.space(ByteSize::mib(1));
        with_alternate_stack(64 << 10, |stack| {
            migrate_and_touch(&space);
            assert!(stack.contains(&touch_truncated()), "the program's handler runs where it expects to");
        });
    });
}

fn faults_on_a_small_alternate_stack(setup: Setup) {
    in_process(&name_of(setup, "faults_on_a_small_alternate_stack"), None, || {
        let space = setup.space(ByteSize::mib(1));
        // SAFETY: asks for a number.
        let least = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
        let size = (least + (4 << 10)).next_multiple_of(PAGE);
        with_alternate_stack(size, |_| migrate_and_touch(&space));
    });
}

static TARGET: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());
static TICKS: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

/// Adds one to a word of some page of the target.
extern "C" fn tick(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    if STOP.load(Ordering::SeqCst) {
        return;
    }
    let ticks = TICKS.fetch_add(1, Ordering::SeqCst) as usize;
    let target = TARGET.load(Ordering::SeqCst);
    // SAFETY: the target has that many words until the timer is stopped.
    unsafe { &*target.add((ticks * 7 % PAGES) * WORDS) }.fetch_add(1, Ordering::SeqCst);
}

/// Calls `work` again and again while a timer's handler touches a buffer of `space` a thousand times a second.
fn with_ticks(space: &Space, mut work: impl FnMut(&uhmm::Buffer<u64>)) {
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    TARGET.store(buffer.as_mut_ptr().cast(), Ordering::SeqCst);
    install(libc::SIGALRM, tick, libc::SA_RESTART);
    let every = libc::timeval { tv_sec: 0, tv_usec: 1000 };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: a valid structure.
    assert_eq!(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) }, 0);
    while TICKS.load(Ordering::SeqCst) < 300 {
        work(&buffer);
    }
    STOP.store(true, Ordering::SeqCst);
    let never = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let timer = libc::itimerval { it_interval: never, it_value: never };
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) }, 0);
    let sum = || (0..PAGES).map(|page| buffer[page * WORDS]).sum::<u64>();
    // A handler on another thread may be on its way.
    common::eventually(|| sum() == TICKS.load(Ordering::SeqCst));
}

fn handlers_touch_memory_that_migrates(setup: Setup) {
    in_process(&name_of(setup, "handlers_touch_memory_that_migrates"), None, || {
        let space = setup.space(ByteSize::mib(1));
        with_ticks(&space, |buffer| {
            let _ = space.migrate(buffer.range()).unwrap();
            let _ = space.prefetch(part(buffer.range(), 0, PAGES / 2)).unwrap();
            let _ = space.evict(PageCount::new(8)).unwrap();
            let _ = space.residency(buffer.range());
        });
    });
}

fn handlers_touch_memory_while_other_memory_comes_and_goes(setup: Setup) {
    in_process(&name_of(setup, "handlers_touch_memory_while_other_memory_comes_and_goes"), None, || {
        let space = setup.space(ByteSize::mib(4));
        with_ticks(&space, |buffer| {
            let _ = space.migrate(buffer.range()).unwrap();
            let mut other = space.map::<u64>(8 * WORDS).unwrap();
            fill(&mut other, 3);
            let _ = space.migrate(other.range()).unwrap();
            let mut own = Memory::new(8);
            fill(own.words_mut(0, 8), 4);
            let adopted = own.adopt(&space);
            let _ = space.migrate(own.range()).unwrap();
            drop(adopted);
            check(own.words(0, 8), 4);
            check(&other, 3);
        });
    });
}

fn handlers_touch_memory_inside_a_limit(setup: Setup) {
    in_process(&name_of(setup, "handlers_touch_memory_inside_a_limit"), None, || {
        let device = common::memory(ByteSize::mib(16));
        let space = setup.builder().device(device).ram(ByteSize::mib(1)).build().unwrap();
        let mut other = space.map::<u64>(1024 * WORDS).unwrap();
        fill(&mut other, 5);
        let mut random = Random::new(1);
        with_ticks(&space, |_| {
            let at = random.below(other.len());
            assert_eq!(other[at], common::word(5, at));
        });
        check(&other, 5);
    });
}
