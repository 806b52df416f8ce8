//! Heterogeneous memory management in user space: memory that moves to a device and comes home when touched.

pub mod buffer;
mod child;
pub mod engine;
pub mod managed;
pub mod reclaim;
pub mod space;
pub mod tree;
pub mod yardstick;

pub use buffer::Buffer;
pub use engine::Engine;
pub use space::{Space, dma, mirror, userptr};
pub use uhmm_addr::{ByteSize, Geometry, PAGE_SIZE, PageCount, Pfn, VaRange, VirtAddr, Vpn};
pub use uhmm_core::device::{Device, DevicePage, MemoryType, Transfer, TransferError};
pub use uhmm_core::migrate::Migrated;
pub use uhmm_core::notifier::{self, Owner};
pub use uhmm_core::pin::{Holder, PinError, PinFor, PinTerm};
pub use uhmm_core::stats::{Counter, Skip, Skipped};
pub use uhmm_devices::{FileDevice, MemDevice};
