//! The Linux adapter: every contract with the kernel that uhmm relies on, one interface per file.
//!
//! What     userfaultfd ([`uffd`], [`host`]), what is present and permitted ([`scan`], [`rights`], [`maps`],
//!          [`smaps`], [`meter`]), memory of our own ([`mapping`], [`memfd`], [`node`]), frames that outlive their
//!          mapping ([`held`]), files that several use ([`filelock`], [`watch`]) or that are mapped directly ([`dax`]),
//!          threads, signals and sockets, functions behind ours ([`symbol`]), [`vfio`], and [`probe`], which asks the running kernel once what it can do.
//! Needs    Linux 5.7 for write-protection, 6.7 for `PAGEMAP_SCAN`, 6.8 for `UFFDIO_MOVE`; what is missing
//!          is found by [`probe`] and by outcome, never assumed from a version number.
//! Never    keeps page states, decides policy, or retries on its own: each outcome is decoded once and
//!          handed up.
//! Unsafe   all of the project's promises to the kernel live here. The doors are `Uffd::register`, which
//!          gives memory to a fault handler, and `Mapping`, which owns address space.

pub mod awake;
pub mod child;
pub mod clock;
pub mod dax;
pub mod filelock;
pub mod futex;
pub mod held;
pub mod host;
pub mod hugetlb;
pub mod limits;
pub mod mapping;
pub mod maps;
pub mod memfd;
pub mod meter;
pub mod node;
pub mod placement;
pub mod probe;
pub mod random;
pub mod relay;
pub mod rights;
pub mod scan;
pub mod signals;
pub mod smaps;
pub mod socket;
pub mod stack;
pub mod symbol;
pub mod thread;
mod uapi;
pub mod uffd;
pub mod vfio;
pub mod watch;
