//! Dispositions belong to the process and some outcomes kill it, so that each case runs in a process of its
//! own: the test binary again, with the case's name in the environment.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::AtomicU32;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::mapping::{Mapping, is_ours};
use uhmm_addr::{PAGE_SIZE, VaRange};

const CASE: &str = "UHMM_SIGBUS_CASE";

static OURS: AtomicU32 = AtomicU32::new(0);
static THEIRS: AtomicU32 = AtomicU32::new(0);
static MASK: AtomicU64 = AtomicU64::new(0);
/// The page that `mend` makes accessible.
static PAGE: AtomicUsize = AtomicUsize::new(0);
static FILE: AtomicUsize = AtomicUsize::new(0);

/// A page of a file without bytes: touching it raises SIGBUS until the file grows.
fn broken_page() -> Mapping {
    let file = memfd_create("uhmm-broken", MemfdFlags::CLOEXEC).unwrap();
    let page = Mapping::shared(rustix::fd::AsFd::as_fd(&file), 0, PAGE_SIZE, "").unwrap();
    FILE.store(rustix::fd::IntoRawFd::into_raw_fd(file) as usize, SeqCst);
    PAGE.store(page.range().start().get(), SeqCst);
    page
}

fn touch(page: &Mapping) {
    // SAFETY: the page is mapped and writable; the fault is what the test is about.
    unsafe { page.as_ptr().as_ptr().add(100).write_volatile(1) };
}

fn mend() {
    // SAFETY: the descriptor was opened by `broken_page` and is never closed.
    let file = unsafe { rustix::fd::BorrowedFd::borrow_raw(FILE.load(SeqCst) as i32) };
    let _ = ftruncate(file, PAGE_SIZE as u64);
}

fn mine(at: VirtAddr, fault: &FaultInfo) -> Handled {
    OURS.fetch_add(1, SeqCst);
    let right = at.get() == PAGE.load(SeqCst) + 100 && fault.write && fault.code == 2 && fault.synchronous;
    if right && is_ours(VaRange::page(at.page())) {
        mend();
    }
    Handled::Ours
}

fn not_mine(_: VirtAddr, _: &FaultInfo) -> Handled {
    OURS.fetch_add(1, SeqCst);
    Handled::NotOurs
}

fn poisoned(_: VirtAddr, _: &FaultInfo) -> Handled {
    Handled::Poisoned(21)
}

fn another(at: VirtAddr, _: &FaultInfo) -> Handled {
    MASK.store(at.get() as u64, SeqCst);
    Handled::NotOurs
}

fn one_more(at: VirtAddr, _: &FaultInfo) -> Handled {
    PAGE.store(at.get(), SeqCst);
    Handled::NotOurs
}

/// What the program was told: the code, and log2 of the bytes.
static TOLD: AtomicU64 = AtomicU64::new(0);

extern "C" fn theirs(signal: i32, info: *mut Info, _: *mut Context) {
    // SAFETY: the kernel, or the chain in its place, passes all arguments.
    let (address, code, order) = unsafe { ((*info).address, (*info).code, (*info).least_bit) };
    TOLD.store(code as u64 * 100 + order as u64, SeqCst);
    let before = set_mask(u64::MAX);
    set_mask(before);
    MASK.store(before, SeqCst);
    THEIRS.fetch_add(1, SeqCst);
    if signal == SIGBUS && address == PAGE.load(SeqCst) + 100 {
        mend();
    }
}

fn program_has(handler: usize, flags: u32, mask: u64) {
    let restorer = restore as *const () as usize;
    let flags = u64::from(flags | sys::SA_RESTORER);
    sigaction(Some(&Action { handler, flags, restorer, mask })).unwrap();
}

fn install(handler: Handler) {
    // SAFETY: the handlers of this file use atomics and system calls only.
    unsafe { SigbusChain::install(handler) }.unwrap();
}

/// To this thread: another one of the test harness would take it later.
fn send_to_self() {
    let pid = rustix::process::getpid().as_raw_pid() as usize;
    let tid = rustix::thread::gettid().as_raw_pid() as usize;
    // SAFETY: sends a signal whose disposition the case has set.
    unsafe { raw::syscall(sys::__NR_tgkill, [pid, tid, SIGBUS as usize, 0, 0]) }.unwrap();
}

const BUS: u64 = 1 << (SIGBUS - 1);
const USR1: u64 = 1 << 9;

fn run(case: &str) {
    let handler = theirs as *const () as usize;
    set_mask(0);
    match case {
        "ours" => {
            install(mine);
            install(mine);
            // Those behind it are not asked.
            install(not_mine);
            install(poisoned);
            install(another);
            // SAFETY: refused.
            let one_more = unsafe { SigbusChain::install(one_more) };
            assert!(matches!(one_more, Err(InstallError::Full)));
            let page = broken_page();
            // Opening what does not exist leaves an error number behind.
            std::fs::File::open("/does/not/exist").unwrap_err();
            touch(&page);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(2));
            assert_eq!(OURS.load(SeqCst), 1);
        }
        "chain" | "plain" | "nodefer" => {
            let flags = match case {
                "chain" => sys::SA_SIGINFO,
                "nodefer" => sys::SA_SIGINFO | sys::SA_NODEFER,
                _ => 0,
            };
            program_has(handler, flags, USR1);
            install(not_mine);
            touch(&broken_page());
            touch(&broken_page());
            assert_eq!((OURS.load(SeqCst), THEIRS.load(SeqCst)), (2, 2));
            let expected = if case == "nodefer" { USR1 } else { USR1 | BUS };
            assert_eq!(MASK.load(SeqCst), expected);
            // The interrupted mask is back.
            assert_eq!(set_mask(0), 0);
        }
        "poisoned" => {
            program_has(handler, sys::SA_SIGINFO, 0);
            install(not_mine);
            install(poisoned);
            touch(&broken_page());
            assert_eq!((OURS.load(SeqCst), THEIRS.load(SeqCst), TOLD.load(SeqCst)), (1, 1, 421));
        }
        "reset" => {
            program_has(handler, sys::SA_SIGINFO | sys::SA_RESETHAND, 0);
            install(not_mine);
            touch(&broken_page());
            assert_eq!(THEIRS.load(SeqCst), 1);
            touch(&broken_page());
        }
        "default" => {
            program_has(DEFAULT, 0, 0);
            install(not_mine);
            touch(&broken_page());
        }
        "ignored" => {
            program_has(IGNORE, 0, 0);
            install(not_mine);
            send_to_self();
            assert_eq!(OURS.load(SeqCst), 1);
            touch(&broken_page());
        }
        "sent" => {
            program_has(DEFAULT, 0, 0);
            install(not_mine);
            send_to_self();
        }
        other => panic!("no such case: {other}"),
    }
}

#[test]
fn the_case_of_a_child() {
    if let Ok(case) = std::env::var(CASE) {
        run(&case);
    }
}

#[test]
fn sigbus_goes_to_whom_it_belongs() {
    let killed = Some(SIGBUS);
    for (case, signal) in [
        ("ours", None),
        ("chain", None),
        ("plain", None),
        ("nodefer", None),
        ("poisoned", None),
        ("reset", killed),
        ("default", killed),
        ("ignored", killed),
        ("sent", killed),
    ] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "signals::tests::the_case_of_a_child", "--nocapture"])
            .env(CASE, case)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), signal, "{case}: {text}");
        assert_eq!(output.status.success(), signal.is_none(), "{case}: {text}");
        assert!(text.contains("running 1 test"), "{case}: {text}");
    }
}

#[test]
fn a_guard_restores_the_mask() {
    let outer = set_mask(USR1);
    {
        let _one = Blocked::all();
        let _two = Blocked::all();
        let now = set_mask(u64::MAX);
        assert_eq!(now | (1 << 8) | (1 << 18), u64::MAX);
    }
    assert_eq!(set_mask(outer), USR1);
}
