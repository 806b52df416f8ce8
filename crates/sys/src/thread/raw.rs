//! System calls that rustix does not offer.
//!
//! What     [`syscall`], one instruction, and the few calls made with it.
//! Why      the wrappers of the C library store `errno` in thread-local storage, which raw threads and signal
//!          handlers must not touch.
//! Fails    with the error number in the result, as the kernel gives it.

use core::arch::asm;

use rustix::io::Errno;

/// Makes a system call; an error number comes back as the error.
///
/// # Safety
/// The call with these arguments must be one that the caller may make: memory that the kernel reads or writes
/// must be the caller's, and what it changes about the process must break nobody's assumptions.
pub(crate) unsafe fn syscall<const N: usize>(number: u32, given: [usize; N]) -> Result<usize, Errno> {
    const { assert!(N <= 6, "a system call has six arguments at the most") };
    let mut args = [0; 6];
    args[..N].copy_from_slice(&given);
    let result: isize;
    // SAFETY: the system call instruction clobbers rax, rcx and r11, all named; it needs no stack. What the
    // kernel does is the caller's promise. Memory is not declared untouched.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as usize => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    // Errors are -4095..=-1; every other value is a result.
    if (-4095..0).contains(&result) {
        Err(Errno::from_raw_os_error(-result as i32))
    } else {
        Ok(result as usize)
    }
}
