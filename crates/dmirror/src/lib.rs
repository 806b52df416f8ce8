//! The device of the kernel's `lib/test_hmm.c`, as a library over uhmm's public interface.
//!
//! | room        | holds                                                                                 |
//! |-------------|---------------------------------------------------------------------------------------|
//! | `machine`   | [`Dmirror`]: a space, its devices, and who may move pages out of RAM when             |
//! | `handle`    | [`Handle`]: what a device that was opened does: read, write, migrate, look, release   |
//! | `areas`     | a handle's page table: which pages it sees, mapping by mapping                        |
//! | `transfer`  | copies between the device's buffers, its pages, and memory that may vanish            |
//! | `snapshot`  | what a page is, in one byte                                                           |
//! | `gup`       | the kernel's `mm/gup_test.c`: pages held for a moment, and how long that took         |
//!
//! A device has no page table of the process, only its own, which the space keeps true. It is what a driver looks
//! like that uses uhmm; and with the shim (`crates/dmirror-shim`) the kernel's own tests run on it.
//!
//! A touch brings one page home, and leaves no copy behind, as there. It differs from the kernel's: a device's memory
//! is one piece of address space of a size that is given, backed where it is used, instead of chunks of 256 MiB that
//! are added; a handle is of the process that opened it, and is of no use in a child; and memory that no page can
//! leave (files, shared memory, huge pages of a pool) is looked at anew by each operation, as nobody tells of its
//! changes.

mod areas;
mod error;
mod gup;
mod handle;
mod machine;
mod snapshot;
mod transfer;

pub use error::Error;
pub use gup::Held;
pub use handle::{Counts, Handle};
pub use machine::{Dmirror, Kind, Node};
pub use transfer::{Unreachable, load, store};
