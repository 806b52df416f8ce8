//! The pools of huge pages that are reserved beforehand.
//!
//! What     [`Pool`], one size's: how many there are, how many are free, and the file that sets it.
//! Why      huge pages that are not there are no error of the program's; who runs it must be told how many are
//!          missing and what reserves them.
//! Owns     nothing: the pools are the machine's.
//! Fails    with the error of the file; a kernel without pages of that size has no such file.

use std::fs;
use std::io;
use std::path::PathBuf;

pub use crate::mapping::Huge;

/// The pool of one size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pool {
    /// The size of its pages.
    pub size: Huge,
    /// Pages in it.
    pub total: usize,
    /// Of these, pages that nobody has and nobody was promised.
    pub free: usize,
}

impl Pool {
    /// The pool as it is now.
    pub fn read(size: Huge) -> io::Result<Self> {
        let (total, free, promised) =
            (number(size, "nr_hugepages")?, number(size, "free_hugepages")?, number(size, "resv_hugepages")?);
        Ok(Self { size, total, free: free.saturating_sub(promised) })
    }

    /// Asks the kernel to have `total` pages in it, and reads what came of that: fewer, where memory is short or
    /// in pieces. For root.
    pub fn resize(size: Huge, total: usize) -> io::Result<Self> {
        fs::write(file(size, "nr_hugepages"), total.to_string())?;
        Self::read(size)
    }

    /// The command that would let `wanted` more pages be taken.
    pub fn command_for(&self, wanted: usize) -> String {
        let total = self.total + wanted.saturating_sub(self.free);
        format!("echo {total} > {}", file(self.size, "nr_hugepages").display())
    }
}

fn file(size: Huge, name: &str) -> PathBuf {
    PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", size.bytes() >> 10))
}

fn number(size: Huge, name: &str) -> io::Result<usize> {
    let text = fs::read_to_string(file(size, name))?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_says_the_total() {
        let pool = Pool { size: Huge::M2, total: 5, free: 2 };
        let command = pool.command_for(8);
        assert_eq!(command, "echo 11 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
    }

    #[test]
    fn a_pool_has_at_least_what_is_free() {
        for size in [Huge::M2, Huge::G1] {
            match Pool::read(size) {
                Ok(pool) => assert!(pool.free <= pool.total, "{pool:?}"),
                Err(error) => println!("skipped: {size:?}: {error}"),
            }
        }
    }
}
