//! Engines: how a touch of an absent page reaches us, and which thread does something about it.
//!
//! * [`signal`]: the faulting thread resolves its own fault in a SIGBUS handler. No other thread has to wake
//!   up, which makes it the fastest; but a system call on an absent page fails with `EFAULT`.
//! * [`threads`]: handler threads read messages. Serves every access, the kernel's own included; the price
//!   is a hand-over between threads, which is kept small by running the handler where the faulter runs.

mod haltpoll;
pub mod signal;
pub mod threads;

/// Which engine a space uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Engine {
    /// The faulting thread resolves the fault itself. For programs that keep system calls off managed
    /// memory, or bring it home before.
    #[default]
    Signal,
    /// Handler threads resolve faults: any access works, from any thread and from the kernel.
    Threads,
}
