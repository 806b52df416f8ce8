//! Children of a test, made by fork.

/// Forks; the child calls `case`, with no other thread and no allocation, and exits by its answer.
pub(crate) fn fork(case: impl FnOnce() -> bool) -> libc::pid_t {
    // SAFETY: the child does nothing that needs another thread: it touches memory and exits.
    match unsafe { libc::fork() } {
        -1 => panic!("fork failed"),
        0 => {
            // SAFETY: a child that hangs ends by this; it exits without running anything of the parent's.
            unsafe {
                libc::alarm(30);
                libc::_exit(i32::from(!case()));
            }
        }
        child => child,
    }
}

/// Waits for the child, whose answer was yes.
#[track_caller]
pub(crate) fn expect_well(child: libc::pid_t) {
    let mut status = 0;
    // SAFETY: the status is this frame's.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child ended by signal {} or with {}", status & 0x7f, status >> 8);
}
