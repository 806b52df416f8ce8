//! Bytes that a crash may tear.
//!
//! What     [`Area`], a port: what labels and the metadata of files are kept in.
//! Why      so that a test can stop at every write, and tear it.

use std::io;

/// Bytes that can be read, written and made safe. `at` counts from the area's first.
pub trait Area: Send + Sync + core::fmt::Debug {
    /// Reads all of `into`.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes all of `bytes`. Until the next sync a crash may tear them into sectors of 512 bytes, of which any are
    /// there and any are not.
    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()>;
    /// Returns when everything written is safe.
    fn sync(&self) -> io::Result<()>;
}
