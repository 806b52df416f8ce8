//! Numbers that nobody can foresee.
//!
//! What     [`fill`], the kernel's random bytes.
//! Fails    with the kernel's error, which no kernel that has started up gives.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `bytes` with random ones.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
    }
    Ok(())
}
