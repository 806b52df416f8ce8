//! The agent of `uhmm run`: what is loaded into an unmodified program to keep it inside its budget.
//!
//! | room        | holds                                                                              |
//! |-------------|------------------------------------------------------------------------------------|
//! | `start`     | from the constructor, or the child of a fork, to running threads                   |
//! | `process`   | the state of this process, and what its handler threads are told to do             |
//! | `evict`     | the evictor thread                                                                  |
//! | `adopt`     | which mappings are put under management                                             |
//! | `fork`      | both sides of a fork                                                                |
//! | `hooks`     | the functions of the C library that are replaced                                    |
//! | `alloc`     | the agent's own heap                                                                |
//!
//! Guests' manners. The program's heap, stacks and thread blocks are managed memory, so that none of the
//! agent's threads may touch them: they are raw threads on stacks of their own, without thread-local storage,
//! and the agent allocates from a heap of its own. They have a file table of their own as well: the program
//! can close every descriptor it has and cannot reach ours.
#![allow(missing_docs, reason = "nothing here is for Rust callers: the crate is a loaded library")]
#![allow(unreachable_pub)]

mod adopt;
mod alloc;
mod evict;
mod fork;
mod hooks;
mod process;
mod start;

#[global_allocator]
static HEAP: alloc::Heap = alloc::Heap::new();
