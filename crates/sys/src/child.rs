//! A program as a child, by a process that wants to be as if it were not there.
//!
//! What     [`helper`], a process beside this one; [`Watch`], under which a program is started and its signals
//!          are passed on, and with which this process stops as the program did; [`Change`], what became of it;
//!          [`die_by`], to end as it ended.
//! Why      who runs `uhmm run prog` must see `prog`: its exit code, its signals, its place in job control.
//! Owns     a [`Watch`] the signal mask of the calling thread, until it is dropped.
//! Fails    with the kernel's error.

use core::ffi::CStr;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::time::Duration;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fd::BorrowedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus};

/// Descriptors that a helper wants to be allowed: what the kernel gives at most, as long as nobody asks it for more.
const FILES: u64 = 1 << 20;
/// Time between two looks at a program that is stopped.
const LOOK: Duration = Duration::from_millis(20);

/// On which side of a fork one is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The one that was there before; the number of the other one.
    Parent(Pid),
    /// The new one.
    Child,
}

/// Makes a copy of this process.
///
/// # Safety
/// The child has the calling thread alone: unless the process had no other, it may only call what is safe in a
/// signal handler.
pub unsafe fn fork() -> io::Result<Side> {
    // SAFETY: no memory is passed; what the child may do is the caller's promise.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid).map_or(Side::Child, Side::Parent)),
    }
}

/// Ends this process at once: no destructors, no buffers written.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process and touches no memory.
    unsafe { libc::_exit(code) }
}

/// Starts a process that runs `run` and ends. It has a session of its own, nothing on its standard descriptors, and
/// none of the descriptors that this process inherited when it was started. Those that were opened since are
/// closed on exec, as the standard library and this crate open all of theirs, and that is how they are told
/// apart: whoever opens others must not use them in `run`. Those in `without`, which only this process should
/// have, are closed in the helper. It may have as many descriptors as it can be allowed: how few its starter wants
/// a program to have is not meant for it.
///
/// Refused with `EBUSY` where this process has more than one thread: the helper would have the calling one alone,
/// and the locks of the others for ever.
pub fn helper(name: &CStr, without: &[BorrowedFd<'_>], run: impl FnOnce()) -> io::Result<Pid> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(Errno::BUSY.into());
    }
    // SAFETY: there is no other thread, as has just been seen, and so nobody who could make one.
    match unsafe { fork() }? {
        Side::Parent(pid) => Ok(pid),
        Side::Child => {
            // Only for people.
            let _ = rustix::thread::set_name(name);
            for fd in without {
                // SAFETY: its owner is somewhere in frames to which this process never returns.
                unsafe { rustix::io::close(fd.as_raw_fd()) };
            }
            // SAFETY: this process has one thread, and what it would miss is its caller's business, as said.
            let code = match unsafe { become_daemon() } {
                Ok(()) => {
                    allow_files();
                    run();
                    0
                }
                Err(_) => 1,
            };
            exit_now(code)
        }
    }
}

/// Cuts this process, a fresh child, off from whoever started its parent.
///
/// # Safety
/// The process must have one thread, which uses no descriptor that is not closed on exec.
unsafe fn become_daemon() -> io::Result<()> {
    rustix::process::setsid()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    let mut inherited = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let Ok(fd) = entry?.file_name().to_string_lossy().parse::<i32>() else { continue };
        // SAFETY: only looked at. A number that is none any more is an error.
        let flags = unsafe { rustix::io::fcntl_getfd(BorrowedFd::borrow_raw(fd)) };
        if fd > 2 && flags.is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
            inherited.push(fd);
        }
    }
    for fd in inherited {
        // SAFETY: it is not closed on exec, so that by the caller's promise nobody here owns it.
        unsafe { rustix::io::close(fd) };
    }
    Ok(())
}

/// Allows this process as many descriptors as it can be.
fn allow_files() {
    let limit = |most| Rlimit { current: most, maximum: most };
    // Above the maximum takes a right.
    if rustix::process::setrlimit(Resource::Nofile, limit(Some(FILES))).is_err() {
        let most = rustix::process::getrlimit(Resource::Nofile).maximum;
        let _ = rustix::process::setrlimit(Resource::Nofile, limit(most));
    }
}

/// Signals that are passed on to the program, or noticed.
const WATCHED: [libc::c_int; 16] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGABRT,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGWINCH,
    libc::SIGTSTP,
    libc::SIGCONT,
    libc::SIGCHLD,
];

/// A signal that arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrived {
    /// Which.
    pub signal: Signal,
    /// Whether a process sent it, to this one perhaps alone. Otherwise the kernel did, as from a terminal, whose
    /// signals reach the program too.
    pub sent: bool,
}

/// While it lives, signals wait for [`Watch::next`] instead of acting on this process.
#[derive(Debug)]
pub struct Watch {
    before: libc::sigset_t,
    children_ignored: bool,
    /// The mask belongs to the thread.
    not_send: PhantomData<*const ()>,
}

fn watched() -> libc::sigset_t {
    set_of(&WATCHED)
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set, and the others change a set that is.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

impl Watch {
    /// Starts watching. To be called by the only thread of a process, which also starts the program.
    pub fn start() -> io::Result<Self> {
        let mut before = MaybeUninit::uninit();
        // SAFETY: the first set is initialised, and the second is filled in when the call succeeds.
        let before = unsafe {
            match libc::pthread_sigmask(libc::SIG_BLOCK, &watched(), before.as_mut_ptr()) {
                0 => before.assume_init(),
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
        };
        // Whoever ignores the end of children cannot wait for them.
        // SAFETY: installs no handler.
        let old = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        Ok(Self { before, children_ignored: old == libc::SIG_IGN, not_send: PhantomData })
    }

    /// Makes the program that `command` starts find signals as they were before, and end when the calling thread
    /// does.
    pub fn prepare(&self, command: &mut Command) {
        let (mask, ignored) = (self.before, self.children_ignored);
        let parent = rustix::process::getpid();
        let between = move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(Errno::SRCH.into());
            }
            // SAFETY: both calls are safe in a signal handler; the set is initialised.
            unsafe {
                if ignored {
                    libc::signal(libc::SIGCHLD, libc::SIG_IGN);
                }
                libc::pthread_sigmask(libc::SIG_SETMASK, &mask, core::ptr::null_mut());
            }
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes system calls only.
        unsafe { command.pre_exec(between) };
    }

    /// Waits for the next signal.
    pub fn next(&self) -> Arrived {
        loop {
            let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
            // SAFETY: the set is initialised, and there is room for what is told of the signal.
            let number = unsafe { libc::sigwaitinfo(&watched(), info.as_mut_ptr()) };
            // SAFETY: zeroed, or filled in: either way it is initialised.
            let code = unsafe { info.assume_init() }.si_code;
            if let Some(signal) = Signal::from_named_raw(number) {
                return Arrived { signal, sent: code <= 0 };
            }
        }
    }

    /// Stops this process because `program`, a child, was stopped: whoever waits for this process is to see that.
    /// Goes on when somebody continues this process, which continues `program`, or when somebody continues or kills
    /// `program` alone. Does not stop at all if somebody has continued this process since the program was stopped.
    pub fn stop_with(&self, program: Pid) {
        let pass_on = self.was_continued() || {
            let lookout = Lookout::post(program);
            let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::STOP);
            let by_lookout = lookout.and_then(Lookout::withdraw).unwrap_or(false);
            self.was_continued() && !by_lookout
        };
        if pass_on {
            let _ = rustix::process::kill_process(program, Signal::CONT);
        }
    }

    /// Whether a request to continue waits; it is taken.
    fn was_continued(&self) -> bool {
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: set and time are initialised, and nothing is to be told of the signal.
        unsafe {
            libc::sigtimedwait(&set_of(&[libc::SIGCONT]), core::ptr::null_mut(), &at_once) == libc::SIGCONT
        }
    }
}

/// A process that continues this one when a program is not stopped any more: a process that is stopped itself cannot
/// see that.
struct Lookout(Pid);

impl Lookout {
    fn post(program: Pid) -> io::Result<Self> {
        let state_of = |pid: Pid| File::open(format!("/proc/{}/stat", pid.as_raw_pid()));
        let front = rustix::process::getpid();
        let (program, front_state) = (state_of(program)?, state_of(front)?);
        // SAFETY: the child makes system calls, with memory on its stack, and ends.
        match unsafe { fork() }? {
            Side::Parent(pid) => Ok(Self(pid)),
            Side::Child => {
                // Not to be stopped with the others.
                let _ = rustix::process::setsid();
                let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
                while rustix::process::getppid() == Some(front) {
                    if is_stopped(&front_state) && !is_stopped(&program) {
                        let _ = rustix::process::kill_process(front, Signal::CONT);
                        exit_now(0);
                    }
                    std::thread::sleep(LOOK);
                }
                exit_now(1)
            }
        }
    }

    /// Ends it. Whether it had continued this process.
    fn withdraw(self) -> io::Result<bool> {
        let _ = rustix::process::kill_process(self.0, Signal::KILL);
        let ended =
            rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(self.0), WaitOptions::empty()))?;
        Ok(ended.is_some_and(|(_, status)| status.exit_status() == Some(0)))
    }
}

/// Whether a process is stopped, by its `/proc/<pid>/stat`. Allocates nothing.
fn is_stopped(stat: &File) -> bool {
    let mut bytes = [0; 512];
    let len = rustix::io::pread(stat, &mut bytes, 0).unwrap_or(0);
    let name_end = bytes[..len].iter().rposition(|byte| *byte == b')');
    // A letter behind the name in parentheses.
    name_end.and_then(|end| bytes.get(end + 2)).is_some_and(|state| matches!(state, b'T' | b't'))
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: the set is the one that the kernel gave when watching began.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, core::ptr::null_mut()) };
    }
}

/// What became of a child.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// It ended by itself, with this code.
    Exited(i32),
    /// A signal killed it.
    Killed(i32),
    /// It was stopped.
    Stopped,
}

/// What has become of `child` since the last question, without waiting. `None`: nothing.
pub fn change_of(child: Pid) -> io::Result<Option<Change>> {
    let options = WaitOptions::UNTRACED | WaitOptions::NOHANG;
    let status = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), options))?;
    Ok(status.and_then(|(_, status)| change(status)))
}

fn change(status: WaitStatus) -> Option<Change> {
    if status.stopped() {
        return Some(Change::Stopped);
    }
    status.exit_status().map(Change::Exited).or_else(|| status.terminating_signal().map(Change::Killed))
}

/// Ends this process by `signal`, as if that had no handler and were not blocked, and without a core dump: the
/// program that it ended before has left one. Whoever waits for this process sees the signal.
pub fn die_by(signal: i32) -> ! {
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let mut set = MaybeUninit::uninit();
    // SAFETY: restores the default and unblocks one signal, with a set that is initialised before it is used;
    // then this process ends, or, if the signal does not kill, goes on to `_exit`.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), core::ptr::null_mut());
        libc::raise(signal);
    }
    exit_now(128 + signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end_of(child: Pid) -> Change {
        loop {
            if let Some(change) = change_of(child).unwrap() {
                return change;
            }
            std::thread::sleep(core::time::Duration::from_millis(1));
        }
    }

    fn in_child(run: impl FnOnce()) -> Change {
        // SAFETY: the child makes system calls and ends.
        match unsafe { fork() }.unwrap() {
            Side::Child => {
                run();
                exit_now(99)
            }
            Side::Parent(pid) => end_of(pid),
        }
    }

    #[test]
    fn a_child_ends_as_it_says() {
        assert_eq!(in_child(|| exit_now(7)), Change::Exited(7));
        assert_eq!(in_child(|| die_by(libc::SIGSEGV)), Change::Killed(libc::SIGSEGV));
        assert_eq!(in_child(|| die_by(libc::SIGKILL)), Change::Killed(libc::SIGKILL));
        // The default of this one is to do nothing.
        assert_eq!(in_child(|| die_by(libc::SIGWINCH)), Change::Exited(128 + libc::SIGWINCH));
    }

    #[test]
    fn a_program_finds_signals_as_they_were_and_dies_with_us() {
        // A thread of its own: the mask is the thread's.
        std::thread::spawn(|| {
            let watch = Watch::start().unwrap();
            let mut command = Command::new("sh");
            command.arg("-c").arg("kill -TERM $$; exit 3");
            watch.prepare(&mut command);
            let mut child = command.spawn().unwrap();
            assert_eq!(end_of(Pid::from_child(&child)), Change::Killed(libc::SIGTERM));
            let _ = child.wait();
        })
        .join()
        .unwrap();
    }
}
