use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::*;

fn stack() -> Mapping {
    Mapping::reserve(256 << 10, "uhmm thread").unwrap()
}

fn spawn<T: Sync>(files: Files, entry: extern "C" fn(*mut u8), arg: &T) -> RawThread {
    let arg = core::ptr::from_ref(arg).cast_mut().cast();
    // SAFETY: the entries of these tests make system calls and use atomics only, the tests join before `arg`
    // goes away, and each entry is used with the type it expects.
    unsafe { RawThread::spawn(c"uhmm-test", stack(), files, entry, arg) }.unwrap()
}

extern "C" fn count(arg: *mut u8) {
    // SAFETY: spawned with an `AtomicU32` that lives until the join.
    let word = unsafe { &*arg.cast::<AtomicU32>() };
    word.fetch_add(1, SeqCst);
}

#[test]
fn a_hundred_threads_come_and_go() {
    let counter = AtomicU32::new(0);
    let pid = rustix::process::getpid();
    for round in 0..100 {
        let files = if round % 2 == 0 { Files::Own } else { Files::Shared };
        let thread = spawn(files, count, &counter);
        assert!(thread.tid() > 0 && thread.tid() != pid.as_raw_pid() as u32);
        thread.join();
    }
    assert_eq!(counter.load(SeqCst), 100);
    assert_eq!(rustix::process::getpid(), pid);
}

#[test]
fn many_at_once() {
    let counter = AtomicU32::new(0);
    let threads: Vec<_> = (0..16).map(|_| spawn(Files::Own, count, &counter)).collect();
    threads.into_iter().for_each(RawThread::join);
    assert_eq!(counter.load(SeqCst), 16);
}

#[derive(Default)]
struct Talk {
    turn: AtomicU32,
    pipe: AtomicI32,
    closed: AtomicI32,
    outcome: AtomicU32,
    opened: AtomicI32,
    tid: AtomicU32,
    cpu: AtomicU32,
}

fn await_turn(talk: &Talk, turn: u32) {
    while talk.turn.load(SeqCst) < turn {
        let _ = futex::wait(&talk.turn, turn - 1, Some(Duration::from_millis(50)));
    }
}

fn give_turn(talk: &Talk, turn: u32) {
    talk.turn.store(turn, SeqCst);
    futex::wake(&talk.turn, 8);
}

extern "C" fn own_files(arg: *mut u8) {
    // SAFETY: spawned with a `Talk` that lives until the join.
    let talk = unsafe { &*arg.cast::<Talk>() };
    talk.tid.store(rustix::thread::gettid().as_raw_pid() as u32, SeqCst);
    talk.cpu.store(placement::current_cpu(), SeqCst);
    await_turn(talk, 1);
    // SAFETY: the number names a descriptor of this thread's own table, open until the thread ends.
    let pipe = unsafe { BorrowedFd::borrow_raw(talk.pipe.load(SeqCst)) };
    // SAFETY: this thread's table is its own.
    let closing = unsafe { close_all_files_except(&[pipe]) };
    let wrote = rustix::io::write(pipe, b"hello");
    // SAFETY: the number is only used to ask whether it is open.
    let gone = unsafe { BorrowedFd::borrow_raw(talk.closed.load(SeqCst)) };
    let gone = rustix::io::fcntl_getfd(gone).is_err();
    // Room on the stack is there.
    let room = core::hint::black_box([3_u8; 16 << 10]);
    // High, so that no thread of the program happens to open the same number meanwhile.
    let opened = rustix::io::fcntl_dupfd_cloexec(pipe, 700).map(|fd| {
        let number = fd.as_raw_fd();
        core::mem::forget(fd);
        number
    });
    talk.opened.store(opened.unwrap_or(-1), SeqCst);
    let fine = closing.is_ok() && wrote == Ok(5) && gone && room[777] == 3;
    talk.outcome.store(1 + u32::from(fine), SeqCst);
    give_turn(talk, 2);
    await_turn(talk, 3);
}

#[test]
fn a_descriptor_table_of_its_own() {
    let talk = Talk::default();
    talk.cpu.store(u32::MAX, SeqCst);
    let (reader, writer) = std::io::pipe().unwrap();
    let other = File::open("/dev/null").unwrap();
    talk.closed.store(other.as_raw_fd(), SeqCst);
    talk.pipe.store(writer.as_raw_fd(), SeqCst);
    let thread = spawn(Files::Own, own_files, &talk);
    // Closed here, but the thread still has its copy.
    drop(writer);
    give_turn(&talk, 1);
    await_turn(&talk, 2);
    assert_eq!(talk.outcome.load(SeqCst), 2);
    let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", thread.tid())).unwrap();
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(|v| v.trim().to_owned());
    assert_eq!(field("Name:").as_deref(), Some("uhmm-test"));
    // All but SIGKILL and SIGSTOP.
    assert_eq!(field("SigBlk:").as_deref(), Some("fffffffffffbfeff"));
    assert_eq!(talk.tid.load(SeqCst), thread.tid());
    assert!(talk.cpu.load(SeqCst) < 1024 && !thread.is_finished());
    let mut text = [0; 16];
    assert_eq!(rustix::io::read(&reader, &mut text).unwrap(), 5);
    // What the program has open stayed open, and what the thread opened is not here.
    rustix::io::fcntl_getfd(other.as_fd()).unwrap();
    let opened = talk.opened.load(SeqCst);
    assert!(opened >= 700);
    // SAFETY: the number is only used to ask whether it is open.
    let elsewhere = unsafe { BorrowedFd::borrow_raw(opened) };
    assert!(rustix::io::fcntl_getfd(elsewhere).is_err());
    give_turn(&talk, 3);
    thread.join();
    // With the thread its copies are gone, soon after: the other end sees the pipe closed.
    assert_eq!(rustix::io::read(&reader, &mut text).unwrap(), 0);
}

#[test]
fn what_cannot_work_is_refused() {
    let small = Mapping::reserve(64 << 10, "uhmm small").unwrap();
    // SAFETY: refused before anything runs.
    let refused = unsafe { RawThread::spawn(c"x", small, Files::Own, count, core::ptr::null_mut()) };
    assert!(refused.is_err());
    // SAFETY: refused before anything runs.
    let refused =
        unsafe { RawThread::spawn(c"a name of sixteen", stack(), Files::Own, count, core::ptr::null_mut()) };
    assert!(refused.is_err());
}
