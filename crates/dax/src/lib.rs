//! Directly mapped memory: namespaces with labels, and what is made of them.
//!
//! What     [`store`], a file or memory that is divided into namespaces by labels which survive any crash;
//!          [`device`], a namespace that is mapped in pages of one size; [`file`](mod@file), files in a namespace;
//!          [`kmem`], a namespace as a space's slower memory.
//! Why      what the kernel offers for persistent memory (device-dax, fs-dax, namespaces) is worth having for
//!          memory that no firmware announces: a file, huge pages, a server's spare RAM.
//! Knows    `uhmm-addr`'s units, `uhmm-core`'s pagemaps and its port to devices, `uhmm-devices`, and `uhmm-sys`; nothing
//!          of spaces and migration.
//! Source   `drivers/dax`, `drivers/nvdimm`, `fs/dax.c` of Linux; `ndctl` and `daxctl` for names and forms.

pub mod device;
pub mod file;
pub mod kmem;
mod machine;
mod pin;
pub mod store;
pub mod yardstick;

pub use device::{DaxMapping, Device, Faults};
pub use file::{DaxFile, FileMapping, FileSystem, Patience};
pub use kmem::{Reach, SystemRam};
pub use machine::machine;
pub use store::{Change, ChangeError, Mode, Namespace, NamespaceId, OpenError, Spec, Store};
