//! The mechanisms of uhmm over two ports, [`Host`](host::Host) and [`Device`](device::Device).
//!
//! | room          | holds                                                                   |
//! |---------------|-------------------------------------------------------------------------|
//! | [`mm`]        | one address space: the table, the arena, the pagemaps and the host      |
//! | [`pagetable`] | the page word and its transitions                                       |
//! | [`frame`]     | RAM frames of our own, in an arena of slots                             |
//! | [`pagemap`]   | devices' pages: who has which pfns, references, teardown, poison         |
//! | [`fault`]     | a touch of an absent page: decision, fault-around, resolution           |
//! | [`migrate`]   | out of RAM, in phases                                                   |
//! | [`notifier`]  | who is told before pages change                                          |
//! | [`mirror`]    | devices' copies of the page table, and what a range of pages is          |
//! | [`dma`]       | the addresses by which a device reaches mirrored pages, and others'     |
//! | [`host`], [`device`] | the two ports; a third, small one is [`dma::Iommu`]              |
//!
//! There are no system calls, threads, clocks or environment here, so that loom can explore the crate and
//! the tests can fail it at any step.
//!
//! Lock order, outermost first; no lock is held across a device transfer, except a claim on a page word:
//!
//! ```text
//! Mm::copying      one thread at a time copies pages out
//! Mm::fallback     one discard of our own at a time
//! Mm::layout       readers: pages go out or come in; writer: the program's mappings change
//!   page word      a claim (Moving): never waited for under the layout lock held for writing
//!     Arena::gate  the pool of frames
//!     Notifiers    their tree, while callbacks run; inside it the lock of whoever is called, a mirror's
//! Pins             the list of holders; waits for pages in flight, and is taken by nobody who serves faults
//! Registry         pagemaps and the resource tree; held while nobody is called or waited for
//!   Bad, Ledger    what is lost of a pagemap; in debug builds, who holds its pages: innermost
//! ```
#![no_std]
extern crate alloc;
#[cfg(any(test, loom))]
extern crate std;

pub mod device;
pub mod dma;
pub mod fault;
pub mod frame;
pub mod host;
pub mod migrate;
pub mod mirror;
pub mod mm;
pub mod notifier;
pub mod pagemap;
pub mod pagetable;
pub mod pin;
pub mod stats;
pub mod sync;
