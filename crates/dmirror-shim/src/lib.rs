//! A library to be loaded before a program (`LD_PRELOAD`) that finds `/dev/hmm_dmirror0` to `3` then, as with the
//! kernel's `test_hmm` module: its own tests, `hmm-tests`, run unmodified.
//!
//! | room       | holds                                                            |
//! |------------|------------------------------------------------------------------|
//! | `hooks`    | the functions of the C library that are replaced                 |
//! | `files`    | the machine of this process, and what its descriptors stand for  |
//! | `command`  | the device's ioctls, and their error numbers                     |
//! | `gup`      | those of `/sys/kernel/debug/gup_test`                            |
//!
//! Calls are translated, and nothing else: what the device does is the library's. A child of fork starts without the
//! parent's machine and opens its own; a descriptor that it inherited is of no use to it. Copies of a descriptor (`dup`)
//! are not the device. With `UHMM_FORCED_FALLBACK=1` pages are copied out instead of moved, and there are no coherent
//! devices.
#![allow(missing_docs, reason = "nothing here is for Rust callers: the crate is a loaded library")]
#![allow(unreachable_pub)]

mod command;
// A library that replaces functions of the C library cannot be linked into a test harness.
#[cfg(not(test))]
mod files;
mod gup;
#[cfg(not(test))]
mod hooks;
#[cfg(test)]
mod tests;

/// Apart from the program's heap, parts of which the program may have moved to a device, and given back.
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;
